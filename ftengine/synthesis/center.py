"""Where a tumour's centre goes: a voxel of the eroded organ, drawn uniformly; an organ too thin to erode uses its own voxels."""

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX, IntZYX, int_zyx, mm_to_vox


def choose_center(organ: NDArray[np.bool_], margin_mm: float, spacing_mm_zyx: FloatZYX, draw: float) -> IntZYX:
    """A voxel of ``organ`` at least ``margin_mm`` from its border along every axis, or any of its voxels where there is none.

    organ: bool [z, y, x] with at least one voxel. The patch's border counts as organ, since the organ goes on behind it.
    ``draw`` in [0, 1) picks the voxel in C order. Source: design of the engine; the released code erodes one slice by 5 x 5 voxels
    and falls back to the point (0, 0, 0), which wastes the patch (reference 1.4).
    """
    box = ndi.find_objects(organ.astype(np.uint8))[0]
    inner = organ[box]
    margin = [int(m) for m in mm_to_vox(margin_mm, spacing_mm_zyx)]
    for axis, steps in enumerate(margin):
        inner = _eroded(inner, organ, box, axis, steps)
    flat = np.flatnonzero(inner)
    if not len(flat):
        inner = organ[box]
        flat = np.flatnonzero(inner)
    picked = np.unravel_index(flat[int(draw * len(flat))], inner.shape)
    return int_zyx(int(p) + s.start for p, s in zip(picked, box, strict=True))


def _eroded(
    inner: NDArray[np.bool_], organ: NDArray[np.bool_], box: tuple[slice, ...], axis: int, steps: int
) -> NDArray[np.bool_]:
    """Erosion along one axis by ``steps`` voxels; beyond the organ's box lies background, beyond the patch lies organ."""
    if steps < 1:
        return inner
    before = box[axis].start == 0
    after = box[axis].stop == organ.shape[axis]
    padding = [(0, 0)] * 3
    padding[axis] = (steps, steps)
    padded = np.pad(inner, padding)
    first, last = [slice(None)] * 3, [slice(None)] * 3
    first[axis], last[axis] = slice(0, steps), slice(padded.shape[axis] - steps, None)
    padded[tuple(first)], padded[tuple(last)] = before, after
    kept = ndi.minimum_filter1d(padded.view(np.uint8), 2 * steps + 1, axis=axis)
    middle = [slice(None)] * 3
    middle[axis] = slice(steps, padded.shape[axis] - steps)
    return kept[tuple(middle)].astype(bool)


def choose_center_released(organ: NDArray[np.bool_], draw: tuple[float, float]) -> IntZYX:
    """The released law (reference 1.4): a slice in the middle 40 % of the organ's z range, a pixel of it eroded by 5 x 5.

    Where the slice has no pixel left, (0, 0, 0) is returned as in the released code: usually an empty mask.
    """
    slices = np.flatnonzero(organ.any(axis=(1, 2)))
    if not len(slices):
        return 0, 0, 0
    first, last = int(slices[0]), int(slices[-1])
    z = first + round((0.3 + 0.4 * draw[0]) * (last - first))
    pixels = np.argwhere(ndi.binary_erosion(organ[z], np.ones((5, 5), dtype=bool), border_value=1))
    if not len(pixels):
        return 0, 0, 0
    y, x = pixels[int(draw[1] * len(pixels))]
    return z, int(y), int(x)
