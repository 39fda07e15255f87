"""The road on real CT (marker ``data``): what issue after issue promises, on the files that break readers."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ftengine.assemble import build_loader, build_synthesis_stage, train_segmentation
from ftengine.config import Config
from ftengine.evaluation.evaluate import evaluate_checkpoint
from ftengine.pictures.preview import preview
from ftengine.prediction.inputs import FileInput
from ftengine.prediction.predict import Model, PredictOptions, predict_cases
from ftengine.store.convert import ConversionReport, convert_cases
from ftengine.store.export import export_case
from ftengine.store.reader import Store, open_store
from ftengine.training.checkpoint import load_segmenter
from ftengine.volume.discover import NO_LABEL, discover

pytestmark = pytest.mark.data
ABDOMEN = Config.preset("abdomen")
STUBS = {"real/covid_2d", "real/dcmqi_liver3slice/ct-3slice"}  # one and three slices: not volumes


@pytest.fixture(scope="module")
def converted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ConversionReport]:
    unfit = (
        data_dir / "totalseg_example" / "example_ct.nii.gz"
    )  # the label that its name pairs it with is another scan's
    sources = discover([data_dir, unfit], dataset="real", pairs={unfit: NO_LABEL})
    report = convert_cases(sources, tmp_path_factory.mktemp("real") / "all.zarr", ABDOMEN.region)
    return open_store(report.store), report


def test_every_ct_converts_and_stubs_are_refused_with_a_reason(converted: tuple[Store, ConversionReport]) -> None:
    store, report = converted
    failed = {o.case: o.reason for o in report.outcomes if o.status == "failed"}
    assert set(failed) == STUBS
    assert all("not a volume" in reason for reason in failed.values())
    assert len(store) == len(report.outcomes) - len(STUBS) >= 13
    assert report.exit_code == 1


def _by_simpleitk(source: Path) -> Any:
    """The file as SimpleITK alone reads it, padding below -1024 set to -1024."""
    if source.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(source))
    return sitk.Cast(sitk.Clamp(image, sitk.sitkFloat32, -1024, 30000), sitk.sitkFloat32)


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("totalseg_example/example_ct_sm", "totalseg_example/example_ct_sm.nii.gz"),
        ("oddities/example_ct_sm_oblique12", "oddities/example_ct_sm_oblique12.nii.gz"),
        ("oddities/example_ct_sm_PIR_uint16_slope", "oddities/example_ct_sm_PIR_uint16_slope.nii.gz"),
        ("crlm_1006/CRLM-CT-1006", "crlm_1006/CRLM-CT-1006_ct.nii.gz"),
        ("totalseg_dicom/series", "totalseg_dicom/series"),
        ("elastix_lung_mha/3DCT_lung", "elastix_lung_mha/3DCT_lung.mha"),
        ("cip_chest_nrrd/ct-64", "cip_chest_nrrd/ct-64.nrrd"),
    ],
)
def test_export_is_within_1_hu_of_simpleitks_own_resampling(
    converted: tuple[Store, ConversionReport], data_dir: Path, tmp_path: Path, case: str, file: str
) -> None:
    store, _ = converted
    exported = sitk.ReadImage(str(export_case(store, f"real/{case}", tmp_path)[0]))
    expected = sitk.Resample(
        _by_simpleitk(data_dir / file), exported, sitk.Transform(), sitk.sitkLinear, -9999.0, sitk.sitkFloat32
    )
    ours, theirs = sitk.GetArrayFromImage(exported), sitk.GetArrayFromImage(expected)
    interior = theirs > -9000  # where the source has voxels on all sides
    assert interior.mean() > 0.8
    assert np.abs(ours - theirs)[interior].max() <= 1.0


def test_the_odd_files_give_the_same_anatomy_as_their_original(converted: tuple[Store, ConversionReport]) -> None:
    store, _ = converted
    original = store.read_volume("real/totalseg_example/example_ct_sm").image
    for odd in ("example_ct_sm_oblique12", "example_ct_sm_PIR_uint16_slope"):
        other = store.read_volume(f"real/oddities/{odd}").image
        # from 3 to 1.5 mm many values lie half way between two HU: the last bit of the affine decides the rounding
        np.testing.assert_allclose(other, original, rtol=0, atol=1)
        assert (other == original).mean() > 0.9


def test_native_export_returns_to_the_files_own_grid(
    converted: tuple[Store, ConversionReport], data_dir: Path, tmp_path: Path
) -> None:
    store, _ = converted
    path = export_case(store, "real/oddities/example_ct_sm_PIR_uint16_slope", tmp_path, grid="native")[0]
    exported: Any = nibabel.load(path)
    source: Any = nibabel.load(data_dir / "oddities" / "example_ct_sm_PIR_uint16_slope.nii.gz")
    assert exported.shape == source.shape
    np.testing.assert_allclose(exported.affine, source.affine, atol=1e-4)
    difference = np.asarray(exported.dataobj, dtype=np.float64) - np.clip(source.get_fdata(), -1024, None)
    assert np.percentile(np.abs(difference), 50) < 15  # smoothed twice by linear resampling, but the same anatomy


@pytest.fixture(scope="module")
def abdomen(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The two scans with real liver labels."""
    folder = data_dir / "totalseg_example"
    dicom = data_dir / "totalseg_dicom"
    pairs = {
        folder / "example_ct_sm.nii.gz": folder / "example_ct_sm_label_abdomen.nii.gz",
        dicom / "series": dicom / "example_dicom_label_abdomen.nii.gz",
    }
    report = convert_cases(
        discover(list(pairs), dataset="liver", pairs=pairs), tmp_path_factory.mktemp("l") / "s.zarr", ABDOMEN.region
    )
    assert report.exit_code == 0, report
    return open_store(report.store)


def test_labels_keep_their_volume_on_a_finer_grid(abdomen: Store, data_dir: Path) -> None:
    # 3 mm to 1.5 mm: every voxel becomes eight, up to the rounding of the border
    source: Any = nibabel.load(data_dir / "totalseg_example" / "example_ct_sm_label_abdomen.nii.gz")
    before = np.bincount(np.asarray(source.dataobj).ravel(), minlength=7) * 27.0
    after = np.array(abdomen.row("liver/example_ct_sm")["class_voxels"]) * 1.5**3
    present = before[1:] > 0
    assert present.sum() == 3
    np.testing.assert_allclose(after[1:][present], before[1:][present], rtol=0.02)


def test_the_liver_is_where_its_label_says_in_dicom_too(abdomen: Store) -> None:
    patch = abdomen.read_volume("liver/series")
    assert (
        40 < np.median(patch.image[patch.label == 1]) < 160
    )  # contrast CT: a flip would give a mixture with air and fat
    assert patch.image[patch.label == 1].std() < 60


CHEST = Config.preset("chest").with_overrides(
    {
        "region.patch_zyx": (16, 96, 96),
        "network.name": "unet",
        "network.channels": (8, 16, 32),
        "training.batch_size": 2,
        "training.steps": 20,
        "training.warmup_steps": 2,
        "training.log_every": 1,
        "training.learning_rate": 3e-3,
        "inference.overlap": 0.25,
        "synthesis.size_weights": {"tiny": 1.0},
    }
)


@pytest.fixture(scope="module")
def chest(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The two scans with real lung tumours."""
    sources = discover([data_dir / "lung4d_113", data_dir / "ibsi1_lung"], dataset="lung")
    report = convert_cases(sources, tmp_path_factory.mktemp("c") / "s.zarr", CHEST.region)
    assert report.exit_code == 0, report
    store = open_store(report.store)
    assert store.index.column("num_tumors").to_pylist() == [1, 1]
    return store


@pytest.mark.parametrize("region", ["abdomen", "chest"])
def test_preview_paints_real_liver_and_real_lung(region: str, abdomen: Store, chest: Store, tmp_path: Path) -> None:
    store = abdomen if region == "abdomen" else chest
    config = ABDOMEN.with_overrides({"synthesis.size_weights": {"small": 1.0}}) if region == "abdomen" else CHEST
    sheets = preview(config, store, tmp_path, num_sheets=2)
    assert len(sheets) == 2
    for sheet in sheets:
        assert sheet.path.read_bytes()[:4] == b"\x89PNG"
        assert sheet.contrast_hu < -15 if region == "abdomen" else sheet.contrast_hu > 15


def test_online_synthesis_on_real_liver_keeps_the_loaders_contract(abdomen: Store) -> None:
    config = ABDOMEN.with_overrides({"training.batch_size": 2})
    stage = build_synthesis_stage(config, None, None)
    with build_loader(config, abdomen, stages=(stage,)) as loader:
        batch = next(iter(loader))
    assert batch.image.shape == (2, 1, 96, 96, 96)
    assert batch.label.dtype == torch.uint8


def test_training_prediction_and_evaluation_on_real_lung_tumors(chest: Store, data_dir: Path, tmp_path: Path) -> None:
    result = train_segmentation(CHEST, chest.path, tmp_path / "run")
    assert result.steps == 20
    assert sum(result.losses[-5:]) < sum(result.losses[:5])
    network, config = load_segmenter(result.checkpoint)
    source = discover([data_dir / "lung4d_113"], dataset="p")[0]
    model = Model(network, config, "a test's", torch.device("cpu"))
    (prediction,) = predict_cases([FileInput(source)], model, tmp_path / "out", PredictOptions())
    assert prediction.status == "predicted", prediction.reason
    written: Any = nibabel.load(prediction.path)
    image: Any = nibabel.load(source.image)
    assert written.shape == image.shape
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
    scores = evaluate_checkpoint(result.checkpoint, chest, device=torch.device("cpu"), cases=["lung/4D-Lung_113"])
    document = scores.to_json()
    assert document["summary"]["lesion"]["num_volumes_with_truth"] == 1
    assert 0 <= document["summary"]["lesion"]["dice"] <= 1
    json.dumps(document, allow_nan=False)
