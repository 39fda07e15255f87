"""Boxes of arrays that our writer made, without Python's lock: file -> CRC -> blosc -> box, one call a box.

=======  ==========================================================================================
input    the folder of an array of a local store, a box
does     reads runs of neighbouring chunks, checks each chunk's CRC32C, decodes it with numcodecs' blosc, copies what lies in the box
output   the voxels, in the given array; False where anything is not as our writer leaves it
raises   nothing about the data: the caller reads again with tensorstore, which tells what is wrong, or finds nothing wrong
=======  ==========================================================================================

Why beside tensorstore: it takes 25 microseconds of CPU a chunk beyond decoding, and a 96-voxel patch with its label touches 125 chunks
(bench/results). Where the libraries do not export what is called here, or for stores in buckets, tensorstore serves alone.
"""

import ctypes
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ftengine.geometry import Box, IntZYX
from ftengine.store.layout import AIR_HU, CHUNK, array_document, chunks_per_axis, volume_path

_MAX_OPEN = 512
_CRC_BYTES = 4
_SHORT = 256  # bytes of a chunk that is compared with the one before it: labels are mostly chunks of one value
_SLACK = 4096  # bytes by which a chunk that cannot be compressed is longer, and more
_DTYPES = {"0": (np.int16, AIR_HU), "labels/seg/0": (np.uint8, 0)}


@dataclass(frozen=True)
class _Libraries:
    """Addresses of the functions that are called without Python."""

    pread: int
    crc32c: int
    decompress: int
    memcpy: int


@cache
def _libraries() -> _Libraries | None:
    """None where one of them cannot be found: another build of numcodecs or google-crc32c, another system."""
    try:
        found = (
            (ctypes.CDLL(None), "pread"),
            (ctypes.CDLL(import_module("google_crc32c._crc32c").__file__), "crc32c_value"),
            (ctypes.CDLL(import_module("numcodecs.blosc").__file__), "blosc_decompress_ctx"),
            (ctypes.CDLL(None), "memcpy"),
        )
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for library, name in found]
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    pread, crc32c, decompress, memcpy = (address or 0 for address in addresses)
    return _Libraries(pread, crc32c, decompress, memcpy) if min(pread, crc32c, decompress, memcpy) > 0 else None


def _c_call(_context: Any, _address: Any, _first: Any, _second: Any, _third: Any, _fourth: Any) -> Any:
    """Call the C function at ``address`` with four integers of 64 bits; its result as one, of which a caller knows the width."""
    signature = types.int64(types.intp, types.intp, types.intp, types.intp, types.intp)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, [word] * 4).as_pointer())
        return builder.call(function, arguments[1:])

    return signature, generate


_call: Any = intrinsic(_c_call)  # in compiled code: address and four integers -> integer


@numba.njit(nogil=True, cache=True)
def _read_box(
    fd: int,
    index: NDArray[np.int64],
    first_zyx: NDArray[np.int64],
    shape_zyx: NDArray[np.int64],
    out: NDArray[Any],
    place_zyx: NDArray[np.int64],
    scratch: NDArray[Any],
    buffer: NDArray[np.uint8],
    pread: int,
    crc32c: int,
    decompress: int,
    memcpy: int,
) -> bool:
    """Box of ``shape_zyx`` voxels from ``first_zyx`` of an array into ``out`` from ``place_zyx``; False where something is not as it must be."""
    last_zyx = first_zyx + shape_zyx
    kx0, kx1 = first_zyx[2] // CHUNK, (last_zyx[2] - 1) // CHUNK + 1
    kept_from, kept_bytes = 0, -1  # the chunk that is in scratch, where it is short: its place in the buffer's tail
    tail = buffer.size - _SHORT
    for kz in range(first_zyx[0] // CHUNK, (last_zyx[0] - 1) // CHUNK + 1):
        for ky in range(first_zyx[1] // CHUNK, (last_zyx[1] - 1) // CHUNK + 1):
            begin, end, total = index[kz, ky, kx0, 0], index[kz, ky, kx0, 0], 0
            for kx in range(kx0, kx1):
                offset, length = index[kz, ky, kx, 0], index[kz, ky, kx, 1]
                if offset < 0 or length <= _CRC_BYTES:
                    return False
                begin, end, total = min(begin, offset), max(end, offset + length), total + length
            if end - begin > tail or end - begin > total + total // 2 + 4096:
                return False
            if _call(pread, fd, buffer.ctypes.data, end - begin, begin) != end - begin:
                return False
            for kx in range(kx0, kx1):
                at, length = index[kz, ky, kx, 0] - begin, index[kz, ky, kx, 1]
                same = length == kept_bytes
                if same:
                    for i in range(length):
                        if buffer[at + i] != buffer[kept_from + i]:
                            same = False
                            break
                if not same:
                    body = length - _CRC_BYTES
                    stored = np.uint32(0)
                    for i in range(_CRC_BYTES):
                        stored |= np.uint32(buffer[at + body + i]) << np.uint32(8 * i)
                    found = _call(crc32c, buffer.ctypes.data + at, body, 0, 0)
                    if np.uint32(found & 0xFFFFFFFF) != stored:
                        return False
                    # header of blosc 1: bytes when decoded, bytes of a block, bytes as stored; each 4, from byte 4 on
                    decoded, compressed = np.int64(0), np.int64(0)
                    for i in range(4):
                        decoded |= np.int64(buffer[at + 4 + i]) << (8 * i)
                        compressed |= np.int64(buffer[at + 12 + i]) << (8 * i)
                    if body < 16 or compressed != body or decoded != scratch.size * scratch.itemsize:
                        return False
                    size = scratch.size * scratch.itemsize
                    written = _call(decompress, buffer.ctypes.data + at, scratch.ctypes.data, size, 1)
                    if np.int64(written & 0xFFFFFFFF) != size:
                        return False
                    kept_bytes = -1
                    if length <= _SHORT:
                        kept_from, kept_bytes = tail, length
                        for i in range(length):
                            buffer[tail + i] = buffer[at + i]
                z0, z1 = max(first_zyx[0], kz * CHUNK), min(last_zyx[0], (kz + 1) * CHUNK)
                y0, y1 = max(first_zyx[1], ky * CHUNK), min(last_zyx[1], (ky + 1) * CHUNK)
                x0, x1 = max(first_zyx[2], kx * CHUNK), min(last_zyx[2], (kx + 1) * CHUNK)
                num_bytes = (x1 - x0) * out.itemsize
                for z in range(z0, z1):
                    to_plane = (z - first_zyx[0] + place_zyx[0]) * out.shape[1] - first_zyx[1] + place_zyx[1]
                    from_plane = (z - kz * CHUNK) * CHUNK - ky * CHUNK
                    for y in range(y0, y1):
                        to = ((to_plane + y) * out.shape[2] + x0 - first_zyx[2] + place_zyx[2]) * out.itemsize
                        source = ((from_plane + y) * CHUNK + x0 - kx * CHUNK) * out.itemsize
                        _call(memcpy, out.ctypes.data + to, scratch.ctypes.data + source, num_bytes, 0)
    return True


@dataclass(frozen=True)
class _Shard:
    """The one file of an array. index: int64 [z, y, x, 2], offset and bytes of each inner chunk; identity: of the file that it was read from."""

    index: NDArray[np.int64]
    identity: tuple[int, int, int]


class _Memory(threading.local):
    """What each thread decodes into."""

    def __init__(self) -> None:
        self._scratch = {np.dtype(dtype): np.empty((CHUNK,) * 3, dtype) for dtype, _ in _DTYPES.values()}
        self._buffer = np.empty(0, np.uint8)

    def scratch(self, dtype: Any) -> NDArray[Any]:
        return self._scratch[np.dtype(dtype)]

    def buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        if self._buffer.size < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        return self._buffer


class LocalShards:
    """Reads boxes of the volumes below a folder; safe to use from many threads."""

    def __init__(self, root: Path, libraries: _Libraries) -> None:
        self._root = root
        self._libraries = libraries
        self._memory = _Memory()
        self._open: OrderedDict[tuple[str, str], _Shard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def below(cls, root: Path) -> "LocalShards | None":
        """None where this machine's libraries do not allow it."""
        libraries = _libraries()
        return None if libraries is None else cls(root, libraries)

    def read(
        self, case: str, name: str, volume_shape_zyx: IntZYX, inside: Box, out: NDArray[Any], place_zyx: IntZYX
    ) -> bool:
        """Voxels of the box ``inside``, which lies in the volume, into ``out`` from ``place_zyx`` on; False where they must be read otherwise.

        name: "0" or "labels/seg/0". out: C-contiguous, of the array's type; where the answer is False it holds anything.
        """
        folder = self._root / volume_path(case) / name
        try:
            file = os.open(folder / "c/0/0/0", os.O_RDONLY)
        except OSError:
            return False
        try:
            status = os.fstat(file)
            identity = (status.st_ino, status.st_mtime_ns, status.st_size)
            shard = self._shard(case, name, folder, file, identity, volume_shape_zyx)
            if shard is None:
                return False
            longest_row = shard.index.shape[2] * (CHUNK**3 * out.itemsize + _SLACK) + _SHORT
            calls = self._libraries
            done: bool = _read_box(
                file,
                shard.index,
                np.array(inside.origin_zyx, np.int64),
                np.array(inside.shape_zyx, np.int64),
                out,
                np.array(place_zyx, np.int64),
                self._memory.scratch(out.dtype),
                self._memory.buffer(longest_row),
                calls.pread,
                calls.crc32c,
                calls.decompress,
                calls.memcpy,
            )
            return done
        finally:
            os.close(file)

    def _shard(
        self, case: str, name: str, folder: Path, file: int, identity: tuple[int, int, int], shape: IntZYX
    ) -> _Shard | None:
        """The index of the open file; read anew where another file has taken its place."""
        with self._lock:
            shard = self._open.get((case, name))
            if shard is not None and shard.identity == identity:
                self._open.move_to_end((case, name))
                return shard
        shard = _open_shard(folder, file, identity, name, shape)
        if shard is not None:
            with self._lock:
                self._open[case, name] = shard
                while len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
        return shard


def _open_shard(folder: Path, file: int, identity: tuple[int, int, int], name: str, shape: IntZYX) -> _Shard | None:
    """None where the metadata are not word for word what our writer writes, or the index is damaged."""
    from google_crc32c import value as crc32c

    dtype, fill = _DTYPES[name]
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
        codec = document["codecs"][0]["configuration"]["codecs"][1]["configuration"]
        wanted = json.loads(array_document(shape, np.dtype(dtype).name, fill, codec))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    if document != wanted:
        return None
    grid = chunks_per_axis(shape)
    num_bytes = 16 * grid[0] * grid[1] * grid[2] + _CRC_BYTES
    size = identity[2]
    tail = os.pread(file, num_bytes, size - num_bytes) if size >= num_bytes else b""
    if len(tail) != num_bytes or crc32c(tail[:-_CRC_BYTES]) != int.from_bytes(tail[-_CRC_BYTES:], "little"):
        return None
    index = np.frombuffer(tail[:-_CRC_BYTES], "<u8").astype(np.int64).reshape(*grid, 2)
    return _Shard(index, identity)
