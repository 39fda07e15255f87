"""Masks that tests of several measures draw: random ones, and the edge cases by name."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX
from ftengine.volume.readers import read_label

Mask = NDArray[np.bool_]
SIDES_MM = st.floats(0.3, 6.0)
SPACINGS = st.tuples(SIDES_MM, SIDES_MM, SIDES_MM)
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    """Two random masks of one shape; empty, full and sparse ones are among them."""
    shape = draw(SHAPES)
    first, second = (
        draw(arrays(np.bool_, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))) for _ in range(2)
    )
    return first, second


def edge_cases() -> dict[str, tuple[Mask, Mask, FloatZYX]]:
    """(predicted, truth, spacing) of the cases in which implementations tend to differ; none is empty."""
    empty = np.zeros((7, 8, 9), dtype=bool)
    block = empty.copy()
    block[2:5, 2:6, 3:7] = True
    corner = empty.copy()
    corner[0, 0, 0] = True
    far_corner = empty.copy()
    far_corner[-1, -1, -1] = True
    border = empty.copy()
    border[:3, :, -4:] = True
    slice_ = empty.copy()
    slice_[3] = True
    full = ~empty
    cubic, anisotropic = (1.0, 1.0, 1.0), (5.0, 0.8, 0.8)
    return {
        "equal": (block, block, cubic),
        "one voxel each, equal": (corner, corner, anisotropic),
        "one voxel each, far apart": (corner, far_corner, anisotropic),
        "one voxel in a block": (np.roll(corner, (3, 3, 4), (0, 1, 2)), block, anisotropic),
        "touching the border": (border, block, anisotropic),
        "one slice": (slice_, np.roll(slice_, 2, 0), anisotropic),
        "full against a corner": (full, corner, cubic),
        "full": (full, full, anisotropic),
        "shifted": (np.roll(block, 1, 2), block, (3.27, 0.977, 0.977)),
    }


REAL = {
    "lung4d_113/4D-Lung_113_label.nii.gz": (2,),
    "sts_sarcoma/STS_019_CT_mask.nii.gz": (1,),
    "totalseg_dicom/example_dicom_label_abdomen.nii.gz": (3,),
    "totalseg_example/example_ct_sm_label_abdomen.nii.gz": (5,),
    "ibsi1_lung/mask.nii.gz": (1,),
}


def real_pairs(data_dir: Path) -> list[tuple[str, Mask, Mask, FloatZYX]]:
    """(name, predicted, truth, spacing) of every real label: the truth, and the truth moved by a few voxels with holes and an island."""
    pairs = []
    for name, values in REAL.items():
        label, grid = read_label(data_dir / name)
        for value in values:
            truth = label == value
            predicted = np.roll(truth, (0, 2, -3), (0, 1, 2))
            predicted[np.random.default_rng(value).random(truth.shape) < 0.0005] ^= True
            pairs.append((f"{name} {value}", *_cropped(predicted, truth), grid.spacing_mm_zyx))
    return pairs


def _cropped(predicted: Mask, truth: Mask) -> tuple[Mask, Mask]:
    """To 5 voxels around the truth: the references are slow."""
    places = np.argwhere(truth)
    box = tuple(slice(max(low - 5, 0), high + 6) for low, high in zip(places.min(0), places.max(0), strict=True))
    return predicted[box], truth[box]
