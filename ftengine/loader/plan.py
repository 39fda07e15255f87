"""Which case and which box: from the index alone, as a function of (seed, epoch, index).

Law of the sampling. ``annotated_fraction`` of all slots, spread evenly over the steps, come from tumour-annotated volumes, the rest
from volumes with organ labels only (None: as ``dataset_weights`` say); each of the two streams goes through its volumes in a new random
order every pass, a volume ``dataset_weights`` times on average. A patch is positive with ``positive_fraction``: an inner chunk is drawn
in proportion to its labelled voxels (any label above 0; with ``class_balanced``, of one class that is drawn first, so that small tumours
are met as often as the organ around them), the centre uniformly inside that chunk, and the box is moved so that one labelled voxel of
the chunk, fixed at conversion, lies inside. So a positive patch always holds labelled tissue, as with MONAI's
``RandCropByPosNegLabel``, without reading a label. Other patches are centred in a chunk that holds background of the body. Boxes are
clamped into the volume; a volume smaller than the patch is centred in it.

``crops_per_read`` = k: the patches at one place of k batches in a row share the volume, the drawn voxel and one read, which is an inner
chunk longer than the patch on each axis and begins at a chunk, so that it costs hardly more than a patch that lies anywhere; each takes
its own crop of it. Ranks: the batches of one step on all ranks are one large batch, which is dealt out patch by patch.
"""

import json
import math
import threading
from collections import OrderedDict
from fractions import Fraction
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ftengine.config import AugmentConfig, Config, LoaderConfig
from ftengine.errors import ConfigError
from ftengine.geometry import Box, IntZYX, int_zyx
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
    """Volumes of one kind, visited in a new random order every pass, each as often as its weight says on average."""

    def __init__(self, number: int, rows: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        self.number = number
        self.rows = rows[weights > 0]
        self._weights = None if (weights == 1).all() else weights[weights > 0]
        self.pass_length = len(self.rows) if self._weights is None else round(float(self._weights.sum()))
        if self._weights is not None and len(self.rows):
            self.pass_length = max(1, self.pass_length)
        # of the passes drawn last: most requests ask for one of them again
        self._orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._kept_orders = max(2, _KEPT_ORDER_ENTRIES // max(1, self.pass_length))

    def row(self, seed: int, visit: int) -> int:
        """The row of the ``visit``-th patch of this stream, counted over all epochs."""
        turn, place = divmod(visit, self.pass_length)
        order = self._orders.get((seed, turn))
        if order is None:
            rng = patch_rng(seed, Purpose.CASE_ORDER, epoch=turn, index=self.number)
            rows = self.rows if self._weights is None else self.rows.repeat(self._num_visits(rng))
            order = self._orders[seed, turn] = rows[rng.permutation(len(rows))]
            while len(self._orders) > self._kept_orders:
                self._orders.popitem(last=False)
        return order.item(place)

    def _num_visits(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """How often each row comes in a pass: its weight, rounded up or down so that a pass has its length (systematic sampling)."""
        assert self._weights is not None  # noqa: S101 - asked by row() only then
        upto = np.cumsum(self._weights) * (self.pass_length / self._weights.sum())
        upto[-1] = self.pass_length
        return np.diff(np.floor(upto + rng.random()).astype(np.int64), prepend=0)


class Plan:
    """Patch requests of a run; request (epoch, index) is a function of the seed and the index of the store alone."""

    def __init__(
        self,
        config: Config,
        store: Store,
        *,
        mix: Mix,
        split: str | None = None,
        fold: int | None = None,
        held_out_fold: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``mix``: "annotated" draws from tumour-annotated volumes only (baseline), "mixed" also from organ-labelled ones.

        ``split``, ``fold``: use only rows of this split, of this fold; ``held_out_fold``: leave this fold out. ``rank`` of ``world_size`` processes: which part of
        each step's patches ``batch`` gives. Raises ConfigError where nothing is left to draw from, a data set of ``dataset_weights`` is
        not in the store, a class never occurs, every volume is too small and that is refused, or there are more ranks than volumes.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}, world_size={world_size}: want 0 <= rank < world_size.")
        self.config = config
        self.rank, self.world_size = rank, world_size
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
        used = rows_in(store.select(["split", "fold"]), split=split, fold=fold, held_out_fold=held_out_fold)
        self._annotated = annotation == "tumor"
        weights = self._weights_of_rows()
        annotated, organs = (
            _Stream(number, np.flatnonzero(used & kind), weights[used & kind])
            for number, kind in (
                (_STREAM_ANNOTATED, self._annotated),
                (_STREAM_ORGANS, annotation == "organ"),
            )
        )
        fraction = 1.0 if mix == "annotated" else config.loader.annotated_fraction
        if fraction is None:
            fraction = annotated.pass_length / max(1, annotated.pass_length + organs.pass_length)
        if mix == "mixed" and not len(organs.rows):
            fraction = 1.0
        if mix == "mixed" and not len(annotated.rows):
            fraction = 0.0
        self._annotated_share = Fraction(fraction).limit_denominator(10_000).as_integer_ratio()
        self._streams = {True: annotated, False: organs}
        used_streams = [stream for kind, stream in self._streams.items() if fraction != (0.0 if kind else 1.0)]
        if any(not len(stream.rows) for stream in used_streams):
            kinds = {k: int((used & (annotation == k) & (weights > 0)).sum()) for k in ("tumor", "organ", "none")}
            where = f" in split {split!r}" if split is not None else ""
            where += f" in fold {fold}" if fold is not None else ""
            where += f" outside fold {held_out_fold}" if held_out_fold is not None else ""
            where += " with a weight above 0 in loader.dataset_weights" if config.loader.dataset_weights else ""
            raise ConfigError(
                f"{store.location}: no volume{where} to draw from (tumours annotated: {kinds['tumor']}, organs only: {kinds['organ']}, no label: "
                f"{kinds['none']}); this run needs tumour-annotated volumes. Convert labelled cases, or mark tumour-free ones with "
                "'ftengine convert --annotated tumor'."
            )
        rows = np.concatenate([stream.rows for stream in used_streams])
        self.batch_size = config.training.batch_size
        self.num_volumes = len(rows)
        if world_size > self.num_volumes:
            raise ConfigError(
                f"{store.location}: {self.num_volumes} volumes to draw from and {world_size} ranks; want at least one volume a rank. "
                "Start fewer processes."
            )
        patches = config.loader.patches_per_epoch or sum(stream.pass_length for stream in used_streams)
        self.batches_per_epoch = max(1, math.ceil(patches / (self.batch_size * world_size)))
        self.crops_per_read = config.loader.crops_per_read
        self._reads_per_epoch = -(-self.batches_per_epoch // self.crops_per_read)
        self.labelled_tumors: tuple[str, ...] = ()  # tumour classes that some volume of the run holds
        self.notes = (*self._check_sizes(rows), *self._check_classes(rows))

    def batch(self, epoch: int, step: int) -> list[PatchRequest]:
        """The requests of this rank's batch ``step`` of ``epoch``."""
        if not 0 <= step < self.batches_per_epoch:
            raise ConfigError(f"step={step}: want 0 to {self.batches_per_epoch - 1}, the batches of an epoch.")
        first = step * self.batch_size * self.world_size + self.rank
        return [self.request(epoch, first + slot * self.world_size) for slot in range(self.batch_size)]

    def request(self, epoch: int, index: int, *, attempt: int = 0) -> PatchRequest:
        """The request of patch ``index`` of ``epoch``, counted over all ranks.

        ``attempt`` above 0: another volume of the same kind in place of one that could not be read.
        """
        together = self.batch_size * self.world_size
        step, slot = divmod(index, together)
        block, crop = divmod(step, self.crops_per_read)
        number = block + epoch * self._reads_per_epoch
        # slots of annotated volumes up to and with this step: the share is kept over steps, whatever the batch size
        part, whole = self._annotated_share
        before, after = number * together * part // whole, (number + 1) * together * part // whole
        is_annotated = slot < after - before
        stream = self._streams[is_annotated]
        first_index = index - crop * together  # of the patches that share the read
        if attempt:
            rng = patch_rng(self._seed, Purpose.CASE_ORDER, epoch=epoch, index=first_index, draw=attempt)
            row = stream.rows.item(int(rng.integers(len(stream.rows))))
        elif is_annotated:
            row = stream.row(self._seed, before + slot)
        else:
            row = stream.row(self._seed, number * together - before + slot - (after - before))
        draws = self._streams_of_thread()
        rng = draws.patch_rng(self._seed, Purpose.CROP_AND_AUGMENT, epoch=epoch, index=first_index, draw=2 * attempt)
        z, y, x = self._shapes[row].tolist()
        box, anchor = self._draw_box(rng, row, (z, y, x))
        read = box
        if self.crops_per_read > 1:
            read = _whole_chunks(box, (z, y, x))
            rng = draws.patch_rng(self._seed, Purpose.CROP_AND_AUGMENT, epoch=epoch, index=index, draw=2 * attempt + 1)
            box = _crop_of(rng, read, self._patch, (z, y, x), anchor)
        augmentation = draw_augmentation(rng, self.config.augment)
        case, dataset = self._store.rows.case(row), self._datasets[self._dataset_of.item(row)]
        return PatchRequest(epoch, index, row, case, dataset, self._annotated.item(row), box, augmentation, read)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the batches beside the code: of a resumed run it must be the same. Plain JSON values."""
        config = self.config
        law = {
            "loader": config.loader.model_dump(mode="json", exclude={*LoaderConfig.SPEED_ONLY}),
            "augment": config.augment.model_dump(mode="json"),
        }
        return {
            "seed": config.seed,
            "volumes": self.num_volumes,
            "cases": crc32("\n".join(self._store.cases).encode()),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "batches_per_epoch": self.batches_per_epoch,
            "patch_zyx": list(config.region.patch_zyx),
            "loader and augment sections": crc32(json.dumps(law, sort_keys=True).encode()),
        }

    def _weights_of_rows(self) -> NDArray[np.float64]:
        given = self.config.loader.dataset_weights
        unknown = set(given) - set(self._datasets)
        if unknown:
            raise ConfigError(
                f"loader.dataset_weights names {sorted(unknown)}; {self._store.location} holds {', '.join(sorted(self._datasets))}. "
                "Take the others out, or convert them into this store."
            )
        return np.array([given.get(name, 1.0) for name in self._datasets], dtype=np.float64)[self._dataset_of]

    def _check_sizes(self, rows: NDArray[np.int64]) -> list[str]:
        """Refuses, or notes, volumes that are smaller than the patch."""
        small = (self._shapes[rows] < self._patch).any(axis=1)
        if not small.any():
            return []
        what = f"{int(small.sum())} of {len(rows)} volumes are smaller than the patch {self._patch} on some axis"
        if self.config.loader.small_volumes == "refuse":
            example = self._store.rows.case(rows[small].item(0))
            raise ConfigError(
                f"{self._store.location}: {what}, the first is {example} with {tuple(self._shapes[rows[small][0]].tolist())} voxels. "
                "Lower region.patch_zyx, or pad them with loader.small_volumes=pad."
            )
        return [f"{what}: centred in it, with -1024 HU around (loader.small_volumes=refuse would stop here)"]

    def _check_classes(self, rows: NDArray[np.int64]) -> list[str]:
        """Refuses, or notes, classes of the label table that no volume holds, nor could be painted."""
        column = self._store.column("class_voxels").combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        class_of = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        chosen = np.zeros(len(lengths), dtype=bool)
        chosen[rows] = True
        region = self.config.region
        present = set(class_of[(values > 0) & np.repeat(chosen, lengths)].tolist())
        self.labelled_tumors = tuple(name for name, v in region.labels.items() if v in {*region.tumor_values} & present)
        paintable = {o.tumor for o in region.organs.values() if o.organ in present}
        absent = [name for name, value in region.labels.items() if value and value not in present | paintable]
        if not absent:
            return []
        what = f"no volume of this run holds a voxel of {', '.join(absent)}"
        if self.config.loader.absent_classes == "refuse":
            raise ConfigError(
                f"{self._store.location}: {what}, and the network would learn that there is none. Convert labels of these classes, choose a "
                "region without them, or set loader.absent_classes=allow."
            )
        return [f"{what} (loader.absent_classes=allow)"]

    def _streams_of_thread(self) -> StreamReader:
        try:
            reader: StreamReader = self._local.reader
        except AttributeError:
            reader = self._local.reader = StreamReader()
        return reader

    def _draw_box(self, rng: np.random.Generator, row: int, shape: IntZYX) -> tuple[Box, IntZYX | None]:
        """The box of a patch, and the labelled voxel that it must hold."""
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
        return Box((_clamped(z, nz, pz), _clamped(y, ny, py), _clamped(x, nx, px)), self._patch), anchor

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


def _whole_chunks(box: Box, shape: IntZYX) -> Box:
    """The inner chunks that a box of this size, in a volume of ``shape``, touches where it lies worst, from where this box begins."""
    origin, size = list(box.origin_zyx), list(box.shape_zyx)
    for axis in range(3):
        if shape[axis] > size[axis]:
            origin[axis] -= origin[axis] % CHUNK
            size[axis] += CHUNK
    return Box(int_zyx(origin), int_zyx(size))


def _crop_of(rng: np.random.Generator, read: Box, patch: IntZYX, shape: IntZYX, anchor: IntZYX | None) -> Box:
    """A patch somewhere in what is read, in the volume, with the anchor inside."""
    origin = []
    for axis in range(3):
        first, last = read.origin_zyx[axis], read.origin_zyx[axis] + read.shape_zyx[axis] - patch[axis]
        if shape[axis] > patch[axis]:
            last = min(last, shape[axis] - patch[axis])
        if anchor is not None:
            first, last = max(first, anchor[axis] - patch[axis] + 1), min(last, anchor[axis])
        origin.append(int(rng.integers(first, last + 1)))
    return Box(int_zyx(origin), patch)


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
