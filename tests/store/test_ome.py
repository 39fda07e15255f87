"""Volumes are OME-Zarr 0.5: two validators accept them and reject broken copies, and the metadata say what the store says."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
import zarr
from ome_zarr_models.v05 import Image
from ome_zarr_models.v05.image_label import ImageLabel
from zarr.errors import ZarrUserWarning

from ftengine.config import Config
from ftengine.store import layout
from ftengine.store.location import Location
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, ras_grid_at

SHAPE = (37, 70, 41)  # no multiple of a chunk
REGIONS = ("abdomen", "chest", "demo")
DEEP = ("d/plain", "d/one/two/three/four/five", "d/one/two/other", "e/caf\u00e9 #1 (50 %)")


def _write(root: Location, case: str, config: Config, *, label: bool) -> None:
    image = coordinate_volume(SHAPE)
    values = (image % config.region.num_classes).astype(np.uint8) if label else None
    grid = ras_grid_at(SHAPE)
    write_volume(root, case, image, values, grid, grid, config.region, Provenance("x.nii.gz", "00"))


def _make(folder: Path, region: str) -> Store:
    config = Config.preset(region)
    root = create_store(folder / "s.zarr", config.region)
    _write(root, "d/labelled", config, label=True)
    for case in DEEP:
        _write(root, case, config, label=False)
    return open_store(root)


@pytest.fixture(scope="module", params=REGIONS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return _make(tmp_path_factory.mktemp("ome"), request.param)


@pytest.fixture(scope="module")
def abdomen(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return _make(tmp_path_factory.mktemp("abdomen"), "abdomen")


def _volume(store: Store, case: str = "d/labelled") -> Path:
    return store.path / layout.volume_path(case)


def _ome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
    return found


# validators


def _by_models(volume: Path) -> None:
    """ome-zarr-models, the gate: the image, the list of labels, and the label image."""
    image = Image.from_zarr(zarr.open_group(volume, mode="r"))
    assert image.labels is not None
    assert image.labels.attributes.ome.labels == ["seg"]
    ImageLabel.from_zarr(zarr.open_group(volume / "labels" / "seg", mode="r"))


def _by_yaozarrs(volume: Path) -> None:
    """yaozarrs, the second opinion: an implementation of its own."""
    yaozarrs.validate_zarr_store(str(volume))
    yaozarrs.validate_zarr_store(str(volume / "labels" / "seg"))


def test_two_validators_accept_every_volume(store: Store) -> None:
    _by_models(_volume(store))
    _by_yaozarrs(_volume(store))
    for case in DEEP:
        assert Image.from_zarr(zarr.open_group(_volume(store, case), mode="r")).labels is None
        yaozarrs.validate_zarr_store(str(_volume(store, case)))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "zarr.json").read_text())
    change(document)
    (folder / "zarr.json").write_text(json.dumps(document))


def _multiscale(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["attributes"]["ome"]["multiscales"][0]
    return found


def _label(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["attributes"]["ome"]["image-label"]
    return found


SEG = "labels/seg"
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no version": ("", lambda d: d["attributes"]["ome"].pop("version")),
    "no multiscales": ("", lambda d: d["attributes"]["ome"].pop("multiscales")),
    "missing axis": ("", lambda d: _multiscale(d)["axes"].pop(0)),
    "axis twice": ("", lambda d: _multiscale(d)["axes"][1].update(name="z")),
    "no scale": ("", lambda d: _multiscale(d)["datasets"][0].update(coordinateTransformations=[])),
    "scale of two numbers": (
        "",
        lambda d: _multiscale(d)["datasets"][0]["coordinateTransformations"][0].update(scale=[1.0, 1.0]),
    ),
    "array that is not there": ("", lambda d: _multiscale(d)["datasets"][0].update(path="9")),
    "dimension names in another order": ("0", lambda d: d.update(dimension_names=["x", "y", "z"])),
    "label that is not there": ("labels", lambda d: d["attributes"]["ome"].update(labels=["seg", "ghost"])),
    "label of real numbers": (f"{SEG}/0", lambda d: d.update(data_type="float32", fill_value=0.0)),
    "colour of three numbers": (SEG, lambda d: _label(d)["colors"][0].update(rgba=[1, 2, 3])),
    "label value twice": (SEG, lambda d: _label(d)["colors"][1].update({"label-value": 1})),
    "label value of text": (SEG, lambda d: _label(d)["colors"][0].update({"label-value": "liver"})),
    "missing axis of the label": (SEG, lambda d: _multiscale(d)["axes"].pop(0)),
}
REJECTED = (
    ValueError,
    KeyError,
    RuntimeError,
)  # of pydantic, of zarr, and of the libraries' own checks
ONLY_THE_GATE_SEES = {"label value twice"}


@pytest.mark.parametrize("harm", BROKEN)
def test_validators_reject_broken_copies(abdomen: Store, tmp_path: Path, harm: str) -> None:
    """A gate that lets these through would show nothing about what we write."""
    volume = Path(shutil.copytree(_volume(abdomen), tmp_path / "copy"))
    _by_models(volume)
    folder, change = BROKEN[harm]
    _edit(volume / folder, change)
    with pytest.raises(REJECTED):
        _by_models(volume)
    if harm in ONLY_THE_GATE_SEES:
        _by_yaozarrs(volume)  # should it learn to: strike the name from the list
    else:
        with pytest.raises(REJECTED):
            _by_yaozarrs(volume)


# what the metadata say


@pytest.mark.parametrize("part", ["", SEG])
def test_axes_are_zyx_in_millimetre_with_the_orientation_of_ras(store: Store, part: str) -> None:
    (multiscale,) = _ome(_volume(store) / part)["multiscales"]
    assert [(axis["name"], axis["type"], axis["unit"]) for axis in multiscale["axes"]] == [
        (name, "space", "millimeter") for name in "zyx"
    ]
    # OME-NGFF RFC-4: the direction in which each index grows
    assert [axis["orientation"] for axis in multiscale["axes"]] == [
        {"type": "anatomical", "value": value}
        for value in ("inferior-to-superior", "posterior-to-anterior", "left-to-right")
    ]
    (dataset,) = multiscale["datasets"]
    assert dataset == {
        "path": "0",
        "coordinateTransformations": [{"type": "scale", "scale": list(store.spacing_mm_zyx)}],
    }
    array = json.loads((_volume(store) / part / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["z", "y", "x"]
    assert tuple(array["shape"]) == SHAPE


def test_the_display_window_is_the_regions(store: Store) -> None:
    ome = _ome(_volume(store))
    (channel,) = ome["omero"]["channels"]
    low, high = store.window_hu
    assert channel["window"] == {"min": layout.AIR_HU, "max": 3071, "start": low, "end": high}
    assert layout.AIR_HU <= low < high <= 3071
    assert ome["omero"]["name"] == ome["multiscales"][0]["name"] == "d/labelled"


def test_every_label_has_a_name_and_a_colour_of_its_own(store: Store) -> None:
    label = _ome(_volume(store) / SEG)["image-label"]
    names = {value: name for name, value in store.labels.items() if value}
    assert {p["label-value"]: p["name"] for p in label["properties"]} == names
    colors = {c["label-value"]: tuple(c["rgba"]) for c in label["colors"]}
    assert colors == {value: (*layout.label_color(value), 255) for value in names}
    assert len(set(colors.values())) == len(names)
    image = (_volume(store) / SEG / label["source"]["image"]).resolve()
    assert image == _volume(store).resolve()


def test_the_group_lists_its_label(store: Store) -> None:
    assert _ome(_volume(store) / "labels") == {"version": "0.5", "labels": ["seg"]}
    assert not (_volume(store, "d/plain") / "labels").exists()


def test_zarr_lists_every_case_at_any_depth(store: Store) -> None:
    """Zarr v3 has no implicit groups: a folder without metadata would hide all that lies below it."""
    volumes = zarr.open_group(store.path / "volumes", mode="r")
    members = dict(volumes.members(max_depth=None))
    assert {path for path, node in members.items() if "omero" in _attributes(node)} == set(store.cases)
    assert set(store.cases) == {"d/labelled", *DEEP}
    assert {path for path, node in members.items() if "image-label" in _attributes(node)} == {"d/labelled/labels/seg"}
    assert set(dict(volumes.members())) == {"d", "e"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # of the index, which is no Zarr node and hides none
        assert set(dict(zarr.open_group(store.path, mode="r").members())) == {"volumes"}


def _attributes(node: Any) -> dict[str, Any]:
    found: dict[str, Any] = node.attrs.asdict().get("ome", {})
    return found
