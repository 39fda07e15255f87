"""The same scans in every layout become the same store; what is missing fails alone; the command line says what it took."""

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from ftengine.config import Config
from ftengine.geometry import Grid, grid_from_codes, grid_from_matrix
from ftengine.store.case import ConvertOptions
from ftengine.store.convert import convert_cases
from ftengine.store.reader import Store, open_store
from ftengine.volume.cases import Source
from ftengine.volume.layouts.choose import find_cases
from ftengine.volume.nifti import write_nifti
from ftengine.volume.phantom import Phantom, TumorSpec, make_phantom
from tests.cli.test_cli import _error, _run
from tests.recipes import save_slice

REGION = Config.preset("demo").region
SPACING_MM = (3.0, 3.0, 3.0)
LAYOUTS = ("folder", "nnunet", "msd", "dicom", "csv")


def phantom(case: int, shape: tuple[int, int, int] = (24, 28, 32)) -> Phantom:
    made = make_phantom(
        "abdomen", seed=5, case=case, shape_zyx=shape, spacing_mm_zyx=SPACING_MM, tumors=TumorSpec(organs=("liver",))
    )
    made.label[made.label > 2] = 0  # the demo's region knows the liver alone
    return made


def whole_grid(made: Phantom) -> Grid:
    """The phantom's grid at whole millimetres, which every format keeps exactly."""
    matrix = made.grid.matrix
    matrix[:3, 3] = np.rint(matrix[:3, 3])
    return grid_from_matrix(made.grid.shape_zyx, matrix)


def write_dicom(folder: Path, image_hu: NDArray[np.int16], grid: Grid, *, scattered: bool) -> None:
    """A RAS+ volume as axial slices (LPS), in file names that say nothing of the order, in one folder or two."""
    series = generate_uid()
    matrix = grid.matrix
    for index, plane in enumerate(image_hu[:, ::-1, ::-1]):
        last = (matrix @ (image_hu.shape[2] - 1, image_hu.shape[1] - 1, index, 1))[:3]
        place = folder / f"d{index % 2}" if scattered else folder
        place.mkdir(parents=True, exist_ok=True)
        save_slice(
            place / f"IM{(7 * index) % 101:03d}",
            (plane + 1024).astype(np.uint16),
            position=(-last[0], -last[1], last[2]),
            series=series,
            PixelSpacing=[SPACING_MM[1], SPACING_MM[2]],
        )


def write_layout(folder: Path, layout: str, scans: dict[str, tuple[Phantom, bool]]) -> dict[str, Any]:
    """Write scans (and, where asked, their labels) in one layout; returns the options of ``find_cases`` that they need."""
    labelled = [name for name, (_, has_label) in scans.items() if has_label]
    places = {
        "folder": ("{0}_ct.nii.gz", "{0}_label.nii.gz"),
        "csv": ("images/{0}.nii.gz", "masks/other_{0}.nii.gz"),
        "nnunet": ("imagesTr/{0}_0000.nii.gz", "labelsTr/{0}.nii.gz"),
        "msd": ("imagesTr/{0}.nii.gz", "labelsTr/{0}.nii.gz"),
        "dicom": ("tree/{0}", "labels/{0}.nii.gz"),
    }[layout]
    images = {name: places[0].format(name) for name in scans}
    if layout == "nnunet":  # without a label a case is a test case
        images |= {name: f"imagesTs/{name}_0000.nii.gz" for name in scans if name not in labelled}
    (folder / "labels" if layout == "dicom" else folder).mkdir(parents=True)
    for number, (name, (made, has_label)) in enumerate(scans.items()):
        path = folder / images[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if layout == "dicom":
            write_dicom(path, made.image_hu, whole_grid(made), scattered=number % 2 == 1)
        else:
            write_nifti(path, made.image_hu, whole_grid(made))
        if has_label:
            path = folder / places[1].format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(path, made.label, whole_grid(made))
    labels = {name: places[1].format(name) for name in labelled}
    description: dict[str, Any] = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "liver tumour"},
    }
    if layout == "msd":
        training = [{"image": f"./{images[n]}", "label": f"./{labels[n]}"} for n in labelled]
        test = [f"./{images[n]}" for n in scans if n not in labelled]
        (folder / "dataset.json").write_text(json.dumps(description | {"training": training, "test": test}))
    if layout == "nnunet":
        (folder / "dataset.json").write_text(json.dumps(description))
    if layout == "csv":
        rows = [f"{images[n]},{labels.get(n, '')},{n}" for n in scans]
        (folder / "list.csv").write_text("\n".join(["image,label,case", *rows]))
    if layout == "dicom":
        return {"source": folder / "tree"} | ({"labels": folder / "labels"} if labelled else {})
    return {"source": folder}


def convert_layout(folder: Path, layout: str, scans: dict[str, tuple[Phantom, bool]], *, named: str) -> Store:
    options = write_layout(folder / layout, layout, scans)
    found = find_cases([options.pop("source")], layout=named, dataset="x", region_labels=REGION.labels, **options)
    report = convert_cases(found.sources, folder / f"{layout}.zarr", REGION)
    assert report.exit_code == 0, report.outcomes
    return open_store(report.store)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cases=st.dictionaries(st.sampled_from(["a", "liver_1", "p 2", "7"]), st.booleans(), min_size=1, max_size=3),
    auto=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_same_scans_in_five_layouts_give_the_same_store(
    tmp_path_factory: pytest.TempPathFactory, cases: dict[str, bool], auto: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    if not any(cases.values()):
        cases[next(iter(cases))] = True  # without imagesTr, nnU-Net is not recognised by auto
    scans = {name: (phantom(10 * seed + k), has_label) for k, (name, has_label) in enumerate(cases.items())}
    stores = {layout: convert_layout(folder, layout, scans, named="auto" if auto else layout) for layout in LAYOUTS}
    for layout, store in stores.items():
        assert store.cases == sorted(f"x/{name}" for name in scans), layout
        for name, (made, has_label) in scans.items():
            volume = store.read_volume(f"x/{name}")
            np.testing.assert_array_equal(volume.image, made.image_hu, err_msg=layout)
            np.testing.assert_array_equal(volume.label, made.label if has_label else 0, err_msg=layout)
            row = store.row(f"x/{name}")
            assert row["annotation"] == ("tumor" if has_label else "none"), layout
            if layout in ("nnunet", "msd"):
                assert row["split"] == ("train" if has_label else "test")


def test_merged_labels_maps_and_splits_reach_the_store(tmp_path: Path) -> None:
    made = phantom(1)
    source = _two_labels(tmp_path, made)
    root = tmp_path / "s.zarr"
    report = convert_cases([source], root, REGION)
    row = open_store(root).row("x/a")
    assert (row["label_source"], row["organ_label_source"], row["split"]) == ("t.nii.gz", "o.nii.gz", "val")
    assert len({row["label_sha256"], row["organ_label_sha256"], row["source_sha256"], ""}) == 4
    np.testing.assert_array_equal(open_store(root).read_volume("x/a").label, made.label)
    num_tumor = int(np.count_nonzero(made.label == 2))
    assert f"labels merged: {num_tumor:,} tumour voxels inside an organ of the organ label, 0 outside" in row["notes"]
    assert report.count("converted") == 1

    again = convert_cases([source], root, REGION)
    assert again.count("skipped") == 1
    organs = np.where(made.label > 0, 50, 0).astype(np.uint8)
    organs[0, 0, 0] = 50
    write_nifti(tmp_path / "o.nii.gz", organs, whole_grid(made))  # only the organ label changes
    assert convert_cases([source], root, REGION).count("converted") == 1
    assert open_store(root).read_volume("x/a").label[0, 0, 0] == 1
    other = Source(**{**source.__dict__, "organ_label_map": ((50, 0),)})  # only a map changes
    assert convert_cases([other], root, REGION).count("converted") == 1
    np.testing.assert_array_equal(np.unique(open_store(root).read_volume("x/a").label), [0, 2])
    assert convert_cases([other], root, REGION, options=ConvertOptions(split="test")).count("converted") == 1
    assert open_store(root).row("x/a")["split"] == "test"


def _two_labels(folder: Path, made: Phantom) -> Source:
    """A phantom whose organs (as 50) and tumours (as 7) lie in two files."""
    grid = whole_grid(made)
    write_nifti(folder / "a.nii.gz", made.image_hu, grid)
    write_nifti(folder / "t.nii.gz", np.where(made.label == 2, 7, 0).astype(np.uint8), grid)
    write_nifti(folder / "o.nii.gz", np.where(made.label > 0, 50, 0).astype(np.uint8), grid)
    return Source(
        "x/a",
        "x",
        folder / "a.nii.gz",
        folder / "t.nii.gz",
        organ_label=folder / "o.nii.gz",
        label_map=((7, 2),),
        organ_label_map=((50, 1),),
        split="val",
    )


def test_what_a_list_names_and_nobody_has_fails_alone(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_layout(folder, "csv", {"good": (phantom(2), True)})
    (folder / "loop.nii.gz").symlink_to(folder / "loop.nii.gz")
    (folder / "empty").mkdir()
    rows = {
        "lost": "absent.nii.gz,",
        "no_label": "images/good_copy.nii.gz,absent_seg.nii.gz",
        "loop": "loop.nii.gz,",
        "below_a_file": "images/good.nii.gz/x.nii.gz,",
        "folder": "masks,",
        "empty": "empty,",
        "text": "list.csv,",
    }
    shutil.copyfile(folder / "images" / "good.nii.gz", folder / "images" / "good_copy.nii.gz")
    with (folder / "list.csv").open("a") as file:
        file.writelines(f"\n{cells},{case}" for case, cells in rows.items())
    done = _run("convert", folder, tmp_path / "s.zarr", "--region", "demo", "--dataset", "d", "--json", code=1)
    report = json.loads(done.stdout)
    failed = {c["case"]: c["reason"] for c in report["cases"] if c["status"] == "failed"}
    assert set(failed) == {f"d/{case}" for case in rows}
    assert "absent.nii.gz" in failed["d/lost"]
    assert "absent_seg.nii.gz" in failed["d/no_label"]
    assert open_store(tmp_path / "s.zarr").cases == ["d/good"]


# the command line


def test_cli_says_which_layout_it_took_and_what_it_passed_over(tmp_path: Path) -> None:
    scans = {"a": (phantom(3), True), "b": (phantom(4), False)}
    for layout in LAYOUTS:
        options = write_layout(tmp_path / layout, layout, scans)
        labels = ("--labels", options["labels"]) if "labels" in options else ()
        done = _run(
            "convert", options["source"], tmp_path / "x.zarr", "--region", "demo", "--dry-run", "--json", *labels
        )
        assert f"{options['source']}: layout {layout} (" in done.stderr
        assert [c["case"] for c in json.loads(done.stdout)["cases"]] == ["data/a", "data/b"]
        named = ("--layout", layout, "--dry-run", *labels)
        done = _run("convert", options["source"], tmp_path / "x.zarr", "--region", "demo", *named)
        assert "layout" not in done.stderr
    (tmp_path / "msd" / "imagesTr" / "extra.nii.gz").touch()
    done = _run("convert", tmp_path / "msd", tmp_path / "x.zarr", "--region", "demo", "--dry-run")
    assert "ignored: 1 x not in the lists of dataset.json" in done.stderr
    done = _run("convert", tmp_path / "msd", tmp_path / "x.zarr", "--region", "demo", "--dry-run", "--quiet")
    assert done.stderr == ""


def test_cli_merges_two_folders_of_labels_with_two_maps(tmp_path: Path) -> None:
    made = phantom(6)
    _two_labels(tmp_path, made)
    for name, new in (("a", "ct/p/a_ct"), ("t", "tumors/p/a"), ("o", "organs/p/a")):
        (tmp_path / new).parent.mkdir(parents=True)
        (tmp_path / f"{name}.nii.gz").rename(tmp_path / f"{new}.nii.gz")
    options = ("--labels", tmp_path / "tumors", "--organ-labels", tmp_path / "organs")
    maps = ("--label-map", "7=liver_tumor", "--organ-label-map", "50=liver")
    done = _run("convert", tmp_path / "ct", tmp_path / "s.zarr", "--region", "demo", *options, *maps)
    assert "tumour voxels inside an organ of the organ label, 0 outside" in done.stderr
    np.testing.assert_array_equal(open_store(tmp_path / "s.zarr").read_volume("data/p/a").label, made.label)
    done = _run("store", "verify", tmp_path / "s.zarr", "--deep", tmp_path / "ct", *options)
    assert "1 of 1 volumes are sound" in done.stdout
    done = _run("convert", tmp_path / "ct", tmp_path / "t.zarr", "--region", "demo", *options, *maps[:2], code=4)
    assert "label values 50 (" in done.stderr
    assert "--organ-label-map 50=VALUE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--layout", "bids"), "--layout bids: want auto, folder, nnunet, msd, dicom, csv"),
        (("--label-map", "1=spleen"), "--label-map 1=spleen: cannot read '1=spleen'"),
        (("--organ-label-map", "5"), "--organ-label-map 5: cannot read '5'"),
        (("--organ-labels", "absent"), "organ labels folder absent: not a folder"),
        (("--layout", "csv"), "0 CSV or TSV files with a column image"),
        (("--layout", "msd"), "dataset.json: cannot be read"),
    ],
)
def test_cli_errors_of_layouts_are_one_line(tmp_path: Path, arguments: tuple[str, ...], match: str) -> None:
    (tmp_path / "src").mkdir()
    write_nifti(tmp_path / "src" / "a.nii.gz", phantom(7).image_hu, whole_grid(phantom(7)))
    assert match in _error("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo", *arguments, code=2)
    assert not (tmp_path / "s.zarr").exists()


def test_cli_refuses_a_list_that_leads_out_and_takes_absolute_paths_when_told(tmp_path: Path) -> None:
    made = phantom(8)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"training": [{"image": "../../etc/passwd"}]}))
    text = _error("convert", tmp_path / "set", tmp_path / "s.zarr", "--region", "demo", code=2)
    assert "training[0]: '../../etc/passwd' leads out of" in text
    write_nifti(tmp_path / "far.nii.gz", made.image_hu, whole_grid(made))
    (tmp_path / "set" / "list.csv").write_text(f"image,split\n{tmp_path / 'far.nii.gz'},train\n")
    arguments = ("convert", tmp_path / "set" / "list.csv", tmp_path / "s.zarr", "--region", "demo")
    assert "(--absolute-paths allows it)" in _error(*arguments, code=2)
    _run(*arguments, "--absolute-paths")
    assert open_store(tmp_path / "s.zarr").row("data/far")["split"] == "train"


def test_a_hundred_levels_of_folders_reach_the_store(tmp_path: Path) -> None:
    made = phantom(9)
    deep = tmp_path.joinpath("src", *["d"] * 100)
    deep.mkdir(parents=True)
    write_nifti(deep / "a.nii.gz", made.image_hu, whole_grid(made))
    (deep / "up").symlink_to(tmp_path / "src")
    _run("convert", tmp_path / "src", tmp_path / "s.zarr", "--region", "demo")
    store = open_store(tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.read_volume(f"data/{'d/' * 100}a").image, made.image_hu)


@pytest.mark.data
def test_the_real_dicom_tree_and_its_label_become_one_volume(data_dir: Path, tmp_path: Path) -> None:
    label = data_dir / "totalseg_dicom" / "example_dicom_label_abdomen.nii.gz"
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "series.nii.gz").symlink_to(label)
    found = find_cases([data_dir / "totalseg_dicom"], dataset="x", labels=tmp_path / "labels")
    region = Config.preset("abdomen").region
    report = convert_cases(found.sources, tmp_path / "s.zarr", region)
    assert report.count("converted") == 1
    row = open_store(tmp_path / "s.zarr").row("x/series")
    assert row["class_voxels"][1] > 0
    assert row["label_source"] == "series.nii.gz"


def test_codes_of_the_phantoms_are_ras() -> None:
    """The layouts' writers above rely on it."""
    grid = whole_grid(phantom(0))
    np.testing.assert_array_equal(
        np.sign(grid.matrix[:3, :3]), np.sign(grid_from_codes(grid.shape_zyx, SPACING_MM, "RAS").matrix[:3, :3])
    )
