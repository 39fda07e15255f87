"""The box bench compares the two ways on real networks and a real store, at toy size, and counts GFLOP."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftengine.bench import box
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import build_generator, build_segmenter
from tests.support import make_store, small_config


def _config() -> Config:
    return small_config(
        region__patch_zyx=(40, 40, 40),
        synthesis__box_least_vox=32,
        synthesis__size_weights={"tiny": 0.5, "medium": 0.5},
        generator__initial_scale=1.0,
        qc__threshold=0.3,
        device="cpu",
    )


def _paths(folder: Path, *, num_annotated: int, num_organs: int) -> dict[str, Any]:
    """A store, and checkpoints of networks of random weights."""
    config = _config()
    save_checkpoint(folder / "g.pt", "generator", config, {"model": build_generator(config).state_dict()})
    save_checkpoint(folder / "s.pt", "segmenter", config, {"model": build_segmenter(config).state_dict()})
    store = make_store(folder, config, num_annotated=num_annotated, num_organs=num_organs)
    return {"synth": folder / "g.pt", "judge": folder / "s.pt", "store": Path(store.path)}


def test_box_bench_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _paths(tmp_path, num_annotated=0, num_organs=2)
    document = box.run(**paths, patches=8, assignments=["loader.annotated_fraction=0"], as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert document["all"]["patches"] == sum(document["boxes"].values()) == sum(document["sizes"].values()) >= 8
    assert document["boxed"]["patches"] == document["boxes"]["32 x 32 x 32"] == document["sizes"]["tiny"] > 0
    assert document["boxes"]["whole patch"] > 0
    boxed = document["boxed"]
    assert 0 <= boxed["verdicts_agree"] <= 1
    assert boxed["mean_contrast_hu"] > boxed["mean_difference_inside_hu"] > 0
    # what is not boxed is the same twice
    assert document["all"]["mean_difference_of_p"] * document["all"]["patches"] == pytest.approx(
        boxed["mean_difference_of_p"] * boxed["patches"], abs=1e-4
    )
    full, auto = document["rows"]
    assert len(full["samples_s"]) == len(auto["samples_s"]) >= 4


def test_a_store_without_room_for_tumors_is_an_error(tmp_path: Path) -> None:
    paths = _paths(tmp_path, num_annotated=0, num_organs=1)
    with pytest.raises(ConfigError, match=r"nothing in .* batches can be painted"):
        box.run(**paths, patches=1, assignments=["synthesis.min_organ_voxels=1000000"])


def test_gflop_are_those_of_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    counted = box.run_gflop(sides=(96,))["gflop"]
    assert "| 96^3 |" in capsys.readouterr().out
    assert counted["G, generator.width=32"]["96"] == pytest.approx(1649, rel=0.001)  # counted on the released network
    assert counted["S, swinunetr 48"]["96"] == pytest.approx(688, rel=0.001)
    assert counted["G, generator.width=8"]["96"] == pytest.approx(103.4, rel=0.001)
