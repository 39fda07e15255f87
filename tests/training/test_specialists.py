"""Specialists of one organ: convert with the preset, train without another word."""

from pathlib import Path

import numpy as np
import pytest

from ftengine.assemble import build_loader, config_for_store
from ftengine.config import Config
from ftengine.datasets.registry import values_of
from ftengine.store.case import ConvertOptions
from ftengine.store.convert import convert_cases
from ftengine.store.reader import open_store
from ftengine.volume.discover import discover
from ftengine.volume.label_maps import parse_label_map
from ftengine.volume.phantom import LABELS, TumorSpec, write_phantom_dataset

ORGANS = ("liver", "pancreas", "kidney")


@pytest.mark.parametrize("organ", ORGANS)
def test_a_specialist_has_background_organ_and_tumor(organ: str) -> None:
    general, config = Config.preset("abdomen").region, Config.preset(f"abdomen-{organ}").region
    assert config.labels == {"background": 0, organ: 1, f"{organ}_tumor": 2}
    assert (config.num_classes, general.num_classes) == (3, 7)
    assert (config.organs[organ].organ, config.organs[organ].tumor) == (1, 2)
    for key in ("spacing_mm_zyx", "window_hu", "patch_zyx"):
        assert getattr(config, key) == getattr(general, key)


@pytest.mark.parametrize("organ", ORGANS)
def test_a_registered_data_set_needs_no_map_for_a_specialist(organ: str) -> None:
    general = Config.preset("abdomen").region.labels
    mapped = dict(values_of({v: name for name, v in general.items()}, Config.preset(f"abdomen-{organ}").region))
    assert {v: new for v, new in mapped.items() if new} == {general[organ]: 1, general[f"{organ}_tumor"]: 2}


def test_phantoms_become_a_specialists_batches(tmp_path: Path) -> None:
    """The label files hold all organs; the map keeps the kidney's."""
    write_phantom_dataset(
        tmp_path / "files",
        region="abdomen",
        num_volumes=2,
        seed=0,
        shape_zyx=(32, 48, 56),
        spacing_mm_zyx=(5.0, 4.0, 4.0),
        tumors=TumorSpec(num_tumors=(1, 1), diameter_mm=(20.0, 30.0), organs=("kidney",)),
    )
    config = Config.preset("abdomen-kidney").with_overrides({"region.spacing_mm_zyx": (5.0, 4.0, 4.0)})
    text = "1=0,2=0,3=0,4=0,5=kidney,6=kidney_tumor"
    options = ConvertOptions(label_map=tuple(parse_label_map(text, config.region.labels).items()))
    report = convert_cases(
        discover([tmp_path / "files"], dataset="p"), tmp_path / "store", config.region, options=options
    )
    assert report.exit_code == 0
    store = open_store(tmp_path / "store")
    assert store.region == "abdomen-kidney"
    voxels = np.array(store.column("class_voxels").to_pylist())
    assert voxels.shape[1] == 3
    assert (voxels[:, 1:] > 0).all()
    assert LABELS["abdomen"]["kidney"] == 5
    chosen = config.with_overrides(
        {"region.patch_zyx": (16, 32, 32), "loader.positive_fraction": 1.0, "training.batch_size": 2, "device": "cpu"}
    )
    with build_loader(chosen, store, mix="annotated") as loader:
        batch = next(iter(loader))
    assert batch.image.shape == (2, 1, 16, 32, 32)
    assert set(batch.label.unique().tolist()) <= {0, 1, 2}
    assert (batch.label > 0).flatten(1).any(1).all()


def test_the_preset_of_a_specialists_store_is_found(tmp_path: Path) -> None:
    from ftengine.store.writer import create_store

    config = Config.preset("abdomen-pancreas")
    create_store(tmp_path / "store", config.region)
    assert config_for_store(open_store(tmp_path / "store")) == config
