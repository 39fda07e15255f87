"""The few-labels experiment: its plan, scores and statistics by hand, and a quick run that is killed and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ftengine.bench.experiments.few_labels import main
from ftengine.bench.experiments.few_labels.arms import ARMS, COMPARISONS, GENERATORS, Arm, lacking_keys
from ftengine.bench.experiments.few_labels.program import keep_protocol, parse_seeds
from ftengine.bench.experiments.few_labels.protocol import Protocol, SeedCounts, load_protocol
from ftengine.bench.experiments.few_labels.report import write_report
from ftengine.bench.experiments.few_labels.schedule import run_units
from ftengine.bench.experiments.few_labels.scores import TrueTumor, VolumeScore, score_volume, summarize
from ftengine.bench.experiments.few_labels.statistics import compare, holm
from ftengine.bench.experiments.few_labels.units import Unit, plan, write_result
from ftengine.errors import ConfigError
from tests.kernels.support import REPOSITORY


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return load_protocol()


# the protocol


def test_a_file_replaces_the_keys_it_names(tmp_path: Path, protocol: Protocol) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: {student: 7}\nengine: {network.channels: [4, 8]}\n")
    mine = load_protocol(file)
    assert (mine.steps.student, mine.steps.segmenter) == (7, protocol.steps.segmenter)
    config = mine.config({"qc.threshold": 0.5})
    assert (config.network.channels, config.qc.threshold) == ((4, 8), 0.5)
    assert config.synthesis.edge_sigma_mm == 0.0  # the preset demo has another: the paper's way is the start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {pupil: 7}", "steps.pupil"),
        ("engine: {qc.treshold: 0.5}", "qc.treshold: there is no such key. Did you mean qc.threshold"),
        ("- a list", "holds a list"),
        ("steps: {student: 0}", "steps.student"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_protocol(file)


def test_a_folder_of_another_protocol_is_refused(tmp_path: Path, protocol: Protocol) -> None:
    keep_protocol(tmp_path, protocol)
    keep_protocol(tmp_path, protocol)
    other = protocol.model_copy(update={"steps": protocol.steps.model_copy(update={"student": 9})})
    with pytest.raises(ConfigError, match=r"other values of steps\.student"):
        keep_protocol(tmp_path, other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="holds no experiment"):
        keep_protocol(tmp_path / "mine", protocol)


@pytest.mark.parametrize(("text", "seeds"), [("0-2", [0, 1, 2]), ("4,0-1,1", [4, 0, 1])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-b"])
def test_bad_seeds(text: str) -> None:
    if text == "1-":
        assert parse_seeds(text) == [1]  # a range that ends where it begins
        return
    with pytest.raises(ConfigError, match="want numbers and ranges"):
        parse_seeds(text)


# arms and units


def test_the_tables_name_what_there_is(protocol: Protocol) -> None:
    assert {arm.generator for arm in ARMS.values()} - {None} == set(GENERATORS)
    assert {name for pair in COMPARISONS for name in pair} <= set(ARMS)
    config = protocol.config({})
    for arm in ARMS.values():
        if not lacking_keys(arm, config):
            protocol.config({**arm.keys})  # valid together
    assert lacking_keys(Arm("", {"synthesis.no_such_key": 1}), config) == ["synthesis.no_such_key"]


def test_units_come_after_what_they_need_and_have_names_of_their_own() -> None:
    units = plan(list(ARMS), [0, 1, 2, 3], SeedCounts(matters=4, others=2))
    assert len({unit.slug for unit in units}) == len(units)
    for place, unit in enumerate(units):
        assert set(unit.needs) <= set(units[:place])
    for name, arm in ARMS.items():
        seeds = [unit.seed for unit in units if (unit.kind, unit.name) == ("student", name)]
        assert seeds == ([0, 1, 2, 3] if arm.matters else [0, 1])
    assert Unit("judge", seed=3) not in units  # only an arm that does not matter asks for it


# scores


def test_scores_of_a_volume_by_hand(protocol: Protocol) -> None:
    shape = (20, 20, 20)
    tumor, organ, predicted = (np.zeros(shape, dtype=bool) for _ in range(3))
    organ[:, :, :15] = True
    tumor[2:4, 2:4, 2:4] = True  # 8 voxels, hypodense: 6 of them found
    tumor[9:18, 9:18, 4:13] = True  # 729 voxels, 16.7 mm, rim: missed
    predicted[2:4, 2:4, 2:3] = True
    predicted[2:3, 2:4, 3:4] = True
    predicted[18:20, 0:2, 0:2] = True  # a false positive of 8 voxels
    predicted[18:20, 10:11, 0:2] = True  # 4 voxels: too small to count
    predicted[5:8, 5:8, 16:19] = True  # 27 voxels outside the organ
    score = score_volume(
        "test/1",
        predicted,
        tumor,
        organ,
        [TrueTumor((2.5, 2.5, 2.5), "hypo"), TrueTumor((13.0, 13.0, 8.0), "rim")],
        scanner=3,
        spacing_mm_zyx=(1.5, 1.5, 1.5),
        scoring=protocol.scoring,
    )
    assert score.dice == pytest.approx(2 * 6 / (18 + 737))
    assert score.dice_anywhere == pytest.approx(2 * 6 / (18 + 27 + 737))
    assert (score.num_false, score.num_false_anywhere) == (1, 2)
    assert [(t.kind, t.overlap) for t in score.tumors] == [("hypo", 0.75), ("rim", 0.0)]
    assert [t.diameter_mm for t in score.tumors] == pytest.approx(
        [(6 / np.pi * n * 1.5**3) ** (1 / 3) for n in (8, 729)]
    )
    healthy = VolumeScore("test/2", 0, None, None, 4, 4, ())
    figures = summarize([score, healthy], protocol.scoring, (0, 1))
    assert figures["small_any"] == figures["small_half"] == figures["hypo_half"] == 1.0
    assert figures["large_any"] == figures["rim_any"] == 0.0
    assert figures["hyper_any"] is None
    assert (figures["false_per_tumor_volume"], figures["false_per_healthy_volume"]) == (1.0, 4.0)
    assert figures["dice_seen_scanners"] is None
    assert figures["dice_unseen_scanners"] == score.dice


# statistics


def test_holm_by_hand() -> None:
    # 0.01 * 4; 0.02 * 3; 0.03 * 2; 0.04 * 1 is below the one before it
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_differences_are_those_of_scipy() -> None:
    by_arm = {
        "a": {0: 0.50, 1: 0.52, 2: 0.47},
        "b": {0: 0.55, 1: 0.58, 2: 0.49, 3: 0.9},
        "c": {1: 0.6},
        "d": {0: 0.6, 1: 0.62, 2: 0.57},
    }
    b, c, d = compare(by_arm, [("b", "a"), ("c", "a"), ("d", "a"), ("nobody", "a")])
    test = stats.ttest_rel([0.55, 0.58, 0.49], [0.50, 0.52, 0.47])
    assert (b.t, b.p) == pytest.approx((test.statistic, test.pvalue))
    assert b.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    differences = [0.05, 0.06, 0.02]
    assert (b.mean, b.sd) == pytest.approx((np.mean(differences), np.std(differences, ddof=1)))
    # by hand: t = mean / (sd / sqrt 3)
    assert b.t == pytest.approx(np.mean(differences) / (np.std(differences, ddof=1) / np.sqrt(3)))
    assert (c.seeds, c.p, c.sd) == ((1,), None, None)
    assert d.mean == pytest.approx(0.1)
    assert d.p is None  # no spread: nothing to test
    assert b.p_holm == b.p  # the only test


def _result(dice: float, *, overlap: float = 0.6) -> dict[str, Any]:
    tumor = {"kind": "hypo", "diameter_mm": 10.0, "overlap": overlap}
    volume = {"case": "test/1", "scanner": 2, "dice": dice, "dice_anywhere": dice, "tumors": [tumor]}
    figures: dict[str, float | None] = dict.fromkeys(summarize([], load_protocol().scoring, (0, 1)), 0.5)
    return {
        "figures": {**figures, "dice": dice, "hyper_any": None},
        "num_tumors": {"all": 1, "small": 1, "hypo": 1, "hyper": 0, "rim": 0},
        "volumes": [volume],
        "train_s": 10.0,
        "resumed": False,
        "device": "cpu",
        "quality": {},
        "mix": {},
    }


def test_the_report_says_what_the_units_came_to(tmp_path: Path, protocol: Protocol) -> None:
    dice = {
        "baseline": [0.50, 0.52, 0.48, 0.51, 0.49],
        "FreeTumor": [0.55, 0.56, 0.50, 0.57, 0.53],
        "oracle": [0.6, 0.63, 0.58, 0.6, 0.59],
    }
    for name, values in dice.items():
        for seed, value in enumerate(values):
            write_result(tmp_path, Unit("student", name, seed), _result(value))
    write_result(tmp_path, Unit("segmenter", seed=0), _result(0.4, overlap=0.75))
    contrast = {"percentiles": {"5": -48.0, "25": -41.0, "50": 35.4, "75": 40.0, "95": 61.0}, "sd": 8.25}
    passes = {"0.5": 0.5, "0.7": 0.3, "0.9": None}
    write_result(tmp_path, Unit("generator", "paper", 3), {"painting": {"contrast_hu": contrast, "passes": passes}})
    document = write_report(tmp_path, protocol, {"copy-paste": ["synthesis.synthesizer"]})
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(document))
    found = {(c["first"], c["second"]): c for c in document["comparisons"]}
    assert set(found) == {("FreeTumor", "baseline"), ("oracle", "baseline")}
    tests = {name: stats.ttest_rel(dice[name], dice["baseline"]) for name in ("FreeTumor", "oracle")}
    assert found["FreeTumor", "baseline"]["p"] == pytest.approx(tests["FreeTumor"].pvalue)
    assert found["FreeTumor", "baseline"]["mean"] == pytest.approx(0.042)
    larger = max(t.pvalue for t in tests.values())
    assert max(c["p_holm"] for c in found.values()) == pytest.approx(
        max(larger, 2 * min(t.pvalue for t in tests.values()))
    )
    assert document["acceptance"] == {"oracle above baseline": True, "FreeTumor above baseline": True}
    assert document["judges"]["few"][0]["all"] == {"0.5": 1.0, "0.7": 1.0, "0.9": 0.0}
    page = (tmp_path / "results.md").read_text()
    assert "| FreeTumor | 5 | 0.542 ± 0.028 | +0.050 +0.040 +0.020 +0.060 +0.040 | +0.042 ± 0.015 |" in page
    assert "| paper | 3 | -48 | +35 | +61 | 8.2 |" in page
    assert "copy-paste: this version lacks synthesis.synthesizer" in page
    for picture in ("differences.png", "outcomes.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


# the scheduler and the whole


def test_nothing_begins_after_the_time_is_up(tmp_path: Path) -> None:
    outcome = run_units(tmp_path, [Unit("data"), Unit("segmenter")], jobs=2, stop_after_s=0.0)
    assert (outcome.done, outcome.failed, outcome.num_left) == ([], {}, 2)


def test_a_worker_that_dies_fails_its_unit_and_keeps_back_what_needs_it(tmp_path: Path) -> None:
    outcome = run_units(tmp_path, [Unit("data"), Unit("segmenter")], jobs=1)  # the folder holds no protocol
    assert list(outcome.failed) == ["data"]
    assert "ended with code 1" in outcome.failed["data"]
    assert outcome.num_left == 2


QUICK = ["--quick", "--seeds", "0", "--jobs", "2", "--arms", "baseline", "FreeTumor T=.7", "oracle"]


def test_a_quick_run_is_killed_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "few"
    code = "import sys; from ftengine.bench.experiments.few_labels import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(folder), *QUICK],
        start_new_session=True,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = folder / "units" / "segmenter-0.json"
    for _ in range(1200):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists()
    written = first.stat().st_mtime_ns

    main(["--out", str(folder), *QUICK, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert set(document["arms"]) == {"S, where all start", "baseline", "FreeTumor T=.7", "oracle"}
    assert first.stat().st_mtime_ns == written
    student = json.loads((folder / "units" / "student-FreeTumor_T_.7-0.json").read_text())
    assert student["quality"]["painted"] > 0
    assert student["painting"]["num_painted"] > 0
    assert student["mix"]["annotated"] > 0
    assert len(student["volumes"]) == 3
    oracle = json.loads((folder / "units" / "student-oracle-0.json").read_text())
    assert oracle["quality"] == {}
    before = {file: file.stat().st_mtime_ns for file in (folder / "units").iterdir()}
    main(["--out", str(folder), "--report-only"])
    assert {file: file.stat().st_mtime_ns for file in (folder / "units").iterdir()} == before
    assert "| FreeTumor T=.7 | 1 |" in capsys.readouterr().out


def test_a_machine_that_only_trains_needs_nothing_that_reads_ct_files() -> None:
    code = (
        "import sys\n"
        "for name in ('SimpleITK', 'nibabel', 'pydicom', 'zarr'): sys.modules[name] = None\n"
        "import ftengine.bench.experiments.few_labels.work"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
