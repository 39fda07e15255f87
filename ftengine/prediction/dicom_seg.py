"""A label map as a DICOM Segmentation object that refers to the slices it was predicted from (extra ``dicom-seg``: highdicom).

Unlike everything else that ftengine writes, such a file carries the patient's identity: the standard wants it to belong to the patient and
study of its series, so highdicom copies those modules from the slices.

Segments are named as the classes and coded with SNOMED CT (CID 7150 and the organs of DICOM PS3.16): an organ is an Anatomical Structure,
a tumour a Morphologically Abnormal Structure of type Neoplasm in its organ, a COVID-19 lesion of type Lesion.
"""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine import __version__
from ftengine.config import RegionConfig
from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.geometry import Grid, grid_from_lps, grid_offset_vox

MAX_OFFSET_VOX = 0.1  # of a slice from its place on the grid of the prediction; the tolerance that reading has
_ORGANS = {"liver": "Liver", "pancreas": "Pancreas", "kidney": "Kidney", "lung": "Lung"}  # keyword in pydicom's SCT
_LABEL_CHARACTERS = 64  # of DICOM's long strings
# what the standard wants in every object but lets be empty (type 2); anonymised series often lack it
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip
_WANTED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def check_installed() -> None:
    """ConfigError where highdicom is missing."""
    if find_spec("highdicom") is None:
        raise ConfigError("--format dicom-seg: needs highdicom; pip install 'ftengine[dicom-seg]'.")


def read_series(files: Sequence[Path], case: str) -> list[Any]:
    """The headers of a series' slices; CaseError where a segmentation could not refer to them. files: one a slice."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes header values in its warnings
        return [_completed(pydicom.dcmread(file, stop_before_pixels=True), case) for file in files]


def write_dicom_seg(
    path: Path,
    label: NDArray[np.uint8],
    grid: Grid,
    slices: Sequence[Any],
    region: RegionConfig,
    checkpoint_sha256: str,
) -> None:
    """Write a binary segmentation, one segment a class of ``region`` but the background, frames without a voxel left out.

    label: uint8 [z, y, x] on ``grid``, the native grid of the series. slices: what ``read_series`` gave, in the order of the grid. Raises
    CaseError where they do not lie where the slices of the grid are, or where highdicom refuses their headers.
    """
    import highdicom
    from pydicom.uid import generate_uid

    _check_places(slices, grid, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        try:
            segmentation = highdicom.seg.Segmentation(
                source_images=slices,
                pixel_array=label,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_segments(region, checkpoint_sha256),
                series_instance_uid=generate_uid(),
                series_number=1000,
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="ftengine",
                manufacturer_model_name="ftengine",
                software_versions=__version__,
                device_serial_number=checkpoint_sha256[:16],
                content_description="Predicted, not reviewed",
                content_label="PREDICTION",
                series_description=f"ftengine {region.name}"[:_LABEL_CHARACTERS],
                omit_empty_frames=bool(label.any()),  # without any segmented voxel all frames stay: there must be one
            )
            segmentation.save_as(path)
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            raise CaseError(
                f"{path.name}: the series' headers do not make a DICOM segmentation ({type(error).__name__}).",
                "Use --format nifti for it.",
                code=FailureCode.DAMAGED_HEADER,
            ) from error  # its text may quote header values: only its kind is shown


def _completed(header: Any, case: str) -> Any:
    """A slice's header with what may be empty but must be there; CaseError where it lacks what must have a value."""
    missing = [keyword for keyword in _WANTED if not header.get(keyword)]
    if missing:
        raise CaseError(
            f"{case}: a slice has no {', '.join(missing)}, to which a DICOM segmentation refers.",
            "Use --format nifti for it.",
            code=FailureCode.DAMAGED_HEADER,
        )
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    return header


def _check_places(slices: Sequence[Any], grid: Grid, path: Path) -> None:
    """CaseError where a slice lies elsewhere than its index on the grid says."""
    offset = np.inf
    if len(slices) == grid.shape_zyx[0]:
        offset = max(
            grid_offset_vox(_moved_to(grid, number), _grid_of(header, grid)) for number, header in enumerate(slices)
        )
    if offset > MAX_OFFSET_VOX:
        raise CaseError(
            f"{path.name}: the slices of the series are not those of the predicted grid ({len(slices)} files for {grid.shape_zyx[0]} slices, up to "
            f"{offset:.2f} voxels off).",
            "Use --format nifti for it.",
            code=FailureCode.GRID_MISMATCH,
        )


def _moved_to(grid: Grid, number: int) -> Grid:
    """The grid's slice ``number`` as a grid of one slice."""
    matrix = grid.matrix
    matrix[:3, 3] += number * matrix[:3, 2]
    return Grid((1, *grid.shape_zyx[1:]), tuple(matrix.ravel()))


def _grid_of(header: Any, grid: Grid) -> Grid:
    """A slice's own grid by its header; across the slice that of ``grid``, which the header of one slice does not know."""
    row, column = np.array(header.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    spacing_y, spacing_x = (float(mm) for mm in header.PixelSpacing)
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 3] = row * spacing_x, column * spacing_y, header.ImagePositionPatient
    found = grid_from_lps((1, int(header.Rows), int(header.Columns)), matrix).matrix
    found[:3, 2] = grid.matrix[:3, 2]
    return Grid((1, int(header.Rows), int(header.Columns)), tuple(found.ravel()))


def _segments(region: RegionConfig, checkpoint_sha256: str) -> list[Any]:
    """One description a class, in the order of the label values: segment number = label value."""
    import highdicom
    from pydicom.sr.codedict import codes

    organ_of = {o.organ: name for name, o in region.organs.items()} | {
        o.tumor: name for name, o in region.organs.items()
    }
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="ftengine",
        family=codes.DCM.ArtificialIntelligence,
        version=f"{__version__}, checkpoint {checkpoint_sha256[:16]}",
    )
    descriptions = []
    for name, value in sorted(region.labels.items(), key=lambda item: item[1]):
        if value == 0:
            continue
        organ = _ORGANS.get(organ_of.get(value, ""))
        region_code = None if organ is None else getattr(codes.SCT, organ)
        is_tumor = value in region.tumor_values
        if is_tumor:
            category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm
            if name == "lesion":  # of the chest preset: tumours and COVID-19 lesions are one class
                kind = codes.SCT.Lesion
        else:
            category, kind = codes.SCT.AnatomicalStructure, region_code or codes.SCT.Organ
        descriptions.append(
            highdicom.seg.SegmentDescription(
                segment_number=value,
                segment_label=name[:_LABEL_CHARACTERS],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                anatomic_regions=[region_code] if is_tumor and region_code is not None else None,
            )
        )
    return descriptions
