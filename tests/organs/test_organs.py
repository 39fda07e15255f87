"""Pseudo organ labels: which volumes get one, what stays, what a killed run leaves, what a conversion does with them afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.assemble import train_segmentation
from ftengine.config import Config
from ftengine.errors import ConfigError, StoreError
from ftengine.geometry import FloatZYX
from ftengine.organs.labeler import weights_hash
from ftengine.organs.run import LabelReport, Selection, label_store, open_labeler, selected_cases
from ftengine.organs.with_checkpoint import CheckpointLabeler
from ftengine.prediction.infer import predict_volume
from ftengine.store import index
from ftengine.store.convert import convert_cases
from ftengine.store.location import locate
from ftengine.store.maintenance import compact_store
from ftengine.store.reader import open_store
from ftengine.store.verify import verify_store
from ftengine.store.writer import create_store
from ftengine.training.checkpoint import load_segmenter
from ftengine.volume.discover import Source, discover
from ftengine.volume.nifti import write_nifti
from tests.organs.support import segmenter_config, write_segmenter
from tests.store.test_convert import content_hash
from tests.support import organ_volume, ras_grid_at

CPU = torch.device("cpu")
REGION = segmenter_config().region
SHAPE = (20, 22, 24)
ORGAN, TUMOR = 1, 2
UNLABELLED = ["d/bare0", "d/bare1"]


def write_sources(folder: Path) -> list[Source]:
    """Two CT without a label, one with an organ label, one with a tumour label, one with both."""
    folder.mkdir()
    grid = ras_grid_at(SHAPE)
    kinds = {"bare0": (), "bare1": (), "organ": (ORGAN,), "tumor": (TUMOR,), "whole": (ORGAN, TUMOR)}
    for number, (name, values) in enumerate(kinds.items()):
        image, label = organ_volume(SHAPE, tumor=name != "organ", seed=number + 1)
        write_nifti(folder / f"{name}_ct.nii.gz", image, grid)
        if values:
            write_nifti(folder / f"{name}_label.nii.gz", np.where(np.isin(label, values), label, 0), grid)
    return discover([folder], dataset="d")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return write_sources(tmp_path_factory.mktemp("organs") / "src")


@pytest.fixture(scope="module")
def converted(sources: list[Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never labelled: tests work on copies."""
    store = tmp_path_factory.mktemp("organs") / "s.zarr"
    assert convert_cases(sources, store, REGION).exit_code == 0
    return store


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenter(tmp_path_factory.mktemp("weights") / "s.pt", segmenter_config())


@pytest.fixture
def store(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "s.zarr"))


def run(store: str | Path, weights: Path, **selection: Any) -> LabelReport:
    labeler = open_labeler("checkpoint", weights, open_store(store), CPU)
    return label_store(store, labeler, Selection(**selection))


@pytest.fixture(scope="module")
def undisturbed(converted: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Content of the store after a run that nobody killed."""
    store = Path(shutil.copytree(converted, tmp_path_factory.mktemp("whole") / "s.zarr"))
    assert run(store, weights, under_tumors=True).count("labelled") == 3
    return content_hash(store)


# which volumes, and what they get


def test_volumes_without_a_label_get_the_organs_of_the_checkpoint(store: Path, weights: Path) -> None:
    before = {case: open_store(store).row(case) for case in open_store(store).cases}
    report = run(store, weights)
    assert (report.count("labelled"), report.count("skipped"), report.exit_code) == (2, 3, 0)
    opened = open_store(store)
    network, config = load_segmenter(weights)
    for case in UNLABELLED:
        patch = opened.read_volume(case)
        predicted = predict_volume(network, patch.image, config, CPU)
        assert (predicted == TUMOR).any()  # so that folding is seen
        np.testing.assert_array_equal(patch.label, np.minimum(predicted, ORGAN))
        truth = organ_volume(SHAPE, tumor=True, seed=1 + UNLABELLED.index(case))[1] > 0
        assert 2 * (truth & (patch.label > 0)).sum() / (truth.sum() + (patch.label > 0).sum()) > 0.9
    changed = {"annotation", "label_provenance", "class_voxels", "class_chunks", "stored_bytes"}
    for case, old in before.items():
        differs = {name for name, value in opened.row(case).items() if value != old[name]}
        assert differs == (changed if case in UNLABELLED else set())
    row, patch = opened.row("d/bare0"), opened.read_volume("d/bare0")
    body = index.body_chunks(patch.image, patch.label, REGION.window_hu[0])
    assert row["body_chunks"] == np.packbits(body).tobytes()
    assert row["annotation"] == "organ"
    assert [v["value"] for v in row["class_chunks"]] == [ORGAN]
    assert row["class_voxels"] == np.bincount(patch.label.ravel(), minlength=3).tolist()
    assert all(finding.verdict == "sound" for finding in verify_store(opened))


def test_provenance_says_what_made_the_label_and_nothing_of_the_day(store: Path, weights: Path, tmp_path: Path) -> None:
    run(store, weights)
    provenance = json.loads(open_store(store).row("d/bare0")["label_provenance"])
    assert provenance == {
        "tool": "checkpoint",
        "version": __version__,
        "weights_sha256": weights_hash(weights),
        "label_map": {"liver": ORGAN, "liver_tumor": ORGAN},
        "settings": {
            "overlap": 0.0,
            "windows_per_call": 4,
            "weighting": "constant",
            "mirror_axes": [],
            "precision": "auto",
            "skip_air": False,
        },
    }
    elsewhere = Path(shutil.copy(weights, tmp_path / "other_name.pt"))
    assert run(store, elsewhere).count("labelled") == 0
    assert [o.reason for o in run(store, weights, cases=("d/bare0",)).outcomes] == [
        "already labelled by this tool with these weights"
    ]


def test_known_tumours_stay_and_the_organ_goes_under_them(store: Path, weights: Path) -> None:
    before = open_store(store)
    tumor = before.read_volume("d/tumor").label == TUMOR
    report = run(store, weights, under_tumors=True)
    assert [o.case for o in report.outcomes if o.status == "labelled"] == ["d/bare0", "d/bare1", "d/tumor"]
    opened = open_store(store)
    label = opened.read_volume("d/tumor").label
    np.testing.assert_array_equal(label == TUMOR, tumor)
    assert (label == ORGAN).sum() > 500
    row, old = opened.row("d/tumor"), before.row("d/tumor")
    for name in ("annotation", "num_tumors", "tumor_values", "tumor_diameters_mm", "label_sha256"):
        assert row[name] == old[name]
    assert row["annotation"] == "tumor"
    assert opened.row("d/whole") == before.row("d/whole")
    assert all(finding.verdict == "sound" for finding in verify_store(opened))


def test_labels_of_files_are_replaced_only_when_asked_and_tumours_never(store: Path, weights: Path) -> None:
    old = {case: open_store(store).read_volume(case).label for case in ("d/organ", "d/tumor", "d/whole")}
    reasons = {o.case: o.reason for o in run(store, weights).outcomes}
    assert reasons["d/organ"] == "has organs from its label file (--overwrite replaces them)"
    assert reasons["d/tumor"] == "its label holds no organ (--under-tumors adds it)"
    run(store, weights, overwrite=True)
    opened = open_store(store)
    assert {row["label_provenance"] != "" for row in opened.index.to_pylist()} == {True}
    assert not np.array_equal(opened.read_volume("d/organ").label, old["d/organ"])
    for case in ("d/tumor", "d/whole"):
        np.testing.assert_array_equal(opened.read_volume(case).label == TUMOR, old[case] == TUMOR)
    assert all(finding.verdict == "sound" for finding in verify_store(opened))


def test_another_tool_replaces_a_pseudo_label_only_when_asked(store: Path, weights: Path, tmp_path: Path) -> None:
    run(store, weights)
    other = write_segmenter(tmp_path / "other.pt", segmenter_config(network__channels=(4, 6)), steps=10)
    kept = run(store, other, cases=("d/bare0",))
    assert kept.outcomes[0].reason == "has organs from another tool or other weights (--overwrite replaces them)"
    assert run(store, other, cases=("d/bare0",), overwrite=True).count("labelled") == 1
    opened = open_store(store)
    assert opened.row("d/bare0")["label_provenance"] != opened.row("d/bare1")["label_provenance"]


@pytest.mark.parametrize(
    ("selection", "cases"),
    [
        ({}, ["d/bare0", "d/bare1", "d/organ", "d/tumor", "d/whole"]),
        ({"cases": ("d/bare1", "d/organ")}, ["d/bare1", "d/organ"]),
        ({"dataset": "d", "split": ""}, ["d/bare0", "d/bare1", "d/organ", "d/tumor", "d/whole"]),
    ],
)
def test_selection(converted: Path, selection: dict[str, Any], cases: list[str]) -> None:
    assert selected_cases(open_store(converted), Selection(**selection)) == cases


def test_a_selection_without_a_volume_is_named(converted: Path) -> None:
    with pytest.raises(ConfigError, match=r"no volume fits --split test and --dataset x"):
        selected_cases(open_store(converted), Selection(split="test", dataset="x"))
    with pytest.raises(StoreError, match=r"no case 'd/x'"):
        selected_cases(open_store(converted), Selection(cases=("d/x",)))


def test_a_subset_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "sub.zarr").mkdir()
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["ftengine"]["volumes_of"] = str(store)
    (tmp_path / "sub.zarr" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"sub\.zarr: is a subset of .*s\.zarr and holds no volumes of its own"):
        selected_cases(open_store(tmp_path / "sub.zarr"), Selection())


def test_a_dry_run_writes_nothing(store: Path, weights: Path) -> None:
    before = content_hash(store)
    labeler = open_labeler("checkpoint", weights, open_store(store), CPU)
    report = label_store(store, labeler, Selection(), dry_run=True)
    assert [o.case for o in report.outcomes if o.status == "planned"] == UNLABELLED
    assert content_hash(store) == before


# failures


def test_a_volume_that_fails_is_listed_and_the_rest_goes_on(store: Path, weights: Path) -> None:
    shard = store / "volumes/d/bare0/0/c/0/0/0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    report = run(store, weights)
    outcomes = {o.case: o for o in report.outcomes}
    assert (outcomes["d/bare0"].status, outcomes["d/bare0"].code) == ("failed", "unreadable")
    assert "d/bare0: a chunk is missing or damaged" in outcomes["d/bare0"].reason
    assert outcomes["d/bare1"].status == "labelled"
    assert report.exit_code == 1
    assert open_store(store).row("d/bare0")["annotation"] == "none"


class _Tool:
    """A tool that goes wrong in a way of its own for each volume."""

    provenance = "{}"

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def __call__(self, image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> NDArray[np.uint8]:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return np.full(image_hu.shape, answer, dtype=np.uint8)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (MemoryError(), "out-of-memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out-of-memory"),
        (ValueError("odd"), "internal"),
        (TUMOR, "internal"),
        (0, "no-organ"),
    ],
    ids=["memory", "gpu memory", "error", "values", "nothing found"],
)
def test_what_goes_wrong_in_a_tool_is_named(answer: Any, code: str, store: Path) -> None:
    report = label_store(store, _Tool(answer, ORGAN), Selection(cases=tuple(UNLABELLED)))
    bad, good = report.outcomes
    assert (bad.status, bad.code, good.status) == ("failed", code, "labelled")
    assert bad.reason.startswith("d/bare0: ")
    assert bad.advice
    assert open_store(store).row("d/bare0")["annotation"] == "none"


def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    converted: Path, weights: Path, tmp_path: Path
) -> None:
    opened = open_store(converted)
    with pytest.raises(ConfigError, match=r"no\.pt: no such checkpoint"):
        open_labeler("checkpoint", tmp_path / "no.pt", opened, CPU)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ConfigError, match=r"text\.pt: is not a checkpoint"):
        open_labeler("checkpoint", tmp_path / "text.pt", opened, CPU)
    with pytest.raises(ConfigError, match=r"--with magic: want checkpoint, lungmask or totalsegmentator"):
        open_labeler("magic", weights, opened, CPU)


def test_a_checkpoint_of_another_region_is_refused(weights: Path, tmp_path: Path) -> None:
    chest = create_store(tmp_path / "chest.zarr", Config.preset("chest").region)
    with pytest.raises(
        ConfigError, match=r"was trained for labels .*'liver': 1.* Use it on a store of the same region"
    ):
        CheckpointLabeler(weights, open_store(chest), CPU)
    windowed = REGION.model_copy(update={"window_hu": (-100.0, 300.0)})
    other = create_store(tmp_path / "window.zarr", windowed)
    with pytest.raises(ConfigError, match=r"with window \(-175\.0, 250\.0\) HU"):
        CheckpointLabeler(weights, open_store(other), CPU)


# killed, then the same command again


def _program(store: Path, weights: Path, harm: str) -> list[str]:
    script = store.parent / f"organs_{os.urandom(4).hex()}.py"
    text = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.organs.test_organs import run
        from tests.store import harm
        harm.arm({harm}, None, None)
        run({str(store)!r}, Path({str(weights)!r}), under_tumors=True)
    """
    script.write_text(textwrap.dedent(text))
    return [sys.executable, str(script)]


# writes: 1 the compacted index; then 5 a volume without a label (group, label group, array, shard, row); d/tumor has a shard and a row
STAGES = [
    ("scratch", "after", 1),
    ("write_bytes", "after", 3),
    ("write_bytes", "after", 5),
    ("append_row", "after", 1),
    ("append_row", "before", 3),
    ("append_row", "after", 3),
    ("compact_index", "after", 2),
]


@pytest.mark.parametrize("stage", STAGES, ids=[f"{when} {function} {number}" for function, when, number in STAGES])
def test_killed_anywhere_and_run_again_gives_the_same_store(
    stage: tuple[str, str, int], store: Path, weights: Path, undisturbed: str
) -> None:
    done = subprocess.run(_program(store, weights, repr(stage)), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = open_store(store)
    assert len(killed) == 5
    for case in killed.cases:
        patch = killed.read_volume(case)  # whole, with its old label or its new one
        if case == "d/tumor":
            assert (patch.label == TUMOR).sum() == 125
    report = run(store, weights, under_tumors=True)
    assert report.exit_code == 0
    assert report.count("labelled") + report.count("skipped") == 5
    assert content_hash(store) == undisturbed
    assert compact_store(locate(store), dry_run=True).orphans == ()


def test_compact_removes_a_label_that_was_not_committed(store: Path, weights: Path) -> None:
    before = content_hash(store)
    done = subprocess.run(
        _program(store, weights, "('append_row', 'before', 1)"), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = store / "volumes/d/bare0/0/.c.0a1b.partial"
    partial.touch()
    compaction = compact_store(locate(store))
    assert compaction.orphans == ("d/bare0/0/.c.0a1b.partial", "d/bare0/labels")
    assert content_hash(store) == before


def test_two_writers_are_refused(store: Path, weights: Path) -> None:
    with locate(store).only_writer():
        with pytest.raises(StoreError, match=r"another process is converting"):
            run(store, weights)


# what a conversion does afterwards


@pytest.mark.parametrize("unchanged", ["stat", "hash"])
def test_a_conversion_of_unchanged_sources_keeps_pseudo_labels(
    unchanged: Any, sources: list[Source], store: Path, weights: Path
) -> None:
    run(store, weights, under_tumors=True)
    before = content_hash(store)
    assert convert_cases(sources, store, REGION, unchanged=unchanged).count("skipped") == 5
    assert content_hash(store) == before
    findings = verify_store(open_store(store), sources=sources)
    assert [(f.case, f.problem) for f in findings if f.verdict != "sound"] == []


def test_a_changed_source_is_converted_again_and_can_be_labelled_again(tmp_path: Path, weights: Path) -> None:
    sources = write_sources(tmp_path / "src")
    convert_cases(sources, tmp_path / "s.zarr", REGION)
    run(tmp_path / "s.zarr", weights)
    image, label = organ_volume(SHAPE, tumor=True, seed=50)
    write_nifti(sources[0].image, image, ras_grid_at(SHAPE))
    assert convert_cases(sources, tmp_path / "s.zarr", REGION).count("converted") == 1
    row = open_store(tmp_path / "s.zarr").row("d/bare0")
    assert (row["annotation"], row["label_provenance"], row["class_voxels"]) == ("none", "", [0, 0, 0])
    assert not (tmp_path / "s.zarr/volumes/d/bare0/labels").exists()
    assert run(tmp_path / "s.zarr", weights).count("labelled") == 1
    # a label file that comes later takes the place of the pseudo label
    write_nifti(tmp_path / "src/bare0_label.nii.gz", label, ras_grid_at(SHAPE))
    convert_cases(discover([tmp_path / "src"], dataset="d"), tmp_path / "s.zarr", REGION)
    opened = open_store(tmp_path / "s.zarr")
    assert (opened.row("d/bare0")["annotation"], opened.row("d/bare0")["label_provenance"]) == ("tumor", "")
    np.testing.assert_array_equal(opened.read_volume("d/bare0").label, label)


def test_deep_verify_still_sees_a_lost_tumour(sources: list[Source], store: Path, weights: Path) -> None:
    run(store, weights, under_tumors=True)
    opened = open_store(store)
    patch = opened.read_volume("d/tumor")
    from ftengine.store.relabel import replace_label

    with opened.location.only_writer():
        label = np.minimum(patch.label, ORGAN)
        replace_label(opened, "d/tumor", patch.image, label, annotation="tumor", label_provenance="{}")
        index.compact_index(opened.location)
    bad = [f for f in verify_store(open_store(store), sources=sources) if f.verdict != "sound"]
    assert [f.case for f in bad] == ["d/tumor"]
    assert "125 voxels of the label differ" in bad[0].problem


# training, buckets, the command


def test_training_takes_pseudo_labelled_volumes_as_organ_volumes(store: Path, weights: Path, tmp_path: Path) -> None:
    run(store, weights, under_tumors=True)
    config = segmenter_config(training__steps=4)
    from ftengine.assemble import build_loader

    with build_loader(config, open_store(store)) as loader:
        batches = [next(iter(loader)) for _ in range(3)]
    requests = [record.request for batch in batches for record in batch.records]
    assert {r.case for r in requests if not r.annotated} <= {"d/bare0", "d/bare1", "d/organ"}
    assert {r.case for r in requests if not r.annotated} & set(UNLABELLED)
    result = train_segmentation(config, store, tmp_path / "run")
    assert len(result.losses) == 4
    assert np.isfinite(list(result.losses)).all()


def test_a_bucket_gets_the_same_labels(sources: list[Source], store: Path, weights: Path, s3_server: str) -> None:
    url = f"{s3_server}/{os.urandom(4).hex()}/s.zarr"
    convert_cases(sources, url, REGION)
    assert run(url, weights, under_tumors=True).count("labelled") == 3
    run(store, weights, under_tumors=True)
    far, near = open_store(url), open_store(store)
    assert far.index.equals(near.index)
    for case in near.cases:
        np.testing.assert_array_equal(far.read_volume(case).label, near.read_volume(case).label)
    assert all(finding.verdict == "sound" for finding in verify_store(far))
    assert run(url, weights, under_tumors=True).count("skipped") == 5
    assert convert_cases(sources, url, REGION).count("skipped") == 5


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ftengine.cli.main", "organs", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_line(store: Path, weights: Path, tmp_path: Path) -> None:
    options = ("--with", "checkpoint", "--weights", weights, "--device", "cpu")
    planned = _command(store, *options, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert (document["planned"], document["skipped"], document["labelled"]) == (2, 3, 0)
    done = _command(store, *options, "--under-tumors", "--case", "d/tumor", "--case", "d/bare0")
    assert done.returncode == 0, done.stderr
    assert "2 labelled" in done.stdout
    assert "[1/2] labelled d/bare0" in done.stderr
    opened = open_store(store)
    assert [opened.has_label(case) for case in UNLABELLED] == [True, False]
    refused = _command(store, "--with", "checkpoint", "--weights", tmp_path / "no.pt")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no such checkpoint" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
