"""``ftengine qc calibrate`` on a small store, its picture in the report, and what a training run is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ftengine.assemble import SynthesisStage, build_bank, calibrate_judge, train_segmentation, train_synthesis
from ftengine.cli.main import app
from ftengine.errors import ConfigError
from ftengine.pictures.calibration import HEADER, draw_calibration, sentences, table
from ftengine.quality.calibrate import Calibration, calibration_file, read_calibration
from ftengine.report.data import ReportData
from ftengine.report.report import write_report
from ftengine.store.reader import Store, open_store
from ftengine.store.subset import make_subset
from ftengine.synthesis.bank import TumorBank
from ftengine.training.weight_files import sha256_of
from ftengine.types import Batch
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=2, generator_training__steps=1, qc__threshold=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("qc"), CONFIG)


@pytest.fixture(scope="module")
def judge(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmentation(CONFIG, store.path, tmp_path_factory.mktemp("qc") / "S", split="train").checkpoint


@pytest.fixture(scope="module")
def generator(store: Store, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_synthesis(CONFIG, store.path, tmp_path_factory.mktemp("qc") / "G", baseline=judge).checkpoint


def test_the_command_writes_what_it_shows_and_training_warns(
    store: Store, judge: Path, generator: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.to_yaml())
    options = [str(store.path), "--judge", str(judge), "--synth", str(generator), "--config", str(config)]
    result = CliRunner().invoke(
        app, ["qc", "calibrate", *options, "--out", str(tmp_path / "c"), "--painted", "6", "--json"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert (tmp_path / "c" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    calibration = read_calibration(calibration_file(judge))
    assert calibration.judge_sha256 == sha256_of(judge)
    assert calibration.generator_sha256 == sha256_of(generator)
    real = [t for t in calibration.tumors if t.origin == "real"]
    assert len(real) == 2  # one tumour in each of the two annotated volumes
    assert [t.contrast_hu for t in real] == pytest.approx([-60.0, -60.0], abs=5.0)
    assert len(calibration.proportions("painted")) == 6
    assert calibration.held_out is None  # S knows the split it was trained on, and all splits were asked for

    told: list[str] = []
    train_segmentation(
        CONFIG,
        store.path,
        tmp_path / "student",
        generator_path=generator,
        judge_path=judge,
        warn=told.append,
    )
    rate = calibration.pass_rate("real", 0.5)
    assert rate == 0.0  # two steps teach nothing
    assert any("at T=0.5 this judge passes 0% of 2 real tumours" in text for text in told)


@pytest.mark.parametrize(("split", "held_out"), [("train", False), (None, None)])
def test_it_says_whether_the_volumes_were_held_out(
    store: Store, judge: Path, tmp_path: Path, split: str | None, held_out: bool | None
) -> None:
    calibration = calibrate_judge(CONFIG, store, judge_path=judge, out=tmp_path, split=split, num_painted=0)
    assert calibration.held_out is held_out
    assert not len(calibration.proportions("painted"))
    assert any("painted" in line for line in table_text(calibration))
    if held_out is False:
        assert any("was trained on these volumes" in line for line in sentences(calibration))


def table_text(calibration: Calibration) -> list[str]:
    return [" ".join(HEADER), *(" ".join(row) for row in table(calibration))]


def test_a_split_without_volumes_is_refused(store: Store, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no labelled tumour in 0 tumour-annotated volumes of split 'nowhere'"):
        calibrate_judge(CONFIG, store, judge_path=judge, out=tmp_path, split="nowhere")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four annotated volumes, whose tumours differ, in two folds; no organ-labelled ones."""
    folder = tmp_path_factory.mktemp("folded")
    make_subset(make_store(folder, CONFIG, num_annotated=4, num_organs=0), folder / "f.zarr", num_folds=2)
    return open_store(folder / "f.zarr")


@pytest.mark.parametrize("synthesizer", ["constant", "copy-paste"])
def test_painted_tumors_are_of_the_fold_too(
    folded: Store, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthesizer: str
) -> None:
    keys = {"synthesis.synthesizer": synthesizer, "synthesis.contrast_factor": (1.0, 1.0), "device": "cpu"}
    painted_on: set[str] = set()
    pasted: set[str] = set()
    paint = SynthesisStage.__call__

    def noting(self: SynthesisStage, batch: Batch) -> Batch:
        painted_on.update(r.request.case for r in batch.records)
        return paint(self, batch)

    def noting_bank(*arguments: Any, **which: Any) -> TumorBank | None:
        bank = build_bank(*arguments, **which)
        pasted.update(t.case for tumors in (bank.tumors.values() if bank else ()) for t in tumors)
        return bank

    monkeypatch.setattr(SynthesisStage, "__call__", noting)
    monkeypatch.setattr("ftengine.assemble.calibrate.build_bank", noting_bank)
    config = CONFIG.with_overrides(keys)
    calibrate_judge(config, folded, judge_path=judge, out=tmp_path, fold=1, num_painted=4)
    folds = dict(zip(folded.cases, folded.index.column("fold").to_pylist(), strict=True))
    assert painted_on == {case for case, fold in folds.items() if fold == 1}
    assert pasted == (painted_on if synthesizer == "copy-paste" else set())


def test_the_report_holds_the_calibration(store: Store, judge: Path, tmp_path: Path) -> None:
    calibration = calibrate_judge(CONFIG, store, judge_path=judge, out=tmp_path, num_painted=4)
    write_report(tmp_path / "report.html", ReportData(title="t", calibration=calibration))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What the judge sees of real tumours" in page
    for words in ("All tumours, real (n = ", "P of each tumour over its contrast"):
        assert words in page
    assert draw_calibration(calibration).startswith(b"\x89PNG")
