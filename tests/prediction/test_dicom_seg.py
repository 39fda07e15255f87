"""DICOM segmentations: read back by highdicom and by pydicom alone, in the place and with the codes they should have."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from ftengine.config import Config
from ftengine.errors import CaseError
from ftengine.geometry import Grid
from ftengine.prediction.dicom_seg import read_series, write_dicom_seg
from ftengine.prediction.inputs import find_inputs
from ftengine.prediction.predict import Model, PredictOptions, predict_cases
from ftengine.volume.dicom import load_dicom, ordered_slices
from tests.prediction.test_predict import nearest_mean
from tests.recipes import edit_slice, save_series
from tests.support import small_config

highdicom = pytest.importorskip("highdicom")
ABDOMEN = Config.preset("abdomen").region
SHA256 = "ab" * 32
TURNED = [0.8, 0.6, 0.0, -0.6, 0.8, 0.0]  # rows and columns turned in their plane


def labelled(folder: Path, **tags: Any) -> tuple[NDArray[np.uint8], Grid, list[Any]]:
    save_series(folder, 7, FrameOfReferenceUID=generate_uid(), **tags)
    grid = load_dicom(folder).grid
    label = np.random.default_rng(0).integers(0, 7, grid.shape_zyx).astype(np.uint8)
    label[0] = 0  # a frame without any segment
    label[label == 4] = 0  # a segment without any voxel
    return label, grid, read_series(ordered_slices(folder), "c")


def place_key(place_mm: NDArray[np.float64]) -> tuple[int, ...]:
    """A place to within 0.1 mm; no place of these grids lies at the border of two such steps."""
    return tuple(np.floor(place_mm[:3] * 10 + 0.123).astype(int).tolist())


def by_pydicom(path: Path) -> tuple[dict[tuple[int, ...], int], Any]:
    """Label by place (LPS, ``place_key``), frame by frame as the standard says."""
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    found: dict[tuple[int, ...], int] = {}
    for pixels, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        segment = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for row, column in np.argwhere(pixels):
            place = position + orientation[:3] * column * spacing[1] + orientation[3:] * row * spacing[0]
            key = place_key(place)
            assert key not in found  # classes exclude one another
            found[key] = segment
    return found, data


def expected_places(label: NDArray[np.uint8], grid: Grid) -> dict[tuple[int, ...], int]:
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.matrix
    return {place_key(to_lps @ (x, y, z, 1)): int(label[z, y, x]) for z, y, x in np.argwhere(label)}


@pytest.mark.parametrize("tags", [{}, {"ImageOrientationPatient": TURNED}])
def test_every_voxel_lies_where_it_was_predicted(tmp_path: Path, tags: dict[str, Any]) -> None:
    label, grid, slices = labelled(tmp_path / "s", **tags)
    path = tmp_path / "o.seg.dcm"
    write_dicom_seg(path, label, grid, slices, ABDOMEN, SHA256)
    places, data = by_pydicom(path)
    assert places == expected_places(label, grid)
    assert data.SegmentationType == "BINARY"
    read = highdicom.seg.segread(path)
    volume = read.get_volume(combine_segments=True)
    theirs = np.asarray(volume.affine)
    # highdicom's axes are slices, rows, columns, in LPS; it leaves out the empty frame
    found = {place_key(theirs @ (z, y, x, 1)): int(volume.array[z, y, x]) for z, y, x in np.argwhere(volume.array)}
    assert found == places
    referenced = {str(i.ReferencedSOPInstanceUID) for i in data.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referenced == {str(s.SOPInstanceUID) for s in slices}


def test_segments_are_named_and_coded(tmp_path: Path) -> None:
    label, grid, slices = labelled(tmp_path / "s")
    write_dicom_seg(tmp_path / "o.dcm", label, grid, slices, ABDOMEN, SHA256)
    _, data = by_pydicom(tmp_path / "o.dcm")

    def coded(segment: Any) -> tuple[str, ...]:
        regions = segment.get("AnatomicRegionSequence", [])
        codes = (
            segment.SegmentedPropertyCategoryCodeSequence[0],
            segment.SegmentedPropertyTypeCodeSequence[0],
            *regions,
        )
        assert {code.CodingSchemeDesignator for code in codes} == {"SCT"}
        return tuple(str(code.CodeValue) for code in codes)

    found = {s.SegmentLabel: (int(s.SegmentNumber), *coded(s)) for s in data.SegmentSequence}
    organ, tumor = "91723000", "49755003"  # Anatomical Structure, Morphologically Abnormal Structure
    assert found == {
        "liver": (1, organ, "10200004"),
        "liver_tumor": (2, tumor, "108369006", "10200004"),
        "pancreas": (3, organ, "15776009"),
        "pancreas_tumor": (4, tumor, "108369006", "15776009"),
        "kidney": (5, organ, "64033007"),
        "kidney_tumor": (6, tumor, "108369006", "64033007"),
    }
    assert all(s.SegmentAlgorithmType == "AUTOMATIC" for s in data.SegmentSequence)
    chest = Config.preset("chest").region
    write_dicom_seg(tmp_path / "c.dcm", np.minimum(label, 2), grid, slices, chest, SHA256)
    found = {
        s.SegmentLabel: (int(s.SegmentNumber), *coded(s)) for s in by_pydicom(tmp_path / "c.dcm")[1].SegmentSequence
    }
    assert found == {"lung": (1, organ, "39607008"), "lesion": (2, tumor, "52988006", "39607008")}


def test_nothing_predicted_is_a_segmentation_too(tmp_path: Path) -> None:
    label, grid, slices = labelled(tmp_path / "s")
    write_dicom_seg(tmp_path / "o.dcm", np.zeros_like(label), grid, slices, ABDOMEN, SHA256)
    places, data = by_pydicom(tmp_path / "o.dcm")
    assert places == {}
    assert len(data.SegmentSequence) == 6


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "FrameOfReferenceUID", "StudyInstanceUID"])
def test_a_series_that_cannot_be_referred_to_is_refused(tmp_path: Path, keyword: str) -> None:
    paths = save_series(tmp_path / "s", 5, FrameOfReferenceUID=generate_uid())
    data = pydicom.dcmread(paths[2])
    data[keyword].value = ""
    data.save_as(paths[2])
    with pytest.raises(CaseError, match=keyword):
        read_series(ordered_slices(tmp_path / "s"), "c")


def test_slices_that_are_not_the_grid_s_are_refused(tmp_path: Path) -> None:
    label, grid, slices = labelled(tmp_path / "s")
    for wrong in (slices[1:], slices[::-1]):
        with pytest.raises(CaseError, match="not those of the predicted grid"):
            write_dicom_seg(tmp_path / "o.dcm", label, grid, wrong, ABDOMEN, SHA256)
    assert not (tmp_path / "o.dcm").exists()


def test_predict_writes_one_for_a_series(tmp_path: Path) -> None:
    config = small_config(inference__overlap=0.25)
    paths = save_series(tmp_path / "in", 7, gap_mm=5.0, FrameOfReferenceUID=generate_uid())
    edit_slice(paths[0], InstanceNumber=99)
    inputs = find_inputs([str(tmp_path / "in")], config, "w")
    model = Model(nearest_mean(), config, SHA256, torch.device("cpu"))
    (seg,) = predict_cases(inputs, model, tmp_path / "out", PredictOptions(file_format="dicom-seg"))
    assert seg.status == "predicted", seg.reason
    assert Path(seg.path).name == "in.seg.dcm"
    places, data = by_pydicom(Path(seg.path))
    assert str(data.StudyInstanceUID) == "1.2.3"
    (again,) = predict_cases(inputs, model, tmp_path / "out", PredictOptions(file_format="dicom-seg"))
    assert again.status == "complete"
    counts = {value: list(places.values()).count(value) for value in (1, 2)}
    assert {
        config.region.labels[name]: count for name, count in seg.class_voxels.items() if name != "background"
    } == counts
    (nifti,) = predict_cases(inputs, model, tmp_path / "out", PredictOptions())
    assert nifti.class_voxels == seg.class_voxels
    assert not Path(seg.path).exists()  # one prediction a case
