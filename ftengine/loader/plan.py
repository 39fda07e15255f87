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
import threading
from collections import OrderedDict
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ftengine.config import AugmentConfig, Config
from ftengine.errors import ConfigError
from ftengine.geometry import Box, IntZYX
from ftengine.rng import Purpose, StreamReader, patch_rng
from ftengine.store.folds import rows_in
from ftengine.store.layout import CHUNK, chunks_per_axis
from ftengine.store.reader import Store
from ftengine.types import Augmentation, PatchRequest

Mix = Literal["annotated", "mixed"]
# Fixed numbers of the two streams: part of every result
_STREAM_ANNOTATED, _STREAM_ORGANS = 0, 1
_CHUNK_ZYX = (CHUNK, CHUNK, CHUNK)
_KEPT_ORDER_ENTRIES = 1 << 20  # of each stream: 8 MB


class _Stream:
    """Volumes of one kind, visited in a new random order every pass."""

    def __init__(self, number: int, rows: NDArray[np.int64]) -> None:
        self.number = number
        self.rows = rows
        # of the passes drawn last: most requests ask for one of them again
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._kept_orders = max(2, _KEPT_ORDER_ENTRIES // max(1, len(rows)))

    def row(self, seed: int, visit: int) -> int:
        """The row of the ``visit``-th patch of this stream, counted over all epochs."""
        turn, place = divmod(visit, len(self.rows))
        order = self._orders.get((seed, turn))
        if order is None:
            rng = patch_rng(seed, Purpose.CASE_ORDER, epoch=turn, index=self.number)
            order = self._orders[seed, turn] = self.rows[rng.permutation(len(self.rows))]
            while len(self._orders) > self._kept_orders:
                self._orders.popitem(last=False)
        return order.item(place)


class Plan:
    """Patch requests of a run; request (epoch, index) is a function of the seed and the index of the store alone."""

    def __init__(
        self, config: Config, store: Store, *, mix: Mix, split: str | None = None, held_out_fold: int | None = None
    ) -> None:
        """``mix``: "annotated" draws from tumour-annotated volumes only (baseline), "mixed" also from organ-labelled ones.

        ``split``: use only rows of this split; ``held_out_fold``: leave this fold out. Raises ConfigError where nothing is left to draw from.
        """
        self.config = config
        self._seed = config.seed
        self._store = store
        self._patch: IntZYX = config.region.patch_zyx
        self._positive_fraction = config.loader.positive_fraction
        self._class_balanced = config.loader.class_balanced
        self._local = threading.local()  # reader threads ask at the same time
        self._lists = store.rows.chunk_lists
        self._datasets, self._dataset_of = _encoded(store, "dataset")
        names, codes = _encoded(store, "annotation")
        annotation = np.array(names, dtype=str)[codes]
        shapes = store.column("shape_zyx").combine_chunks()
        self._shapes: NDArray[np.int32] = shapes.flatten().to_numpy().reshape(len(store), 3)
        used = rows_in(store.select(["split", "fold"]), split=split, held_out_fold=held_out_fold)
        self._annotated = annotation == "tumor"
        annotated = _Stream(_STREAM_ANNOTATED, np.flatnonzero(used & self._annotated))
        organs = _Stream(_STREAM_ORGANS, np.flatnonzero(used & (annotation == "organ")))
        fraction = 1.0 if mix == "annotated" else config.loader.annotated_fraction
        if mix == "mixed" and not len(organs.rows):
            fraction = 1.0
        if mix == "mixed" and not len(annotated.rows):
            fraction = 0.0
        self._annotated_share = Fraction(fraction).limit_denominator(10_000).as_integer_ratio()
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
        part, whole = self._annotated_share
        before, after = step * self.batch_size * part // whole, (step + 1) * self.batch_size * part // whole
        if slot < after - before:
            row = self._streams[True].row(self._seed, before + slot)
        else:
            organs_before = step * self.batch_size - before
            row = self._streams[False].row(self._seed, organs_before + slot - (after - before))
        rng = self._streams_of_thread().patch_rng(self._seed, Purpose.CROP_AND_AUGMENT, epoch=epoch, index=index)
        z, y, x = self._shapes[row].tolist()
        box = self._draw_box(rng, row, (z, y, x))
        augmentation = draw_augmentation(rng, self.config.augment)
        case, dataset = self._store.rows.case(row), self._datasets[self._dataset_of.item(row)]
        return PatchRequest(epoch, index, row, case, dataset, self._annotated.item(row), box, augmentation)

    def _streams_of_thread(self) -> StreamReader:
        try:
            reader: StreamReader = self._local.reader
        except AttributeError:
            reader = self._local.reader = StreamReader()
        return reader

    def _draw_box(self, rng: np.random.Generator, row: int, shape: IntZYX) -> Box:
        pz, py, px = self._patch
        anchor = self._labelled_voxel(rng, row, shape) if rng.random() < self._positive_fraction else None
        if anchor is None:
            cz, cy, cx = self._body_voxel(rng, row, shape)
            z, y, x = cz - pz // 2, cy - py // 2, cx - px // 2
        else:
            az, ay, ax = anchor
            cz, cy, cx = _inside(anchor, rng, shape)
            # the labelled voxel stays in the box
            z = min(max(cz - pz // 2, az - pz + 1), az)
            y = min(max(cy - py // 2, ay - py + 1), ay)
            x = min(max(cx - px // 2, ax - px + 1), ax)
        nz, ny, nx = shape
        return Box((_clamped(z, nz, pz), _clamped(y, ny, py), _clamped(x, nx, px)), self._patch)

    def _labelled_voxel(self, rng: np.random.Generator, row: int, shape: IntZYX) -> IntZYX | None:
        lists = self._lists.labelled(row)
        if lists is None:
            return None
        bounds = lists.bounds
        first, last = bounds[0], bounds[-1]
        if self._class_balanced:
            drawn_class = int(rng.integers(len(bounds) - 1))
            first, last = bounds[drawn_class], bounds[drawn_class + 1]
        # rng.choice(len(chunk), p=voxels / voxels.sum()), without its checks of p, and in one array
        cumulated = lists.voxels[first:last].astype(np.float64)
        cumulated /= np.add.reduce(cumulated)
        np.add.accumulate(cumulated, out=cumulated)
        cumulated /= cumulated[-1]
        drawn = first + int(cumulated.searchsorted(rng.random(), side="right"))
        z, y, x = _place(lists.chunk.item(drawn), chunks_per_axis(shape))
        in_z, in_y, in_x = _place(lists.anchor.item(drawn), _CHUNK_ZYX)
        return z * CHUNK + in_z, y * CHUNK + in_y, x * CHUNK + in_x

    def _body_voxel(self, rng: np.random.Generator, row: int, shape: IntZYX) -> IntZYX:
        grid = chunks_per_axis(shape)
        chunks = np.unpackbits(self._lists.body(row), count=grid[0] * grid[1] * grid[2]).nonzero()[0]
        if not len(chunks):
            z, y, x = (int(rng.integers(0, n)) for n in shape)
            return z, y, x
        z, y, x = _place(chunks.item(int(rng.integers(len(chunks)))), grid)
        return _inside((z * CHUNK, y * CHUNK, x * CHUNK), rng, shape)


def _encoded(store: Store, column: str) -> tuple[list[str], NDArray[np.int32]]:
    """The distinct values of a column of text, and which of them each row has."""
    encoded = store.column(column).combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _place(number: int, grid: IntZYX) -> IntZYX:
    """Index of the ``number``-th element of a grid in C order."""
    rest, x = divmod(number, grid[2])
    z, y = divmod(rest, grid[1])
    return z, y, x


def _inside(voxel: IntZYX, rng: np.random.Generator, shape: IntZYX) -> IntZYX:
    """A random voxel of the inner chunk that holds ``voxel``, in the volume."""
    (z, y, x), (nz, ny, nx) = voxel, shape
    # rng.integers(0, CHUNK, 3), which takes longer
    dz, dy, dx = int(rng.integers(0, CHUNK)), int(rng.integers(0, CHUNK)), int(rng.integers(0, CHUNK))
    return min(z - z % CHUNK + dz, nz - 1), min(y - y % CHUNK + dy, ny - 1), min(x - x % CHUNK + dx, nx - 1)


def _clamped(origin: int, length: int, patch: int) -> int:
    """The origin moved so that the patch lies in the volume; on an axis shorter than the patch, the volume is centred in it."""
    return -((patch - length) // 2) if length <= patch else min(max(origin, 0), length - patch)


def draw_augmentation(rng: np.random.Generator, augment: AugmentConfig) -> Augmentation:
    """Flips, quarter turns in the axial plane, then scale and shift of the intensity (released order, reference 1.1).

    A quarter turn is a transpose of y and x followed by a flip, so all turns and flips together are one transpose and one flip.
    """
    # drawn whether used or not: only a turn shifts the stream
    x, y, z, turn = rng.random(4).tolist()
    flip_x, flip_y, flip_z = x < augment.flip_probability, y < augment.flip_probability, z < augment.flip_probability
    quarter_turns = int(rng.integers(1, 4)) if turn < augment.rot90_probability else 0
    scaled, scale_at, shifted, shift_at = rng.random(4).tolist()
    scale = 1.0 + (_uniform(scale_at, augment.scale_range) if scaled < augment.scale_probability else 0.0)
    shift = _uniform(shift_at, augment.shift_range) if shifted < augment.shift_probability else 0.0
    transpose = quarter_turns % 2 == 1
    if transpose:
        flip_y, flip_x = flip_x, flip_y  # the flips came first: behind the transpose they act on the other axis
    if quarter_turns in (1, 2):
        flip_y = not flip_y  # numpy.rot90 once: transpose, then flip y
    if quarter_turns in (2, 3):
        flip_x = not flip_x
    return Augmentation(transpose, (flip_z, flip_y, flip_x), scale, shift)


def _uniform(drawn: float, half_range: float) -> float:
    """``rng.uniform(-half_range, half_range)`` of a number drawn from [0, 1)."""
    return -half_range + (half_range + half_range) * drawn
