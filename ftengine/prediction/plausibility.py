"""Warnings about a prediction: a scan that shows something else than the network was trained for.

A network gives a label map for anything. What is checked: whether the numbers can be HU of a body, how much of the body the scan covers,
and whether each organ of the region was found at all. Limits are wide: a warning means that somebody should look.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.geometry import FloatZYX

# Predicted organ, with its tumour, below which an adult's scan hardly shows it: a fifth or less of a small healthy one. Both kidneys, both lungs.
ORGAN_FLOOR_ML: Mapping[str, float] = {"liver": 200.0, "pancreas": 10.0, "kidney": 40.0, "lung": 400.0}
OTHER_FLOOR_ML = 1.0
LEAST_EXTENT_MM = 80.0  # of the scan along any axis: less shows no organ whole
AIR_HU, SOFT_HU = -300.0, (-150.0, 250.0)  # air and lung lie below; fat, organs with and without contrast inside
LEAST_SOFT = 0.02  # share of the voxels
LEAST_RANGE_HU = 300.0  # between the lowest and the highest voxel
_SAMPLED_VOXELS = 1 << 21


def implausible_scan(image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> list[str]:
    """What is odd about a CT, one sentence each. image_hu: int16 [z, y, x], RAS+."""
    found = []
    extent = [n * mm for n, mm in zip(image_hu.shape, spacing_mm_zyx, strict=True)]
    short = [f"{mm:.0f} mm along {axis}" for axis, mm in zip("zyx", extent, strict=True) if mm < LEAST_EXTENT_MM]
    if short:
        found.append(
            f"the scan covers only {' and '.join(short)}; want at least {LEAST_EXTENT_MM:.0f} mm to show an organ"
        )
    step = max(1, math.ceil((image_hu.size / _SAMPLED_VOXELS) ** (1 / 3)))
    sample = image_hu[::step, ::step, ::step]
    low, high = int(sample.min()), int(sample.max())
    soft = float(np.mean((sample >= SOFT_HU[0]) & (sample <= SOFT_HU[1])))
    if high - low < LEAST_RANGE_HU:
        found.append(f"its values run from {low} to {high}, which no CT in HU does: was it windowed, or is it no CT?")
        return found
    if low > AIR_HU:
        found.append(f"it shows no air (its lowest value is {low}; want below {AIR_HU:.0f} HU): is it a CT in HU?")
    if soft < LEAST_SOFT:
        found.append(
            f"only {soft:.1%} of it is soft tissue ({SOFT_HU[0]:.0f} to {SOFT_HU[1]:.0f} HU; want {LEAST_SOFT:.0%}): is it a CT in HU, and of a body?"
        )
    return found


def missing_organs(class_ml: Mapping[str, float], region: RegionConfig) -> list[str]:
    """Which organs of the region a prediction hardly holds, one sentence. class_ml: predicted volume of each label name."""
    names = {value: name for name, value in region.labels.items()}
    absent = []
    for organ, of_organ in region.organs.items():
        volume_ml = class_ml[names[of_organ.organ]] + class_ml[names[of_organ.tumor]]
        floor_ml = ORGAN_FLOOR_ML.get(organ, OTHER_FLOOR_ML)
        if volume_ml < floor_ml:
            absent.append(f"{volume_ml:.3g} ml of {organ} (floor {floor_ml:g} ml)")
    if not absent:
        return []
    what = (
        f"none of the organs of region {region.name} was found; the scan seems to show another region"
        if len(absent) == len(region.organs)
        else "the scan may not show it"
    )
    return [f"predicted only {', '.join(absent)}: {what}"]
