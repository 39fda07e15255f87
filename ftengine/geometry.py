"""Voxel grids, boxes and units: the only place where millimetres become voxels and where other axis orders are met.

Inside ftengine every array is indexed z, y, x and every volume is RAS+ (index growing towards the patient's right, anterior
and superior side). A ``Grid`` says where such an array lies in the patient. nibabel and MONAI index x, y, z; SimpleITK uses
LPS world coordinates: both are converted here and nowhere else.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, ConfigError, FailureCode

IntZYX: TypeAlias = tuple[int, int, int]
FloatZYX: TypeAlias = tuple[float, float, float]
ScalarT = TypeVar("ScalarT", bound=np.generic)

MIN_SPACING_MM, MAX_SPACING_MM = 0.1, 20.0  # outside, the header is in metres or microns, or broken
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Box:
    """A box of voxels: ``origin_zyx`` may be negative or lie outside a volume; ``shape_zyx`` is positive."""

    origin_zyx: IntZYX
    shape_zyx: IntZYX

    @property
    def end_zyx(self) -> IntZYX:
        """First index behind the box on each axis."""
        return int_zyx(o + n for o, n in zip(self.origin_zyx, self.shape_zyx, strict=True))

    def inside(self, shape_zyx: IntZYX) -> "Box":
        """The part of the box that lies in a volume of ``shape_zyx``; an axis without overlap has length 0."""
        start = [min(max(o, 0), n) for o, n in zip(self.origin_zyx, shape_zyx, strict=True)]
        stop = [min(max(e, 0), n) for e, n in zip(self.end_zyx, shape_zyx, strict=True)]
        return Box(int_zyx(start), int_zyx(max(0, b - a) for a, b in zip(start, stop, strict=True)))

    def moved(self, origin_zyx: IntZYX) -> "Box":
        """The same box, seen from another one that begins at ``origin_zyx``."""
        return Box(int_zyx(a - b for a, b in zip(self.origin_zyx, origin_zyx, strict=True)), self.shape_zyx)

    def slices(self) -> tuple[slice, slice, slice]:
        """Numpy slices of the box; only for boxes without negative coordinates."""
        z, y, x = (slice(o, o + n) for o, n in zip(self.origin_zyx, self.shape_zyx, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Grid:
    """Where an array indexed z, y, x lies in the patient.

    ``affine_ras``: 4 x 4, row-major, from voxel (x, y, z, 1) - the array's axes reversed - to RAS+ millimetres of the voxel's
    centre; the convention of NIfTI and nibabel for an array indexed x, y, z.
    """

    shape_zyx: IntZYX
    affine_ras: tuple[float, ...]

    @property
    def matrix(self) -> NDArray[np.float64]:
        """``affine_ras`` as a 4 x 4 array."""
        return np.array(self.affine_ras, dtype=np.float64).reshape(4, 4)

    @property
    def spacing_mm_zyx(self) -> FloatZYX:
        """Distance of neighbouring voxels along each array axis."""
        x, y, z = np.linalg.norm(self.matrix[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def is_ras(self) -> bool:
        """Whether each array axis runs along its own patient axis, in the RAS+ direction (obliqueness below 45 degrees allowed)."""
        return ras_permutation(self) == ((0, 1, 2), (False, False, False))


def grid_from_matrix(shape_zyx: IntZYX, matrix: NDArray[np.float64]) -> Grid:
    """The ``Grid`` of an array of ``shape_zyx`` with a 4 x 4 (x, y, z) -> RAS+ mm ``matrix``."""
    return Grid(shape_zyx, tuple(float(v) for v in np.asarray(matrix, dtype=np.float64).reshape(16)))


def int_zyx(values: Any) -> IntZYX:
    """Three integers, z y x, from any iterable."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def float_zyx(values: Any) -> FloatZYX:
    """Three floats, z y x, from any iterable."""
    z, y, x = (float(v) for v in values)
    return z, y, x


def reverse_axes(array: NDArray[ScalarT]) -> NDArray[ScalarT]:
    """An x, y, z array as z, y, x or the reverse: a view with the axes in the opposite order."""
    return array.transpose(tuple(reversed(range(array.ndim))))


def mm_to_vox(length_mm_zyx: FloatZYX | float, spacing_mm_zyx: FloatZYX) -> FloatZYX:
    """Millimetres as voxels per axis: 1.2 mm at (2.5, 0.8, 0.8) mm is (0.48, 1.5, 1.5) voxels."""
    lengths = (length_mm_zyx,) * 3 if isinstance(length_mm_zyx, (int, float)) else length_mm_zyx
    return float_zyx(length / spacing for length, spacing in zip(lengths, spacing_mm_zyx, strict=True))


def checked_grid(grid: Grid, where: str, *, tolerance: float = 2e-3) -> Grid:
    """The grid with exactly orthogonal axes, or a CaseError.

    Axes whose directions are off by rounding (cosines up to ``tolerance`` from orthogonal; 2e-4 is common in public data sets)
    are replaced by the nearest orthogonal ones (polar decomposition). A true shear, a spacing outside 0.1..20 mm, an empty axis
    or a non-finite entry is refused: resampling such a grid as if it were regular moves the anatomy.
    """
    matrix = grid.matrix
    if not np.isfinite(matrix).all():
        raise CaseError(
            f"{where}: the affine holds NaN or infinity; want finite numbers.",
            "Repair the header or leave the case out.",
            code=FailureCode.NO_POSITION if np.isfinite(matrix[:, :3]).all() else FailureCode.BAD_SPACING,
        )
    if min(grid.shape_zyx) < 1:
        raise CaseError(
            f"{where}: shape_zyx={grid.shape_zyx} has an empty axis; want a volume.",
            "Leave the case out.",
            code=FailureCode.NOT_A_VOLUME,
        )
    spacing = grid.spacing_mm_zyx
    if any(not MIN_SPACING_MM <= s <= MAX_SPACING_MM for s in spacing):
        shown = tuple(round(s, 6) for s in spacing)
        raise CaseError(
            f"{where}: spacing_mm_zyx={shown}; want {MIN_SPACING_MM} to {MAX_SPACING_MM} mm on each axis.",
            "The header is broken or not in millimetres: repair it or leave the case out.",
            code=FailureCode.BAD_SPACING,
        )
    spacing_xyz = np.array(spacing[::-1])
    directions = matrix[:3, :3] / spacing_xyz
    u, _, vt = np.linalg.svd(directions)
    nearest = u @ vt
    deviation = float(np.abs(nearest - directions).max())
    if deviation > tolerance:
        cosines = directions.T @ directions
        angle = math.degrees(math.asin(min(1.0, float(np.abs(cosines - np.diag(np.diag(cosines))).max()))))
        raise CaseError(
            f"{where}: the affine is sheared by {angle:.1f} degrees (its axes are off orthogonal by {deviation:.3g}, {tolerance} is allowed), "
            "as from a tilted gantry; want axes at right angles.",
            "Resample the volume to a regular grid first or leave the case out.",
            code=FailureCode.SHEARED,
        )
    exact = matrix.copy()
    exact[:3, :3] = nearest * spacing_xyz
    return grid_from_matrix(grid.shape_zyx, exact)


def ras_permutation(grid: Grid) -> tuple[IntZYX, tuple[bool, bool, bool]]:
    """How to bring the array to RAS+: (source axis of each new z, y, x axis, whether that source axis is flipped)."""
    directions = grid.matrix[:3, :3] / np.linalg.norm(grid.matrix[:3, :3], axis=0)
    # the patient axis (0 R, 1 A, 2 S) of each voxel axis x, y, z: the assignment with the largest sum of cosines
    best = max(
        ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)),
        key=lambda p: sum(abs(directions[p[i], i]) for i in range(3)),
    )
    source = [0, 0, 0]
    flip = [False, False, False]
    for voxel_axis, patient_axis in enumerate(best):
        source[2 - patient_axis] = 2 - voxel_axis
        flip[2 - patient_axis] = bool(directions[patient_axis, voxel_axis] < 0)
    return int_zyx(source), (flip[0], flip[1], flip[2])


def to_ras(array: NDArray[ScalarT], grid: Grid) -> tuple[NDArray[ScalarT], Grid]:
    """The array with its axes permuted and flipped to RAS+ z, y, x, C-contiguous, and its new grid. No voxel value changes."""
    source, flip = ras_permutation(grid)
    moved = array.transpose(source)
    moved = moved[tuple(slice(None, None, -1) if f else slice(None) for f in flip)]
    return np.ascontiguousarray(moved), ras_grid(grid)


def ras_grid(grid: Grid) -> Grid:
    """The grid that ``to_ras`` gives an array on ``grid``."""
    source, flip = ras_permutation(grid)
    to_old = np.zeros((4, 4))  # new voxel (x, y, z, 1) -> old voxel (x, y, z, 1)
    to_old[3, 3] = 1.0
    for new_axis in range(3):
        old_axis = source[new_axis]
        to_old[2 - old_axis, 2 - new_axis] = -1.0 if flip[new_axis] else 1.0
        if flip[new_axis]:
            to_old[2 - old_axis, 3] = grid.shape_zyx[old_axis] - 1
    return grid_from_matrix(int_zyx(grid.shape_zyx[axis] for axis in source), grid.matrix @ to_old)


def from_ras(array: NDArray[ScalarT], native: Grid) -> NDArray[ScalarT]:
    """Undo ``to_ras``: an array on the RAS+ form of ``native`` back in the native axis order and directions."""
    source, flip = ras_permutation(native)
    moved = array[tuple(slice(None, None, -1) if f else slice(None) for f in flip)]
    return np.ascontiguousarray(moved.transpose(tuple(int(i) for i in np.argsort(source))))


def resampled_grid(grid: Grid, spacing_mm_zyx: FloatZYX) -> Grid:
    """The grid with the same axes, centre and (to within half a voxel) extent, at another spacing."""
    old = grid.spacing_mm_zyx
    shape = int_zyx(max(1, round(n * o / s)) for n, o, s in zip(grid.shape_zyx, old, spacing_mm_zyx, strict=True))
    scale = np.array([s / o for o, s in zip(old, spacing_mm_zyx, strict=True)])
    first = (np.array(grid.shape_zyx) - 1) / 2 - scale * (
        np.array(shape) - 1
    ) / 2  # old index of the new voxel (0, 0, 0)
    to_old = np.diag([*scale[::-1], 1.0])
    to_old[:3, 3] = first[::-1]
    return grid_from_matrix(shape, grid.matrix @ to_old)


def index_of_origin(inner: Grid, outer: Grid) -> FloatZYX:
    """Fractional index (z, y, x), in ``outer``, of the voxel (0, 0, 0) of ``inner``; both grids have parallel axes."""
    x, y, z, _ = np.linalg.solve(outer.matrix, inner.matrix @ np.array([0.0, 0.0, 0.0, 1.0]))
    return float(z), float(y), float(x)


def grid_offset_vox(a: Grid, b: Grid) -> float:
    """Largest distance, in voxels of ``a``, between equal corner indices of two grids of one shape: 0 for the same grid."""
    corners = np.array(
        [
            [x, y, z, 1.0]
            for x in (0, a.shape_zyx[2] - 1)
            for y in (0, a.shape_zyx[1] - 1)
            for z in (0, a.shape_zyx[0] - 1)
        ]
    )
    difference = np.linalg.solve(a.matrix, (corners @ b.matrix.T).T).T - corners
    return float(np.abs(difference[:, :3]).max())


def grid_from_sitk(image: Any) -> Grid:
    """The grid of the first three axes of a SimpleITK image, or of a reader whose header is read.

    Its array (``GetArrayFromImage``) is z, y, x and its world is LPS.
    """
    matrix = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)
    matrix[:3, :3] = direction[:3, :3] * np.array(image.GetSpacing()[:3])
    matrix[:3, 3] = image.GetOrigin()[:3]
    return grid_from_lps(int_zyx(reversed(image.GetSize()[:3])), matrix)


def grid_from_lps(shape_zyx: IntZYX, matrix: NDArray[np.float64]) -> Grid:
    """The grid of an array of ``shape_zyx`` whose (x, y, z) -> world 4 x 4 ``matrix`` is in LPS mm, as DICOM and ITK write it."""
    return grid_from_matrix(shape_zyx, _LPS_TO_RAS @ matrix)


def grid_from_codes(shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX, codes: str) -> Grid:
    """The grid of an array without a header's orientation: ``codes`` names where its x, y and z axes run to, such as "LPS" or "RAS".

    Voxel (0, 0, 0) lies at the origin. Raises ConfigError for anything but three letters, one of each pair R/L, A/P, S/I.
    """
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1.0
    letters = codes.upper()
    used = [next((axis for axis, pair in enumerate(("RL", "AP", "SI")) if letter in pair), -1) for letter in letters]
    if sorted(used) != [0, 1, 2]:
        raise ConfigError(
            f"assumed orientation {codes!r}; want three letters, one of each pair R/L, A/P and S/I, such as RAS or LPS."
        )
    for voxel_axis, (patient_axis, letter) in enumerate(zip(used, letters, strict=True)):
        matrix[patient_axis, voxel_axis] = spacing_mm_zyx[2 - voxel_axis] * (1.0 if letter in "RAS" else -1.0)
    return grid_from_matrix(shape_zyx, matrix)


def sitk_frame(grid: Grid) -> dict[str, tuple[float, ...]]:
    """``origin``, ``spacing`` and ``direction`` (row-major 3 x 3) of the grid for a SimpleITK image, in LPS."""
    matrix = _LPS_TO_RAS @ grid.matrix
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    return {
        "origin": tuple(float(v) for v in matrix[:3, 3]),
        "spacing": tuple(float(v) for v in spacing),
        "direction": tuple(float(v) for v in (matrix[:3, :3] / spacing).ravel()),
    }
