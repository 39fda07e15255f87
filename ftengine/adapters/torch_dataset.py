"""The loader as a ``torch.utils.data.IterableDataset``: batches or single patches as dictionaries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from ftengine.adapters.verdict import verdict_of
from ftengine.assemble import build_bank, build_loader, build_synthesis_stage, config_for_store, load_painters
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.loader.plan import Mix
from ftengine.loader.stages import Stage
from ftengine.store.reader import Store, open_store
from ftengine.types import Batch, PatchRecord

STATE_VERSION = 1

_NO_WORKERS = (
    "PatchDataset: stays in the process that made it, so that DataLoader needs num_workers=0. The loader has its own threads, which "
    "read, prepare and paint ahead; a worker process would only copy every batch once more, and two would give the same batches twice. "
    "Set num_workers=0 and tune loader.reads_in_flight and loader.queue_batches instead."
)


class PatchDataset(IterableDataset[dict[str, Any]]):
    """The patches of ``build_loader``, in its order, for ``DataLoader(dataset, batch_size=N)`` or, in whole batches, ``batch_size=None``.

    A patch is a dictionary: image float32 [1, z, y, x], HU windowed to [0, 1]; label uint8 [1, z, y, x]; case, dataset (text); epoch, index
    (the address); and the keys of ``adapters.verdict.verdict_of``. A batch is what ``default_collate`` makes of its patches: image
    [B, 1, z, y, x], texts as lists, numbers as tensors of B. Tensors lie on ``config.device``; images of one batch share their memory.

    Iterating gives the rest of the current epoch; the next iteration gives the next epoch, and after a ``break`` the patches behind it.
    ``len`` counts patches, or batches, of an epoch. ``state_dict`` and ``load_state_dict`` are those of torchdata's
    ``StatefulDataLoader``, between any two patches. ``close`` ends the loader's threads; a dataset is also a context manager.
    """

    def __init__(
        self,
        store: Store | str | Path,
        config: Config | None = None,
        *,
        batches: bool = False,
        paint: bool | None = None,
        generator: str | Path | None = None,
        judge: str | Path | None = None,
        mix: Mix | None = None,
        split: str | None = None,
        held_out_fold: int | None = None,
        stages: tuple[Stage, ...] = (),
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Open the store; the loader itself is made when it is first needed.

        config: None is the preset of the store. batches: whole batches of ``training.batch_size`` in place of patches.
        paint: synthesis and quality control; None paints where a generator is given or ``synthesis.synthesizer`` needs none. generator,
        judge: checkpoints of ``ftengine train``; freetumor without a generator takes ``synthesis.fixed_contrast``, painting without a
        judge keeps every tumour.
        mix: None is "mixed" with painting, else "annotated". split, held_out_fold: as for ``build_loader``.
        stages: further stages, behind the synthesis. rank, world_size: None asks ``torch.distributed`` when the loader is made, and is
        (0, 1) where no process group is. Raises ConfigError for a judge without painting, and where store and configuration do not fit.
        """
        needs_generator = config is None or config.synthesis.needs_generator
        paints = generator is not None or not needs_generator if paint is None else paint
        if not paints and (generator is not None or judge is not None):
            raise ConfigError(
                "PatchDataset: a generator or a judge without painting does nothing. Give a generator, or paint=True for a fixed contrast."
            )
        if (rank is None) != (world_size is None):
            raise ConfigError(f"PatchDataset: rank={rank} with world_size={world_size}; give both or neither.")
        self.store = store if isinstance(store, Store) else open_store(store)
        self.config = config or config_for_store(self.store)
        self._batches = batches
        self._paints = paints
        self._painters = (generator, judge)
        self._mix: Mix = mix or ("mixed" if paints else "annotated")
        self._rows: dict[str, Any] = {"split": split, "held_out_fold": held_out_fold}
        self._stages = stages
        self._given_rank = None if rank is None or world_size is None else (rank, world_size)
        self._rank: tuple[int, int] | None = None
        self._loader: Loader | None = None
        self._batch: Batch | None = None  # of which patches are left to deliver
        self._delivered = 0
        self._state_before: dict[str, Any] | None = None  # the loader's, before ``_batch``

    @property
    def loader(self) -> Loader:
        """The loader behind this dataset: waiting times, levels, state."""
        if self._loader is None:
            stages = self._stages
            if self._paints:
                painters = load_painters(self.config, *self._painters)
                bank = build_bank(self.config, self.store, **self._rows)
                stages = (build_synthesis_stage(self.config, *painters, bank=bank), *stages)
            self._rank = self._given_rank or _distributed_rank()
            rank, world_size = self._rank
            self._loader = build_loader(
                self.config,
                self.store,
                mix=self._mix,
                stages=stages,
                rank=rank,
                world_size=world_size,
                **self._rows,
            )
        return self._loader

    def __len__(self) -> int:
        return len(self.loader) * (1 if self._batches else self.config.training.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise ConfigError(_NO_WORKERS)
        loader = self.loader
        if self._given_rank is None and self._rank != _distributed_rank():
            raise ConfigError(
                f"PatchDataset: was made for rank and world size {self._rank}; torch.distributed now says {_distributed_rank()}. Call "
                "init_process_group before the dataset is first used."
            )
        return self._samples(loader)

    def _samples(self, loader: Loader) -> Iterator[dict[str, Any]]:
        epoch = loader.epoch if self._batch is None else self._batch.records[0].request.epoch
        while self._batch is not None or loader.epoch == epoch:
            if self._batch is None:
                state = loader.state_dict()
                self._batch, self._state_before = next(iter(loader)), state
            batch, number = self._batch, self._delivered
            self._delivered += 1
            if self._batches or self._delivered >= len(batch.records):
                self._batch, self._delivered, self._state_before = None, 0, None
            yield _batch_sample(batch) if self._batches else _patch_sample(batch, number)

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands: enough to go on with the same next patch in another process. Plain JSON values."""
        position = self._state_before or self.loader.state_dict()
        return {"version": STATE_VERSION, "loader": position, "delivered": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ConfigError for the state of another run, or of one in patches if this gives batches."""
        if state.get("version") != STATE_VERSION:
            raise ConfigError(
                f"PatchDataset: the state has version {state.get('version')!r}; want {STATE_VERSION}. Start the run anew."
            )
        delivered = int(state["delivered"])
        if self._batches and delivered:
            raise ConfigError(
                f"PatchDataset: the state stands behind patch {delivered} of a batch; this dataset gives whole batches. Set batches=False."
            )
        self.loader.load_state_dict(state["loader"])
        self._batch, self._delivered, self._state_before = None, delivered, None
        if delivered:
            self._state_before = state["loader"]

    def close(self) -> None:
        """End the loader's threads; iterating again goes on at the same place."""
        if self._loader is not None:
            self._loader.close()

    def __enter__(self) -> "PatchDataset":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a spawned worker would start a loader of its own."""
        raise ConfigError(_NO_WORKERS)


def _distributed_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) where no process group was made."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _patch_sample(batch: Batch, number: int) -> dict[str, Any]:
    return {"image": batch.image[number], "label": batch.label[number], **_fields(batch.records[number])}


def _batch_sample(batch: Batch) -> dict[str, Any]:
    return {"image": batch.image, "label": batch.label, **default_collate([_fields(r) for r in batch.records])}


def _fields(record: PatchRecord) -> dict[str, Any]:
    request = record.request
    address = {"case": request.case, "dataset": request.dataset, "epoch": request.epoch, "index": request.index}
    return address | verdict_of(record.painted)
