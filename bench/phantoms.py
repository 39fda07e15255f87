"""Stores and files of phantoms that the loader's programs measure on. Phantoms show no patient and prove nothing about real CT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftengine.config import RegionConfig
from ftengine.geometry import IntZYX


def write_store(
    folder: Path, region: RegionConfig, shapes_zyx: Sequence[IntZYX], *, with_tumors: bool | None = None
) -> Path:
    """A store of abdomen phantoms at the region's spacing; one that is there already is kept as it is.

    with_tumors: in all volumes, in none, or (None) in every second one, beginning with the first. Returns ``folder``.
    """
    if (folder / "index.parquet").exists():
        return folder
    from ftengine.store import index
    from ftengine.store.writer import Provenance, create_store, write_volume

    root = create_store(folder, region)
    for case, shape in enumerate(shapes_zyx):
        phantom = draw(case, shape, region, with_tumors=case % 2 == 0 if with_tumors is None else with_tumors)
        write_volume(
            root, f"b/{case}", phantom.image_hu, phantom.label, phantom.grid, phantom.grid, region, Provenance("b", "")
        )
    index.compact_index(root)
    return folder


def draw(case: int, shape_zyx: IntZYX, region: RegionConfig, *, with_tumors: bool) -> Any:
    """One abdomen phantom whose label holds the region's values alone."""
    # a machine that only trains on a store that was made elsewhere need not have what drawing wants
    from ftengine.volume.phantom import TumorSpec, make_phantom

    return make_phantom(
        "abdomen",
        seed=11,
        case=case,
        shape_zyx=shape_zyx,
        spacing_mm_zyx=region.spacing_mm_zyx,
        tumors=TumorSpec() if with_tumors else None,
    )


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
