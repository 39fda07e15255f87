"""Many boxes read ahead: one thread that waits for all of them, others that fetch and decode.

=======  ==========================================================================================
input    ``Store.cut`` of a case and a box
does     opens arrays, issues reads, at most ``in_flight`` boxes at a time; image and label of a box go out together
output   a future of ``Patch``, the same voxels as ``Store.read``
raises   in the future: StoreError naming the volume
=======  ==========================================================================================
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import tensorstore as ts

from ftengine.geometry import Box, IntZYX
from ftengine.store.reader import MAX_OPEN_ARRAYS, Allocate, Cut, Store
from ftengine.types import Patch

# inner chunks that a 96-voxel patch touches: as many requests may wait for a bucket at the same time
_REQUESTS_A_BOX = 64


class AsyncReads:
    """Reads boxes of a store ahead of their use. ``close`` cancels what is under way and ends the threads.

    Volumes in a folder are read by ``Store.read_here`` in threads of its own, all others by tensorstore. There a box waits for the network three times at first (metadata, index of the shard, chunks), and all boxes wait together: over a slow
    network the rate grows with ``in_flight`` until the threads that decode are busy.
    """

    def __init__(
        self,
        store: Store,
        *,
        threads: int,
        in_flight: int,
        allocate: Allocate = np.empty,
        measure: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """threads: that decode chunks. allocate: gives the patches' memory, e.g. pinned for a GPU. measure: is entered while reads are under way."""
        self._store = store
        self._allocate = allocate
        self._measure = measure
        self._spell = ExitStack()
        self._num_under_way = 0
        requests = {"limit": max(32, in_flight * _REQUESTS_A_BOX)}
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "data_copy_concurrency": {"limit": threads},
                "s3_request_concurrency": requests,
                "gcs_request_concurrency": requests,
            }
        )
        self._arrays: OrderedDict[tuple[str, str], asyncio.Future[Any]] = OrderedDict()
        self._slots = asyncio.Semaphore(in_flight)
        self._closing = threading.Lock()
        self._is_closed = False
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="ftengine-decode")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ftengine-reads", daemon=True)
        self._thread.start()

    def submit(self, case: str, box: Box) -> Future[Patch]:
        """Read a box; the future also has ``cancel``. Raises RuntimeError after ``close``."""
        with self._closing:  # a read that is submitted is one that close() cancels
            if self._is_closed:
                raise RuntimeError("the reads of this store were closed")
            return asyncio.run_coroutine_threadsafe(self._read(case, box), self._loop)

    def close(self) -> None:
        """Cancel all reads and end the thread."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            cancelling = asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop)
        cancelling.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, case: str, box: Box) -> Patch:
        async with self._slots:
            with self._under_way():
                return await self._patch(case, box)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Count a read; ``measure`` lasts from the first that begins to the end of the last."""
        if self._num_under_way == 0:
            self._spell.enter_context(self._measure())
        self._num_under_way += 1
        try:
            yield
        finally:
            self._num_under_way -= 1
            if self._num_under_way == 0:
                self._spell.close()

    async def _patch(self, case: str, box: Box) -> Patch:
        cut = self._store.cut(case, box)
        if self._store.shards is not None:
            patch = await self._loop.run_in_executor(self._decoders, self._store.read_here, cut, self._allocate)
            if patch is not None:
                return patch
        try:
            return cut.filled(await self._voxels(cut), self._allocate)
        except (ValueError, OSError) as error:
            raise self._store.damaged(case, error) from error

    async def _voxels(self, cut: Cut) -> list[Any]:
        arrays = await asyncio.gather(*(self._array(cut, name) for name in cut.arrays))
        together = ts.Batch()  # one request for neighbouring chunks, one for the index of a shard
        reads = [array[cut.source].read(order="C", batch=together) for array in arrays]
        together.submit()
        return [await read for read in reads]

    async def _array(self, cut: Cut, name: str) -> Any:
        """An open array; opened once also where many boxes ask at the same time."""
        key = (cut.case, name)
        opening = self._arrays.get(key)
        if opening is None:
            opening = asyncio.ensure_future(self._open(cut.case, name, cut.volume_shape_zyx))
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also if nobody waits
            self._arrays[key] = opening
            while len(self._arrays) > MAX_OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        else:
            self._arrays.move_to_end(key)
        try:
            return await asyncio.shield(opening)
        except BaseException:
            if opening.done():  # not kept: the next one tries again
                self._arrays.pop(key, None)
            raise

    async def _open(self, case: str, name: str, shape_zyx: IntZYX) -> Any:
        array = await ts.open(self._store.spec(case, name), open=True, read=True, context=self._context)
        self._store.check_shape(case, name, array.shape, shape_zyx)
        return array
