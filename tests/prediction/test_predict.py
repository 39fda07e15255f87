"""Predicting many cases: what is complete is kept, nothing is half written, files of others stay, odd scans are warned of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydicom.uid import generate_uid

from ftengine.errors import ConfigError, FailureCode
from ftengine.geometry import IntZYX, grid_from_codes, ras_grid
from ftengine.prediction.infer import predict_volume
from ftengine.prediction.inputs import FileInput, Input, find_inputs
from ftengine.prediction.outputs import partial_folder, places_of
from ftengine.prediction.plausibility import implausible_scan, missing_organs
from ftengine.prediction.predict import Model, Outcome, PredictOptions, predict_cases, settings_of
from ftengine.store import index
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.training.distributed import World
from ftengine.volume.nifti import write_nifti
from tests.recipes import save_series
from tests.support import make_store, organ_volume, small_config

CONFIG = small_config(inference__overlap=0.25)
CPU = torch.device("cpu")
# windowed to [0, 1], what ``organ_volume`` draws: soft tissue, liver, tumour
MEANS = (0.48, 0.65, 0.52)


def nearest_mean() -> torch.nn.Module:
    """A network that knows each class's grey value: the class of a voxel is the one with the nearest."""
    network = torch.nn.Conv3d(1, len(MEANS), 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([400 * mean for mean in MEANS]).reshape(-1, 1, 1, 1, 1))
        network.bias.copy_(torch.tensor([-200 * mean**2 for mean in MEANS]))  # type: ignore[union-attr]  # there is one
    return network


MODEL = Model(nearest_mean(), CONFIG, "c" * 64, CPU)


def write_scan(path: Path, codes: str = "LPS", shape_zyx: IntZYX = (18, 26, 28), seed: int = 0) -> Path:
    image, _ = organ_volume(shape_zyx, tumor=True, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, image, grid_from_codes(shape_zyx, (5.0, 1.4, 1.3), codes))
    return path


def inputs_of(*places: Path) -> list[Input]:
    return find_inputs([str(p) for p in places], CONFIG, "w.safetensors")


def predict(places: Path | list[Input], out: Path, model: Model = MODEL, **options: Any) -> dict[str, Outcome]:
    inputs = inputs_of(places) if isinstance(places, Path) else places
    outcomes = predict_cases(inputs, model, out, PredictOptions(**options))
    return {outcome.case: outcome for outcome in outcomes}


def voxels(path: Path) -> Any:
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)  # type: ignore[attr-defined]  # nibabel's stubs


@pytest.mark.parametrize("codes", ["LPS", "PIR", "RAS"])
def test_a_result_lies_on_its_file_s_own_grid(tmp_path: Path, codes: str) -> None:
    file = write_scan(tmp_path / "in" / "a.nii.gz", codes)
    outcome = predict(file, tmp_path / "out", probabilities=True)["predict/a"]
    assert outcome.status == "predicted"
    written: Any = nibabel.load(outcome.path)
    source: Any = nibabel.load(file)
    assert written.shape == source.shape
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    assert written.get_data_dtype() == np.uint8
    label = voxels(Path(outcome.path))
    counts = np.bincount(label.ravel(), minlength=CONFIG.region.num_classes)
    assert list(outcome.class_voxels.values()) == counts.tolist()
    assert counts.min() > 100
    names = ["0_background.nii.gz", "1_liver.nii.gz", "2_liver_tumor.nii.gz"]
    folder = tmp_path / "out" / "a_probabilities"
    assert sorted(p.name for p in folder.iterdir()) == names
    probabilities = np.stack([voxels(folder / name) for name in names])
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=2e-3)
    ranked = np.sort(probabilities, axis=0)
    clear = ranked[-1] - ranked[-2] > 2e-3  # float16
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(probabilities.argmax(0)[clear], label[clear])
    np.testing.assert_array_equal(probabilities, probabilities.astype(np.float16))
    _, truth = organ_volume((18, 26, 28), tumor=True, seed=0)
    assert (label == 1)[truth == 1].mean() > 0.85  # flipped or turned it would not lie on the liver
    assert (label == 1)[truth == 0].mean() < 0.15


def test_the_grid_of_the_store_by_option(tmp_path: Path) -> None:
    file = write_scan(tmp_path / "a.nii.gz")
    outcome = predict(file, tmp_path / "out", grid="store")["predict/a"]
    written: Any = nibabel.load(outcome.path)
    np.testing.assert_allclose(written.header.get_zooms(), CONFIG.region.spacing_mm_zyx[::-1], rtol=1e-6)
    scan = inputs_of(file)[0].read(CONFIG.region.spacing_mm_zyx)
    expected = predict_volume(MODEL.network, scan.image_hu, CONFIG, CPU)
    np.testing.assert_array_equal(voxels(Path(outcome.path)), expected)


def test_volumes_of_a_store_go_to_the_files_they_came_from(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG, num_annotated=1, num_organs=1, shape_zyx=(20, 22, 24))
    root = create_store(tmp_path / "other.zarr", CONFIG.region)
    image, label = organ_volume((20, 22, 24), tumor=True, seed=1)
    native = grid_from_codes((12, 30, 50), (5.0, 2.2, 1.44), "LPS")
    grid = replace(ras_grid(native), shape_zyx=(20, 22, 24))
    matrix = grid.matrix
    matrix[:3, :3] = np.diag([3.0, 3.0, 3.0])
    grid = replace(grid, affine_ras=tuple(matrix.ravel()))
    write_volume(root, "d/x", image, label, grid, native, CONFIG.region, Provenance("made by a test", "", split="test"))
    index.compact_index(root)
    outcomes = predict([*inputs_of(store.path), *inputs_of(tmp_path / "other.zarr")], tmp_path / "out")
    assert [o.status for o in outcomes.values()] == ["predicted"] * 3
    assert (tmp_path / "out" / "d" / "x.nii.gz").exists()
    written: Any = nibabel.load(outcomes["d/x"].path)
    assert written.shape == (50, 30, 12)
    np.testing.assert_allclose(written.affine, native.matrix, atol=1e-5)
    same = predict_volume(MODEL.network, store.read_volume("a/0").image, CONFIG, CPU)
    np.testing.assert_array_equal(voxels(Path(outcomes["a/0"].path)), same)  # this store's files had its own grid
    assert {o.status for o in predict(inputs_of(store.path), tmp_path / "out").values()} == {"complete"}
    chosen = find_inputs([str(tmp_path / "other.zarr")], CONFIG, "w", split="test")
    assert [one.case for one in chosen] == ["d/x"]
    with pytest.raises(ConfigError, match="holds no volume"):
        find_inputs([str(store.path)], CONFIG, "w", split="test")
    with pytest.raises(ConfigError, match="was trained for"):
        find_inputs([str(store.path)], small_config(region__spacing_mm_zyx=(2.0, 2.0, 2.0)), "w")
    with pytest.raises(ConfigError, match="want a store"):
        find_inputs([str(write_scan(tmp_path / "a.nii.gz"))], CONFIG, "w", fold=1)
    assert open_store(tmp_path / "other.zarr").native_grid("d/x") == native


def test_what_is_complete_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
    first = predict(tmp_path / "in", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    write_scan(tmp_path / "in" / "b.nii.gz", seed=7)  # other voxels
    second = predict(tmp_path / "in", tmp_path / "out")
    assert [o.status for o in second.values()] == ["complete", "predicted"]
    assert (second["predict/a"].class_voxels, second["predict/a"].warnings) == (
        first["predict/a"].class_voxels,
        first["predict/a"].warnings,
    )
    assert {p.name for p, time in before.items() if p.stat().st_mtime_ns == time} == {"a.nii.gz", "a.json"}

    def statuses(model: Model = MODEL, **options: Any) -> set[str]:
        return {o.status for o in predict(tmp_path / "in", tmp_path / "out", model, **options).values()}

    assert statuses() == {"complete"}
    assert statuses(replace(MODEL, sha256="d" * 64)) == {"predicted"}
    assert statuses() == {"predicted"}
    assert statuses(replace(MODEL, config=CONFIG.with_overrides({"inference.overlap": 0.5}))) == {"predicted"}
    assert statuses() == {"predicted"}
    assert statuses(replace(MODEL, config=CONFIG.with_overrides({"inference.windows_per_call": 1}))) == {"complete"}
    assert statuses(probabilities=True) == {"predicted"}
    assert statuses() == {"complete"}  # the probabilities are more than was asked for
    assert statuses(overwrite=True) == {"predicted"}
    assert not (tmp_path / "out" / "a_probabilities").exists()  # they were another run's
    (tmp_path / "out" / "b.nii.gz").unlink()
    assert [o.status for o in predict(tmp_path / "in", tmp_path / "out").values()] == ["complete", "predicted"]
    del monkeypatch


def test_work_of_others_is_not_replaced(tmp_path: Path) -> None:
    file = write_scan(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    write_scan(out / "a.nii.gz")
    others = (out / "a.nii.gz").read_bytes()
    outcome = predict(file, out)["predict/a"]
    assert (outcome.status, outcome.code) == ("failed", FailureCode.DUPLICATE_NAME.value)
    assert "--overwrite" in outcome.reason
    assert (out / "a.nii.gz").read_bytes() == others
    assert predict(file, out, overwrite=True)["predict/a"].status == "predicted"
    edited = (out / "a.nii.gz").read_bytes() + b"\0"
    (out / "a.nii.gz").write_bytes(edited)  # as after corrections by hand
    assert predict(file, out)["predict/a"].status == "failed"
    assert (out / "a.nii.gz").read_bytes() == edited
    (out / "a.json").write_text("{}")  # a record that is none
    assert predict(file, out)["predict/a"].status == "failed"
    with pytest.raises(ConfigError, match="is an input"):
        predict(file, tmp_path)


@pytest.mark.parametrize("content", ['{"patient": 7}', "[1, 2]", "no JSON"])
def test_a_json_file_of_somebody_else_is_not_replaced(tmp_path: Path, content: str) -> None:
    file = write_scan(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.json").write_text(content)
    outcome = predict(file, out)["predict/a"]
    assert (outcome.status, outcome.code) == ("failed", FailureCode.DUPLICATE_NAME.value)
    assert "a.json" in outcome.reason
    assert [p.name for p in out.iterdir()] == ["a.json"]
    assert (out / "a.json").read_text() == content
    assert predict(file, out, overwrite=True)["predict/a"].status == "predicted"


@pytest.mark.parametrize("linked", [False, True])
def test_results_inside_a_folder_of_inputs_do_not_become_inputs(tmp_path: Path, linked: bool) -> None:
    scans = tmp_path / "scans"
    write_scan(scans / "a_ct.nii.gz")
    write_scan(scans / "more" / "b.nii.gz")
    source = scans
    if linked:
        source = tmp_path / "link"
        source.symlink_to(scans)
    out = scans / "predictions"

    def run() -> dict[str, Outcome]:
        return predict(find_inputs([str(source)], CONFIG, "w", out=out), out, probabilities=True)

    assert {case: o.status for case, o in run().items()} == dict.fromkeys(("predict/a", "predict/more/b"), "predicted")
    assert {case: o.status for case, o in run().items()} == dict.fromkeys(("predict/a", "predict/more/b"), "complete")
    with pytest.raises(ConfigError, match="is a folder of inputs"):
        find_inputs([str(source)], CONFIG, "w", out=scans)
    single = find_inputs([str(scans / "a_ct.nii.gz")], CONFIG, "w", out=scans)  # nothing is searched
    assert [one.case for one in single] == ["predict/a"]


def test_results_do_not_change_the_layout_of_a_folder_of_dicom(tmp_path: Path) -> None:
    source = tmp_path / "series"
    uid = generate_uid()
    save_series(source / "first", 8, skip=range(4, 8), series=uid)  # only the layout dicom joins the halves
    save_series(source / "second", 8, skip=range(4), series=uid)
    before = inputs_of(source)
    write_scan(source / "out" / "a.nii.gz")
    assert len(before) == 1
    assert find_inputs([str(source)], CONFIG, "w", out=source / "out") == before


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))

    def stop_at_b(done: int, _total: int) -> None:
        if len(started) == 2 and done > 1:
            raise KeyboardInterrupt

    started: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        predict_cases(
            inputs_of(tmp_path / "in"),
            MODEL,
            tmp_path / "out",
            PredictOptions(probabilities=True),
            on_start=started.append,
            on_windows=stop_at_b,
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.json", "a.nii.gz", "a_probabilities"]
    # killed between the record and the result: predicted again
    real = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (
            (_ for _ in ()).throw(KeyboardInterrupt) if self.name == "b.nii.gz" else real(self, target)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "in", tmp_path / "out", probabilities=True)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "b.nii.gz").exists()
    (tmp_path / "out" / ".c.partial").mkdir()  # what SIGKILL leaves
    (tmp_path / "out" / ".c.partial" / "c.nii.gz").write_bytes(b"half")
    statuses = [o.status for o in predict(tmp_path / "in", tmp_path / "out", probabilities=True).values()]
    assert statuses == ["complete", "predicted", "predicted"]
    assert not list((tmp_path / "out").glob(".*"))


def test_cases_that_fail_are_outcomes(tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "good.nii.gz")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"\x1f\x8b nothing")
    network = torch.nn.Conv3d(1, CONFIG.region.num_classes, 1)
    torch.nn.init.constant_(network.weight, float("nan"))
    outcomes = predict(tmp_path / "in", tmp_path / "out")
    assert [o.status for o in outcomes.values()] == ["failed", "predicted"]
    assert "bad.nii.gz" in outcomes["predict/bad"].reason
    (nan,) = predict(tmp_path / "in" / "good.nii.gz", tmp_path / "nan", replace(MODEL, network=network)).values()
    assert (nan.status, nan.code) == ("failed", FailureCode.NOT_FINITE.value)
    assert list((tmp_path / "nan").iterdir()) == []
    (series,) = predict(tmp_path / "in" / "good.nii.gz", tmp_path / "seg", file_format="dicom-seg").values()
    assert "is not DICOM" in series.reason


class FailingNetwork(torch.nn.Module):
    """The nearest mean, except that some cases meet an error of memory or of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nearest_mean()
        self.case = ""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        if self.case == "predict/a_gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if self.case == "predict/b_host":
            torch.empty(1 << 58)
        if self.case == "predict/c_odd":
            raise KeyError("axis")
        scores: torch.Tensor = self.network(windows)
        return scores


def test_one_case_too_large_or_odd_does_not_end_the_run(tmp_path: Path) -> None:
    for name in ("a_gpu", "b_host", "c_odd", "d"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    network = FailingNetwork()
    outcomes = predict_cases(
        inputs_of(tmp_path / "in"),
        replace(MODEL, network=network),
        tmp_path / "out",
        PredictOptions(),
        on_start=lambda case: setattr(network, "case", case),
    )
    assert [(o.status, o.code) for o in outcomes] == [
        ("failed", "out-of-memory"),
        ("failed", "out-of-memory"),
        ("failed", "internal"),
        ("predicted", ""),
    ]
    assert all("does not fit the memory" in o.reason and "--windows-per-call 1" in o.reason for o in outcomes[:2])
    assert "KeyError" in outcomes[2].reason
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["d.json", "d.nii.gz"]


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    files = [write_scan(tmp_path / folder / name) for folder, name in (("p", "A.nii.gz"), ("q", "a.nii.gz"))]
    with pytest.raises(ConfigError, match="one name"):
        inputs_of(*files)


@pytest.mark.parametrize(
    "options", [{"grid": "other"}, {"file_format": "png"}, {"file_format": "dicom-seg", "grid": "store"}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="want"):
        PredictOptions(**options)


def test_processes_share_the_cases_out(tmp_path: Path) -> None:
    for name in "abc":
        write_scan(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
    inputs = inputs_of(tmp_path / "in")
    alone = predict(tmp_path / "in", tmp_path / "alone")

    class Other(World):
        def gather(self, item: Any) -> list[Any]:
            theirs = [o for o in alone.values() if o.case == "predict/b"]
            return [item, theirs]

    done: list[str] = []
    outcomes = predict_cases(
        inputs, MODEL, tmp_path / "two", PredictOptions(), world=Other(0, 2), on_outcome=lambda o: done.append(o.case)
    )
    assert done == ["predict/a", "predict/c"]
    assert [o.case for o in outcomes] == ["predict/a", "predict/b", "predict/c"]
    assert sorted(p.name for p in (tmp_path / "two").glob("*.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_a_record_says_what_made_the_result(tmp_path: Path) -> None:
    predict(write_scan(tmp_path / "a.nii.gz"), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["checkpoint_sha256"] == "c" * 64
    assert record["labels"] == CONFIG.region.labels
    assert record["settings"]["overlap"] == 0.25
    assert record["settings"]["precision"] == "fp32"
    assert isinstance(inputs_of(tmp_path / "a.nii.gz")[0], FileInput)
    assert record["source_sha256"] == inputs_of(tmp_path / "a.nii.gz")[0].digest()
    assert set(record["files"]) == {"a.nii.gz"}
    assert any("covers only" in warning for warning in record["warnings"])
    assert settings_of(MODEL, PredictOptions()) == record["settings"]


def test_odd_scans_are_named() -> None:
    body = np.full((60, 200, 200), 40, dtype=np.int16)
    body[:, :60] = -1000
    assert implausible_scan(body, (3.0, 1.5, 1.5)) == []
    assert "covers only 30 mm along z" in implausible_scan(body[:10], (3.0, 1.5, 1.5))[0]
    assert "no air" in implausible_scan(np.where(body < 0, 1400, body).astype(np.int16), (3.0, 1.5, 1.5))[0]
    windowed = np.clip(body, 0, 255).astype(np.int16)
    assert "values run from 0 to 40" in implausible_scan(windowed, (3.0, 1.5, 1.5))[0]
    air = np.full_like(body, -1000)
    air[0] = 800
    assert "soft tissue" in implausible_scan(air, (3.0, 1.5, 1.5))[0]


def test_organs_that_are_not_there_are_named() -> None:
    region = small_config().region
    assert missing_organs({"background": 0, "liver": 1400, "liver_tumor": 0}, region) == []
    assert missing_organs({"background": 0, "liver": 150, "liver_tumor": 100}, region) == []  # a liver full of tumour
    (sentence,) = missing_organs({"background": 0, "liver": 12.34, "liver_tumor": 0}, region)
    assert "12.3 ml of liver (floor 200 ml)" in sentence
    assert "another region" in sentence


@pytest.mark.parametrize("where", ["made", "removed"])
def test_an_interrupt_leaves_no_partial_folder_wherever_it_falls(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = places_of(tmp_path, "a", "nifti", with_probabilities=False)
    calls = 0

    def interrupted(real: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if where == "made":
            real(*args, **kwargs)
        if calls == (1 if where == "made" else 2):  # the first removal is that of a killed run's folder
            raise KeyboardInterrupt
        if where == "removed":
            real(*args, **kwargs)

    owner: Any = Path if where == "made" else shutil
    name = "mkdir" if where == "made" else "rmtree"
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: interrupted(real, *args, **kwargs))
    with pytest.raises(KeyboardInterrupt), partial_folder(places) as folder:
        (folder / "half").touch()
    assert list(tmp_path.iterdir()) == []
    with partial_folder(places) as folder:  # as the next run does
        assert list(folder.iterdir()) == []
