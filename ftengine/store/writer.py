"""Write volumes into a store of format 1: data first, made durable, then the row that commits them."""

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.config import RegionConfig
from ftengine.errors import CaseError, ConfigError, FailureCode, StoreError
from ftengine.geometry import FloatZYX, Grid
from ftengine.store import index, layout
from ftengine.store.location import Location, locate
from ftengine.store.reader import open_store
from ftengine.store.rows import Rows
from ftengine.volume.lesions import find_lesions

_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Provenance:
    """Where a volume came from: names below the converted folder and hashes, never header text."""

    source: str
    source_sha256: str
    label_source: str = ""
    label_sha256: str = ""
    organ_label_source: str = ""
    organ_label_sha256: str = ""
    label_provenance: str = ""  # JSON: what made a pseudo label
    source_stat: str = ""
    annotation: str = (
        "auto"  # auto: tumor where a tumour voxel is found, organ where there is a label, none without one
    )
    split: str = ""
    conversion: str = ""  # JSON of the conversion's options
    notes: tuple[str, ...] = ()


def create_store(place: str | Path | Location, region: RegionConfig) -> Location:
    """Make an empty store, or check that an existing one has this region, spacing and label table. Returns where it lies."""
    location = locate(place)
    if location.exists("zarr.json"):
        store = open_store(location)
        if store.volumes is not store.location:
            raise ConfigError(
                f"{location}: is a subset of {store.volumes} and holds no volumes of its own; convert into that store and make the subset again."
            )
        have = (store.region, store.spacing_mm_zyx, store.labels)
        want = (region.name, region.spacing_mm_zyx, region.labels)
        if have != want:
            raise ConfigError(
                f"{location}: holds region {have[0]} at {have[1]} mm with labels {have[2]}; this conversion is for {want[0]} at {want[1]} mm "
                f"with labels {want[2]}. A store has one region and spacing: choose another STORE or --region."
            )
        return location
    if not location.is_empty():
        raise StoreError(
            f"{location}: exists, is not empty and is not a store (no zarr.json). Choose a new or empty folder."
        )
    attributes = {"ftengine": layout.store_attributes(region, created_by=f"ftengine {__version__}")}
    location.write_bytes("volumes/zarr.json", layout.group_document())
    location.write_bytes("zarr.json", layout.group_document(attributes))  # last: with it the store exists
    return location


def write_volume(
    place: str | Path | Location,
    case: str,
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8] | None,
    grid: Grid,
    native: Grid,
    region: RegionConfig,
    provenance: Provenance,
    *,
    committed: Collection[str] | None = None,
) -> dict[str, Any]:
    """Write one volume and commit it; returns its index row.

    image_hu, label: [z, y, x] on ``grid``, RAS+, at the region's spacing. The volume is built in a scratch folder and published whole;
    an existing one of that name is withdrawn from the index first, so that a reader never meets a row whose data are half written. If
    anything fails, nothing of the volume stays. committed: the cases that the store holds, where the caller knows them (it must have
    asked ``CaseNames`` too); None reads the index. Raises CaseError for a case inside another one.
    """
    location = locate(place)
    layout.check_case_name(case)
    if committed is None:
        names = CaseNames(Rows(location).cases.to_pylist())
        names.refuse_nested(case, location)
        committed = names.cases
    folder = location.scratch()
    try:
        _build(folder, case, image_hu, label, region)
        row = _row(case, folder, image_hu, label, grid, native, region, provenance)
        # a row file: left by a worker that died behind its commit
        if case in committed or index.has_row_file(location, case):
            index.withdraw_case(location, case)
        try:
            _publish_parent_groups(location, case)
            location.publish(folder, layout.volume_path(case))
            index.append_row(location, row)
        except BaseException:  # also Ctrl-C: neither a volume without a row nor a row without its volume
            index.withdraw_row(location, case)
            location.delete_tree(layout.volume_path(case))
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


class CaseNames:
    """The cases of a store, to find one that would lie inside another, or around it: a volume's folder is replaced whole."""

    def __init__(self, cases: Iterable[str]) -> None:
        self.cases = set(cases)
        self._folders = {folder: case for case in self.cases for folder in _folders_above(case)}

    def refuse_nested(self, case: str, store: Location) -> None:
        """Raise CaseError, naming both, for a case inside or around one of these."""
        other = next((f for f in _folders_above(case) if f in self.cases), None) or self._folders.get(case)
        if other is not None:
            raise CaseError(
                f"case {case!r} and {other!r} of {store} lie inside one another.",
                "Rename one, or convert it under another --dataset.",
                code=FailureCode.NESTED_NAMES,
            )


def _folders_above(case: str) -> list[str]:
    parts = case.split("/")
    return ["/".join(parts[:length]) for length in range(2, len(parts))]


def _build(
    folder: Path, case: str, image_hu: NDArray[np.int16], label: NDArray[np.uint8] | None, region: RegionConfig
) -> None:
    """An OME-Zarr image in ``folder``."""
    attributes = layout.image_attributes(case, region.spacing_mm_zyx, region.window_hu)
    _write_group(folder, attributes)
    _write_array(folder / "0", image_hu, layout.AIR_HU, layout.IMAGE_CODEC)
    if label is not None:
        build_label(folder / "labels", label, region.spacing_mm_zyx, region.labels)


def build_label(folder: Path, label: NDArray[np.uint8], spacing_mm_zyx: FloatZYX, labels: Mapping[str, int]) -> None:
    """The group ``labels`` of an OME-Zarr image, with the label image ``seg`` in it, in ``folder``. label: [z, y, x]."""
    _write_group(folder, {"version": "0.5", "labels": ["seg"]})
    _write_group(folder / "seg", layout.label_attributes(spacing_mm_zyx, dict(labels)))
    _write_array(folder / "seg/0", label, 0, layout.LABEL_CODEC)


def _publish_parent_groups(location: Location, case: str) -> None:
    """Zarr v3 has no implicit groups: viewers list a dataset's volumes only if every folder on the way is a group."""
    parts = layout.volume_path(case).split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        key = "/".join((*parts[:depth], "zarr.json"))
        if not location.exists(key):
            location.write_bytes(key, layout.group_document())


def _write_group(folder: Path, ome: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zarr.json").write_bytes(layout.group_document({"ome": ome}))


def _write_array(folder: Path, data: NDArray[Any], fill: int, codec: Mapping[str, Any]) -> None:
    """An array in ``folder``; the voxels by tensorstore (zarr-python takes half a millisecond more for each of many hundred chunks)."""
    folder.mkdir()
    shape = (data.shape[0], data.shape[1], data.shape[2])
    (folder / "zarr.json").write_bytes(layout.array_document(shape, data.dtype.name, fill, codec))
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "store_data_equal_to_fill_value": True,  # otherwise a lost shard reads as air, in silence
    }
    ts.open(spec, open=True, write=True, context=_CONTEXT).result().write(data).result()


def _row(
    case: str,
    folder: Path,
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8] | None,
    grid: Grid,
    native: Grid,
    region: RegionConfig,
    provenance: Provenance,
) -> dict[str, Any]:
    columns = label_columns(
        case,
        image_hu,
        label,
        num_classes=region.num_classes,
        tumor_values=region.tumor_values,
        spacing_mm_zyx=region.spacing_mm_zyx,
        low_hu=region.window_hu[0],
    )
    annotation = provenance.annotation
    if annotation == "auto":
        annotation = "none" if label is None else "tumor" if columns["num_tumors"] else "organ"
    return {
        "case": case,
        "dataset": case.split("/", maxsplit=1)[0],
        "path": layout.volume_path(case),
        "shape_zyx": list(image_hu.shape),
        "spacing_mm_zyx": list(region.spacing_mm_zyx),
        "affine_ras": list(grid.affine_ras),
        "source": provenance.source,
        "source_sha256": provenance.source_sha256,
        "label_source": provenance.label_source,
        "label_sha256": provenance.label_sha256,
        "organ_label_source": provenance.organ_label_source,
        "organ_label_sha256": provenance.organ_label_sha256,
        "label_provenance": provenance.label_provenance,
        "source_stat": provenance.source_stat,
        "native_shape_zyx": list(native.shape_zyx),
        "native_affine_ras": list(native.affine_ras),
        "region": region.name,
        "annotation": annotation,
        "split": provenance.split,
        "fold": -1,
        **columns,
        "hu_percentiles": index.hu_percentiles(image_hu).tolist(),
        "stored_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "conversion": provenance.conversion,
        "notes": list(provenance.notes),
        "engine_version": __version__,
    }


def label_columns(
    case: str,
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8] | None,
    *,
    num_classes: int,
    tumor_values: Sequence[int],
    spacing_mm_zyx: FloatZYX,
    low_hu: float,
) -> dict[str, Any]:
    """The columns of a row that follow from its label. image_hu, label: [z, y, x], RAS+; low_hu: the low end of the region's window."""
    lesions = [] if label is None else find_lesions(label, tuple(tumor_values), spacing_mm_zyx)
    located = {} if label is None else index.locate_classes(label, case)
    class_voxels = [0] * max([num_classes, *(value + 1 for value in located)])
    for value, where in located.items():
        class_voxels[value] = int(where.voxels.sum(dtype=np.int64))
    if label is not None:
        class_voxels[0] = label.size - sum(class_voxels)
    return {
        "class_voxels": class_voxels,
        "class_chunks": [
            {"value": value, "chunk": where.chunk, "voxels": where.voxels, "anchor": where.anchor}
            for value, where in located.items()
        ],
        "body_chunks": np.packbits(index.body_chunks(image_hu, label, low_hu)).tobytes(),
        "num_tumors": len(lesions),
        "tumor_values": [lesion.value for lesion in lesions],
        "tumor_diameters_mm": [lesion.diameter_mm for lesion in lesions],
    }
