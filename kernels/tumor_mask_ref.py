"""The tumour mask as the law tells it: fill an ellipsoid's box, warp the box three times, paste it; in float64."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

PLANES = ((0, 1), (1, 2), (0, 2))  # of the axes x, y, z, in the order in which they are warped


def tumor_mask_ref(
    center_zyx: ArrayLike,
    radii_zyx: ArrayLike,
    warp: ArrayLike,
    shape_zyx: tuple[int, int, int],
    organ: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """One tumour: centre [3], radii [3] and warp [3, 2, 3, 3] in voxels, organ [z, y, x] or None -> uint8 [z, y, x]."""
    center_xyz = [int(c) for c in np.asarray(center_zyx)[::-1]]
    radii_xyz = [float(r) for r in np.asarray(radii_zyx)[::-1]]
    box = ellipsoid_box(radii_xyz)
    for plane, nodes in zip(PLANES, np.asarray(warp, dtype=np.float64), strict=True):
        box = _warped(box, plane, nodes)
    mask = _pasted(box, center_xyz, shape_zyx[::-1]).transpose(2, 1, 0)
    if organ is not None:
        mask = mask & (np.asarray(organ) > 0)
    return np.ascontiguousarray(mask, dtype=np.uint8)


def ellipsoid_box(radii_xyz: list[float]) -> NDArray[np.bool_]:
    """The ellipsoid in its box of n = 2 ceil(2 r) voxels per axis, centre at n / 2: inside where 1 - sum(u**2) > 0.

    u counts from -ceil(r) / r in steps of 1 / r, as start + i * step. For whole radii, from -1 to 1, that is the
    released rounding of the voxels exactly on the surface.
    """
    squares = []
    for radius in radii_xyz:
        half, reach = math.ceil(2 * radius), math.ceil(radius)
        u = np.full(2 * half, np.inf)
        for i in range(2 * reach + 1):
            if half - reach + i < 2 * half:
                u[half - reach + i] = -reach / radius + i * (1 / radius)
        squares.append(u**2)
    x, y, z = squares
    total = x[:, None, None] + y[None, :, None] + z[None, None, :]
    inside: NDArray[np.bool_] = 1 - total > 0
    return inside


def spline_basis(size: int) -> NDArray[np.float64]:
    """B of the law, [size, 3]: cubic B-spline interpolation of three values at positions 2 i / (size - 1).

    The ends are mirrored. Interpolation means that the coefficients are chosen so that the spline meets the values.
    """
    nodes = np.arange(3.0)
    return _mirrored_splines(np.arange(size) * 2 / (size - 1)) @ np.linalg.inv(_mirrored_splines(nodes))


def _mirrored_splines(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """[len(position), 3]: the sum, per coefficient, of its B-spline and of that of its mirror images at 0 and 2."""
    images = ((0,), (-1, 1, 3), (2,))  # -2 and 4 are too far to matter on 0..2
    columns = [np.sum([_bspline(position - center) for center in centers], axis=0) for centers in images]
    return np.stack(columns, axis=1)


def _bspline(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    d = np.abs(distance)
    return np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0.0))


def _warped(box: NDArray[np.bool_], plane: tuple[int, int], nodes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """One warp: displacements B(n0) d B(n1)^T for each component, then the nearest voxel; nothing outside the box."""
    first, second = plane
    third = 3 - first - second
    slices = box.transpose(first, second, third)
    n0, n1 = slices.shape[:2]
    move0, move1 = (spline_basis(n0) @ component @ spline_basis(n1).T for component in nodes)
    result = np.zeros_like(slices)
    for i in range(n0):
        for j in range(n1):
            source0, source1 = i + move0[i, j], j + move1[i, j]
            if 0 <= source0 <= n0 - 1 and 0 <= source1 <= n1 - 1:
                result[i, j] = slices[math.floor(source0 + 0.5), math.floor(source1 + 0.5)]
    return result.transpose(np.argsort((first, second, third)))


def _pasted(box: NDArray[np.bool_], center_xyz: list[int], shape_xyz: tuple[int, ...]) -> NDArray[np.bool_]:
    """The box in an empty volume, its centre on the given voxel; what leaves the volume is lost."""
    volume = np.zeros(shape_xyz, dtype=bool)
    start = [c - n // 2 for c, n in zip(center_xyz, box.shape, strict=True)]
    low = [max(0, s) for s in start]
    high = [min(n, s + m) for n, s, m in zip(shape_xyz, start, box.shape, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = box[inside]
    return volume
