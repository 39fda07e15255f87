"""From one spacing to another: volumes to the store's spacing, and predictions back to the grid of a file.

=======  ==========================================================================================
input    a RAS+ ``Volume`` and a spacing in mm; or an array and two grids with parallel axes
does     SimpleITK in index space with identity directions: oblique grids are resampled along their own axes
output   image linear, rounded half to even to int16; labels nearest; edge voxels replicate
=======  ==========================================================================================

There is no low-pass before thinning out: the released FreeTumor weights were trained on plain bilinear resampling (reference: MONAI).
"""

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX, Grid, resampled_grid, sitk_frame
from ftengine.types import Volume

ScalarT = TypeVar("ScalarT", bound=np.generic)

SAME_SPACING = 1e-4  # relative: over 1000 slices this moves nothing by more than a tenth of a voxel
# resampled_grid rounds the extent to whole voxels, so a file's outermost voxels may lie up to this far outside the store's grid
EDGE_VOX = 0.5
_PARALLEL_VOX = 0.1  # how far axes may run apart over the whole grid


def resample(volume: Volume, spacing_mm_zyx: FloatZYX) -> Volume:
    """The volume at another spacing, on ``geometry.resampled_grid``: same axes and centre, int16 HU, label uint8 or None.

    Linear for the image (computed in float, rounded half to even), nearest neighbour for the label. A volume that has the spacing
    already (1e-4 relative) keeps its voxels and its grid; only fractions are rounded. ``native`` and ``notes`` are kept.
    """
    if np.allclose(volume.grid.spacing_mm_zyx, spacing_mm_zyx, rtol=SAME_SPACING, atol=0.0):
        return replace(volume, image_hu=_rounded(volume.image_hu, np.dtype(np.int16)))
    grid = resampled_grid(volume.grid, spacing_mm_zyx)
    scale, first = _relation(volume.grid, grid)
    image = _rounded(_resampled(volume.image_hu, grid, scale, first, nearest=False), np.dtype(np.int16))
    label = None if volume.label is None else _resampled(volume.label, grid, scale, first, nearest=True)
    return replace(volume, image_hu=image, label=label, grid=grid)


def resample_to(
    array_zyx: NDArray[ScalarT], from_grid: Grid, to_grid: Grid, *, nearest: bool, outside: int
) -> NDArray[ScalarT]:
    """An array on ``from_grid`` brought to ``to_grid``, whose axes are parallel to it; the dtype stays.

    nearest: nearest neighbour (labels), else linear, rounded half to even for integer dtypes. outside: the value of voxels that lie more
    than half a voxel of ``from_grid`` outside it; nearer ones replicate its edge. Raises ValueError for axes in another order, direction
    or angle (use ``to_ras`` and ``from_ras`` around this), and for an array of another shape than ``from_grid``.
    """
    if array_zyx.shape != from_grid.shape_zyx:
        raise ValueError(f"array of shape {array_zyx.shape} on a grid of {from_grid.shape_zyx}")
    scale, first = _relation(from_grid, to_grid)
    moved = _rounded(_resampled(array_zyx, to_grid, scale, first, nearest=nearest), array_zyx.dtype)
    for axis in range(3):
        index = first[axis] + scale[axis] * np.arange(to_grid.shape_zyx[axis])
        off = (index < -0.5 - EDGE_VOX) | (index > from_grid.shape_zyx[axis] - 0.5 + EDGE_VOX)
        np.moveaxis(moved, axis, 0)[off] = outside
    return moved


def resample_label_onto(label: NDArray[np.uint8], label_grid: Grid, grid: Grid) -> NDArray[np.uint8]:
    """A label on ``label_grid`` brought to ``grid`` in the patient's coordinates by nearest neighbour; 0 outside the label's grid.

    Unlike ``resample_to`` the two grids may be turned against each other by any angle.
    """
    frame = sitk_frame(grid)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.shape_zyx[::-1])
    resampler.SetOutputOrigin(frame["origin"])
    resampler.SetOutputSpacing(frame["spacing"])
    resampler.SetOutputDirection(frame["direction"])
    resampler.SetInterpolator(sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(0)
    image = sitk.GetImageFromArray(label)
    own_frame = sitk_frame(label_grid)
    image.SetOrigin(own_frame["origin"])
    image.SetSpacing(own_frame["spacing"])
    image.SetDirection(own_frame["direction"])
    moved: NDArray[np.uint8] = sitk.GetArrayFromImage(resampler.Execute(image))
    return moved


def _relation(from_grid: Grid, to_grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """scale, first (z, y, x): voxel i of ``to_grid`` lies at index ``first + scale * i`` of ``from_grid``."""
    relation = np.asarray(np.linalg.solve(from_grid.matrix, to_grid.matrix), dtype=np.float64)
    step = relation[:3, :3]
    apart = np.abs(step - np.diag(np.diag(step))) @ (np.array(to_grid.shape_zyx[::-1]) - 1)
    if (np.diag(step) <= 0).any() or apart.max() > _PARALLEL_VOX:
        raise ValueError("the axes of the two grids are not parallel and in the same order; turn both to RAS+ first")
    return np.diag(step)[::-1].copy(), relation[:3, 3][::-1].copy()


def _resampled(
    array: NDArray[Any], to_grid: Grid, scale: NDArray[np.float64], first: NDArray[np.float64], *, nearest: bool
) -> NDArray[Any]:
    """``array`` at the index positions of ``_relation``; float32 where it is interpolated linearly, else its own dtype."""
    image = sitk.GetImageFromArray(array)  # spacing 1, origin 0, identity directions: index space
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(to_grid.shape_zyx[::-1])
    resampler.SetOutputSpacing(scale[::-1].tolist())
    resampler.SetOutputOrigin(first[::-1].tolist())
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resampler.SetOutputPixelType(image.GetPixelID() if nearest else sitk.sitkFloat32)
    resampler.UseNearestNeighborExtrapolatorOn()
    moved: NDArray[Any] = sitk.GetArrayFromImage(resampler.Execute(image))
    return moved


def _rounded(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array in ``dtype``, half to even where that drops fractions."""
    if array.dtype == dtype:
        return array
    return (np.rint(array) if dtype.kind in "iu" and array.dtype.kind == "f" else array).astype(dtype)
