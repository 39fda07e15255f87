"""Read boxes of volumes from a store: ``store.shard`` where they lie in a folder, else tensorstore; every chunk checked against its CRC."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from ftengine.errors import ConfigError, StoreError
from ftengine.geometry import Box, FloatZYX, Grid, IntZYX, float_zyx, int_zyx
from ftengine.store import layout
from ftengine.store.location import LocalLocation, Location, locate
from ftengine.store.rows import Rows
from ftengine.types import Patch

if TYPE_CHECKING:
    from ftengine.store.shard import LocalShards

MAX_OPEN_ARRAYS = 512  # open arrays hold metadata and a file path only, no descriptor
Allocate: TypeAlias = Callable[[IntZYX, type[Any]], NDArray[Any]]  # an array whose contents do not matter


def open_store(place: str | Path | Location) -> "Store":
    """Open a store for reading: a folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``. Raises StoreError where it is missing, of an unknown format version, or damaged."""
    return Store(place)


class Store:
    """A store of one region and spacing, opened for reading; safe to use from many threads."""

    def __init__(self, place: str | Path | Location) -> None:
        self.location = locate(place)
        attributes = _read_attributes(self.location)
        self.volumes = _volumes_of(self.location, attributes)  # another store where this one is a subset
        self.region: str = attributes["region"]
        self.spacing_mm_zyx: FloatZYX = float_zyx(attributes["spacing_mm_zyx"])
        self.labels: dict[str, int] = dict(attributes["labels"])
        self.organs: dict[str, dict[str, int]] = dict(attributes["organs"])
        self.window_hu: tuple[float, float] = (attributes["window_hu"][0], attributes["window_hu"][1])
        self.created_by: str = attributes["created_by"]
        self.rows = Rows(self.location)
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<Store {self.location} region={self.region} volumes={len(self)}>"

    @property
    def path(self) -> Path:
        """The folder of a local store; ConfigError for one in a bucket."""
        if not isinstance(self.location, LocalLocation):
            raise ConfigError(f"{self.location}: lies in a bucket; want a local store for this.")
        return self.location.path

    @property
    def index(self) -> Any:
        """All columns of all rows as a ``pyarrow.Table``. Of a large store, ask ``column`` for those you need."""
        return self.rows.table

    def column(self, name: str) -> Any:
        """One column of the index as a ``pyarrow.ChunkedArray``, in the order of ``cases``."""
        return self.rows.column(name)

    def select(self, names: Sequence[str]) -> Any:
        """Some columns of the index as a ``pyarrow.Table``."""
        return self.rows.select(names)

    @cached_property
    def cases(self) -> list[str]:
        """The names of all volumes, sorted."""
        cases: list[str] = self.rows.cases.to_pylist()
        return cases

    @property
    def tumor_values(self) -> tuple[int, ...]:
        """Label values of all tumour classes, ascending."""
        return tuple(sorted(organ["tumor"] for organ in self.organs.values()))

    def row_number(self, case: str) -> int:
        """The row of a case in ``index``; StoreError for a case that is not there."""
        row = self.rows.number(case)
        if row is None:
            raise StoreError(
                f"{self.location}: holds no case {case!r}; 'ftengine store info {self.location} --cases' lists them."
            )
        return row

    def row(self, case: str) -> dict[str, Any]:
        """The index row of a case."""
        return self.rows.row(self.row_number(case))

    def shape_zyx(self, case: str) -> IntZYX:
        """Voxels of the stored volume."""
        return int_zyx(self.column("shape_zyx")[self.row_number(case)].as_py())

    def grid(self, case: str) -> Grid:
        """Where the stored volume lies in the patient."""
        return Grid(self.shape_zyx(case), tuple(self.column("affine_ras")[self.row_number(case)].as_py()))

    def native_grid(self, case: str) -> Grid:
        """The grid of the file that was converted, in its own axis order."""
        row = self.row_number(case)
        shape = int_zyx(self.column("native_shape_zyx")[row].as_py())
        return Grid(shape, tuple(self.column("native_affine_ras")[row].as_py()))

    def has_label(self, case: str) -> bool:
        """Whether the case was converted with a label file."""
        return bool(self.column("annotation")[self.row_number(case)].as_py() != "none")

    def read(self, case: str, origin_zyx: IntZYX, shape_zyx: IntZYX) -> Patch:
        """Read a box: image int16 HU and label uint8 [z, y, x]; outside the volume -1024 and 0, label 0 for a case without one.

        Both arrays are fetched at the same time. Raises StoreError naming the volume when a chunk is missing, fails its checksum
        or does not fit the index. ``AsyncReads`` does the same for many boxes ahead.
        """
        cut = self.cut(case, Box(int_zyx(origin_zyx), int_zyx(shape_zyx)))
        patch = self.read_here(cut)
        if patch is not None:
            return patch
        try:
            pending = [self._array(case, name, cut.volume_shape_zyx)[cut.source].read(order="C") for name in cut.arrays]
            return cut.filled([future.result() for future in pending])
        except (ValueError, OSError) as error:
            raise self.damaged(case, error) from error

    @cached_property
    def shards(self) -> "LocalShards | None":
        """The fast way to the voxels, where the volumes lie in a folder and this machine allows it."""
        if not isinstance(self.volumes, LocalLocation):
            return None
        from ftengine.store.shard import LocalShards  # brings numba, which only reading needs

        return LocalShards.below(self.volumes.path)

    def read_here(self, cut: "Cut", allocate: Allocate = np.empty) -> Patch | None:
        """The patch by the fast way; None where tensorstore must read it: in a bucket, damaged, or not as our writer leaves it."""
        if self.shards is None:
            return None
        image, label = cut.empty(allocate)
        place = cut.inside.moved(cut.box.origin_zyx).origin_zyx
        for name, out in zip(cut.arrays, (image, label), strict=False):
            if not self.shards.read(cut.case, name, cut.volume_shape_zyx, cut.inside, out, place):
                return None
        return Patch(cut.case, cut.box, image, label)

    def cut(self, case: str, box: Box) -> "Cut":
        """Which voxels of which arrays a box of a case takes. Raises StoreError for an unknown case, ConfigError for a box without voxels."""
        row = self.row_number(case)
        if min(box.shape_zyx) < 1:
            raise ConfigError(f"{case}: shape_zyx={box.shape_zyx}; want at least one voxel on each axis.")
        volume_shape = int_zyx(self.column("shape_zyx")[row].as_py())
        inside = box.inside(volume_shape)
        arrays: tuple[str, ...] = ()
        if min(inside.shape_zyx) > 0:
            arrays = ("0", "labels/seg/0") if self.column("annotation")[row].as_py() != "none" else ("0",)
        return Cut(case, box, volume_shape, inside, arrays)

    def read_volume(self, case: str) -> Patch:
        """Read a whole volume as one patch."""
        return self.read(case, (0, 0, 0), self.shape_zyx(case))

    def spec(self, case: str, name: str) -> dict[str, Any]:
        """tensorstore's description of an array of a volume: "0", the image, or "labels/seg/0"."""
        return {
            "driver": "zarr3",
            "kvstore": self.volumes.kvstore(f"{layout.volume_path(case)}/{name}"),
            "fill_missing_data_reads": False,  # a missing chunk is an error, not air
        }

    def check_shape(self, case: str, name: str, found_zyx: Sequence[int], volume_shape_zyx: IntZYX) -> None:
        """StoreError where an array has another shape than its row says."""
        if tuple(found_zyx) != volume_shape_zyx:
            raise StoreError(
                f"{self.volumes.child(f'{layout.volume_path(case)}/{name}')}: shape_zyx is {tuple(found_zyx)}, the index says {volume_shape_zyx}. "
                "Convert this case again."
            )

    def damaged(self, case: str, error: Exception) -> StoreError:
        """What to tell of a volume that tensorstore could not read."""
        what = " ".join(str(error).split("[source locations", maxsplit=1)[0].split())
        return StoreError(
            f"{self.volumes.child(layout.volume_path(case))}: a chunk is missing or damaged ({what[:300]}). Convert this case again."
        )

    def _array(self, case: str, name: str, shape_zyx: IntZYX) -> Any:
        key = f"{layout.volume_path(case)}/{name}"
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        array = ts.open(self.spec(case, name), open=True, read=True, context=self._context).result()
        self.check_shape(case, name, array.shape, shape_zyx)
        with self._lock:
            self._open[key] = array
            while len(self._open) > MAX_OPEN_ARRAYS:
                self._open.popitem(last=False)
        return array


@dataclass(frozen=True)
class Cut:
    """The part of a volume that a box takes: ``arrays`` to read at ``source``; none where the box lies outside the volume."""

    case: str
    box: Box
    volume_shape_zyx: IntZYX
    inside: Box
    arrays: tuple[str, ...]

    @property
    def source(self) -> tuple[slice, ...]:
        """Where to read in each array."""
        return self.inside.slices()

    def empty(self, allocate: Allocate) -> tuple[NDArray[Any], NDArray[Any]]:
        """Image and label of the box: -1024 HU and 0 where nothing will be read, anything elsewhere."""
        image, label = allocate(self.box.shape_zyx, np.int16), allocate(self.box.shape_zyx, np.uint8)
        for number, (out, fill) in enumerate(((image, layout.AIR_HU), (label, 0))):
            if number >= len(self.arrays) or self.inside != self.box:
                out[...] = fill
        return image, label

    def filled(self, voxels: Sequence[NDArray[Any]], allocate: Allocate = np.empty) -> Patch:
        """The patch made of what was read from ``arrays``, in memory of its own."""
        image, label = self.empty(allocate)
        place = self.inside.moved(self.box.origin_zyx).slices() if self.arrays else ()
        for out, read in zip((image, label), voxels, strict=False):
            out[place] = read
        return Patch(self.case, self.box, image, label)


def _volumes_of(location: Location, attributes: Mapping[str, Any]) -> Location:
    """Where a store's voxels lie: with it, or with the store that ``volumes_of`` names (relative to it, absolute, or a URL).

    Raises StoreError where that store is missing, is a subset itself, or holds another region, spacing or label table.
    """
    named = attributes.get("volumes_of")
    if named is None:
        return location
    parent = location.relative(named)
    if not parent.exists("zarr.json"):
        raise StoreError(
            f"{location}: is a subset of {parent}, where there is no store. Move that store back, or make the subset again with "
            "'ftengine store subset' where the store lies now."
        )
    of_parent = _read_attributes(parent)
    keys = ("region", "spacing_mm_zyx", "labels")
    if of_parent.get("volumes_of") is not None or any(of_parent[key] != attributes[key] for key in keys):
        raise StoreError(
            f"{location}: is a subset of {parent}, which holds other volumes now (region, spacing or labels differ, or it is a subset itself). "
            "Make the subset again with 'ftengine store subset'."
        )
    return parent


def _read_attributes(location: Location) -> dict[str, Any]:
    try:
        content = location.read_bytes("zarr.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{location}: is not a store (no zarr.json). Make one with 'ftengine convert SRC {location}'."
        ) from error
    file = location.child("zarr.json")
    try:
        attributes: dict[str, Any] = json.loads(content)["attributes"]["ftengine"]
        version = attributes["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file}: is not an ftengine store (attributes.ftengine.format cannot be read). Make one with 'ftengine convert'."
        ) from error
    if version != layout.FORMAT:
        raise StoreError(
            f"{location}: has store format {version!r}; this version of ftengine reads format {layout.FORMAT}. Use the ftengine that wrote it, or convert again."
        )
    missing = [
        key
        for key in ("region", "spacing_mm_zyx", "labels", "organs", "window_hu", "created_by")
        if key not in attributes
    ]
    if missing:
        raise StoreError(f"{file}: attributes.ftengine lacks {missing}. The store is damaged: convert again.")
    return attributes
