"""Which case and which box: from the index alone, as a function of (seed, epoch, index).

Law of the sampling. ``annotated_fraction`` of all slots, spread evenly over the steps, come from tumour-annotated volumes, the rest
from volumes with organ labels only; each of the two streams goes through its volumes in a new random order every pass. A patch is positive with
``positive_fraction``: an inner chunk is drawn in proportion to its labelled voxels (any label above 0; with ``class_balanced``, of one
class that is drawn first, so that small tumours are met as often as the organ around them), the centre uniformly inside
that chunk, and the box is moved so that one labelled voxel of the chunk, fixed at conversion, lies inside. So a positive patch always
holds labelled tissue, as with MONAI's ``RandCropByPosNegLabel``, without reading a label. Other patches are centred in a chunk that
holds background of the body. Boxes are clamped into the volume; a volume smaller than the patch is centred in it.
"""

import math
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ftengine.config import AugmentConfig, Config
from ftengine.errors import ConfigError
from ftengine.geometry import Box, IntZYX, int_zyx
from ftengine.rng import Purpose, patch_rng
from ftengine.store.folds import rows_in
from ftengine.store.index import unpack_body_chunks
from ftengine.store.layout import CHUNK, chunks_per_axis
from ftengine.store.reader import Store
from ftengine.types import Augmentation, PatchRequest

Mix = Literal["annotated", "mixed"]
# Fixed numbers of the two streams: part of every result
_STREAM_ANNOTATED, _STREAM_ORGANS = 0, 1


class _Stream:
    """Volumes of one kind, visited in a new random order every pass."""

    def __init__(self, number: int, rows: NDArray[np.int64]) -> None:
        self.number = number
        self.rows = rows
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = (
            None  # of the pass drawn last: most requests ask for it again
        )

    def row(self, seed: int, visit: int) -> int:
        """The row of the ``visit``-th patch of this stream, counted over all epochs."""
        turn, place = divmod(visit, len(self.rows))
        known = self._order
        if known is None or known[0] != (seed, turn):
            rng = patch_rng(seed, Purpose.CASE_ORDER, epoch=turn, index=self.number)
            known = self._order = ((seed, turn), rng.permutation(len(self.rows)))
        return int(self.rows[known[1][place]])


class Plan:
    """Patch requests of a run; request (epoch, index) is a function of the seed and the index of the store alone."""

    def __init__(
        self, config: Config, store: Store, *, mix: Mix, split: str | None = None, held_out_fold: int | None = None
    ) -> None:
        """``mix``: "annotated" draws from tumour-annotated volumes only (baseline), "mixed" also from organ-labelled ones.

        ``split``: use only rows of this split; ``held_out_fold``: leave this fold out. Raises ConfigError where nothing is left to draw from.
        """
        self.config = config
        self._store = store
        self._patch: IntZYX = config.region.patch_zyx
        self._datasets: list[str] = store.index.column("dataset").to_pylist()
        annotation = np.array(store.index.column("annotation").to_pylist(), dtype=str)
        used = rows_in(store.index, split=split, held_out_fold=held_out_fold)
        self._annotated = annotation == "tumor"
        annotated = _Stream(_STREAM_ANNOTATED, np.flatnonzero(used & self._annotated))
        organs = _Stream(_STREAM_ORGANS, np.flatnonzero(used & (annotation == "organ")))
        fraction = 1.0 if mix == "annotated" else config.loader.annotated_fraction
        if mix == "mixed" and not len(organs.rows):
            fraction = 1.0
        if mix == "mixed" and not len(annotated.rows):
            fraction = 0.0
        self._annotated_share = Fraction(fraction).limit_denominator(10_000)
        self._streams = {True: annotated, False: organs}
        used_streams = [stream for kind, stream in self._streams.items() if fraction != (0.0 if kind else 1.0)]
        if any(not len(stream.rows) for stream in used_streams):
            kinds = {k: int((used & (annotation == k)).sum()) for k in ("tumor", "organ", "none")}
            where = f" in split {split!r}" if split is not None else ""
            where += f" outside fold {held_out_fold}" if held_out_fold is not None else ""
            raise ConfigError(
                f"{store.location}: no volume{where} to draw from (tumours annotated: {kinds['tumor']}, organs only: {kinds['organ']}, no label: "
                f"{kinds['none']}); this run needs tumour-annotated volumes. Convert labelled cases, or mark tumour-free ones with "
                "'ftengine convert --annotated tumor'."
            )
        self.batch_size = config.training.batch_size
        volumes = sum(len(stream.rows) for stream in used_streams)
        patches = config.loader.patches_per_epoch or volumes
        self.batches_per_epoch = max(1, math.ceil(patches / self.batch_size))
        self.num_volumes = volumes

    def batch(self, epoch: int, step: int) -> list[PatchRequest]:
        """The requests of batch ``step`` of ``epoch``."""
        if not 0 <= step < self.batches_per_epoch:
            raise ConfigError(f"step={step}: want 0 to {self.batches_per_epoch - 1}, the batches of an epoch.")
        return [self.request(epoch, step * self.batch_size + slot) for slot in range(self.batch_size)]

    def request(self, epoch: int, index: int) -> PatchRequest:
        """The request of patch ``index`` of ``epoch``."""
        step, slot = divmod(index, self.batch_size)
        step += epoch * self.batches_per_epoch
        # slots of annotated volumes up to and with this step: the share is kept over steps, whatever the batch size
        before, after = (math.floor(s * self.batch_size * self._annotated_share) for s in (step, step + 1))
        if slot < after - before:
            row = self._streams[True].row(self.config.seed, before + slot)
        else:
            organs_before = step * self.batch_size - before
            row = self._streams[False].row(self.config.seed, organs_before + slot - (after - before))
        rng = patch_rng(self.config.seed, Purpose.CROP_AND_AUGMENT, epoch=epoch, index=index)
        shape = int_zyx(self._store.index.column("shape_zyx")[row].as_py())
        box = self._draw_box(rng, row, shape)
        augmentation = draw_augmentation(rng, self.config.augment)
        case = self._store.cases[row]
        return PatchRequest(epoch, index, row, case, self._datasets[row], bool(self._annotated[row]), box, augmentation)

    def _draw_box(self, rng: np.random.Generator, row: int, shape: IntZYX) -> Box:
        positive = rng.random() < self.config.loader.positive_fraction
        anchor = self._labelled_voxel(rng, row, shape) if positive else None
        if anchor is not None:
            chunk_start = anchor // CHUNK * CHUNK
            center = np.minimum(chunk_start + rng.integers(0, CHUNK, 3), np.array(shape) - 1)
        else:
            center = self._body_voxel(rng, row, shape)
        origin = np.array(center) - np.array(self._patch) // 2
        if anchor is not None:
            origin = np.clip(origin, anchor - np.array(self._patch) + 1, anchor)
        return Box(_clamped(origin, shape, self._patch), self._patch)

    def _labelled_voxel(self, rng: np.random.Generator, row: int, shape: IntZYX) -> NDArray[np.int64] | None:
        classes = self._store.index.column("class_chunks")[
            row
        ].values  # Arrow: no Python object for each of thousands of chunks
        if classes is None or not len(classes):
            return None
        if self.config.loader.class_balanced:
            classes = classes.slice(int(rng.integers(len(classes))), 1)
        chunk, voxels, anchor = (classes.field(name).flatten().to_numpy() for name in ("chunk", "voxels", "anchor"))
        drawn = rng.choice(len(chunk), p=voxels / voxels.sum(dtype=np.float64))
        start = np.array(np.unravel_index(chunk[drawn], chunks_per_axis(shape))) * CHUNK
        return np.array(start + np.array(np.unravel_index(anchor[drawn], (CHUNK,) * 3)), dtype=np.int64)

    def _body_voxel(self, rng: np.random.Generator, row: int, shape: IntZYX) -> NDArray[np.int64]:
        chunks = unpack_body_chunks(self._store.index.column("body_chunks")[row].as_py(), shape)
        if not len(chunks):
            return np.array([rng.integers(0, n) for n in shape], dtype=np.int64)
        start = np.array(np.unravel_index(chunks[rng.integers(len(chunks))], chunks_per_axis(shape))) * CHUNK
        return np.minimum(start + rng.integers(0, CHUNK, 3), np.array(shape) - 1)


def _clamped(origin: NDArray[np.int64], shape: IntZYX, patch: IntZYX) -> IntZYX:
    """The origin moved so that the box lies in the volume; on an axis shorter than the patch, the volume is centred in the box."""
    return int_zyx(
        -((p - n) // 2) if n <= p else min(max(int(o), 0), n - p) for o, n, p in zip(origin, shape, patch, strict=True)
    )


def draw_augmentation(rng: np.random.Generator, augment: AugmentConfig) -> Augmentation:
    """Flips, quarter turns in the axial plane, then scale and shift of the intensity (released order, reference 1.1).

    A quarter turn is a transpose of y and x followed by a flip, so all turns and flips together are one transpose and one flip.
    """
    flip_x, flip_y, flip_z = (bool(rng.random() < augment.flip_probability) for _ in range(3))
    turned = rng.random() < augment.rot90_probability
    quarter_turns = int(rng.integers(1, 4)) if turned else 0
    scale = 1.0 + _symmetric(rng, augment.scale_probability, augment.scale_range)
    shift = _symmetric(rng, augment.shift_probability, augment.shift_range)
    transpose = quarter_turns % 2 == 1
    if transpose:
        flip_y, flip_x = flip_x, flip_y  # the flips came first: behind the transpose they act on the other axis
    if quarter_turns in (1, 2):
        flip_y = not flip_y  # numpy.rot90 once: transpose, then flip y
    if quarter_turns in (2, 3):
        flip_x = not flip_x
    return Augmentation(transpose, (flip_z, flip_y, flip_x), scale, shift)


def _symmetric(rng: np.random.Generator, probability: float, half_range: float) -> float:
    chance, value = rng.random(), rng.uniform(-half_range, half_range)  # always two draws: the stream never shifts
    return float(value) if chance < probability else 0.0
