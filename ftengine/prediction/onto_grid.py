"""From finished slices of scores on the store's grid to labels on the grid of a file, slice by slice.

=======  ==========================================================================================
input    ``Slab``s in order of z on one RAS+ grid; another grid whose axes are parallel to it
does     interpolates the probabilities of all classes linearly; the label is the class of the highest one
output   one slice after another of the other grid: label uint8, and on request the probabilities
=======  ==========================================================================================

Labels are not resampled by nearest neighbour: a tumour of 2 to 3 cm would come back with steps of the store's voxels (measured:
docs/prediction.md). Where all neighbours of a voxel have one class, so has every mean of them, and nothing is computed; with a trained
network that is nearly everywhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ftengine.geometry import Grid
from ftengine.prediction.sliding_windows import Slab, best_class
from ftengine.volume.resample import AxisPositions, axis_positions


@dataclass(frozen=True)
class Slice:
    """One slice of the other grid: label uint8 [y, x]; probabilities float32 [classes, y, x] on the host, or None."""

    z: int
    label: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None


def onto_grid(
    slabs: Iterable[Slab], from_grid: Grid, to_grid: Grid, *, with_probabilities: bool = False
) -> Iterator[Slice]:
    """All slices of ``to_grid`` in order of z. What lies more than half a voxel outside ``from_grid`` is background.

    slabs: the whole of ``from_grid``, in order. Raises ValueError for grids that are not parallel.
    """
    along_z, along_y, along_x = axis_positions(from_grid, to_grid)
    plane = _PlanePositions(along_y, along_x, from_grid.shape_zyx[2])
    waiting: dict[int, _Source] = {}
    next_z = 0
    for slab in slabs:
        probabilities = slab.probabilities.cpu().numpy()
        for number in range(probabilities.shape[1]):
            waiting[slab.first_z + number] = _Source(np.ascontiguousarray(probabilities[:, number]), plane)
        while next_z < len(along_z.below) and int(along_z.above[next_z]) in waiting:
            below, above = int(along_z.below[next_z]), int(along_z.above[next_z])
            weight = float(along_z.weight[next_z])
            yield _between(
                next_z,
                waiting[below],
                waiting[above],
                weight,
                is_outside=bool(along_z.outside[next_z]),
                with_probabilities=with_probabilities,
            )
            for passed in [z for z in waiting if z < below]:
                del waiting[passed]
            next_z += 1


class _PlanePositions:
    """The pixels of the other grid's planes on the planes of the store's grid."""

    def __init__(self, along_y: AxisPositions, along_x: AxisPositions, width: int) -> None:
        self.width = width
        self.rows = along_y.below, along_y.above
        self.columns = along_x.below, along_x.above
        self.row_weight, self.column_weight = (a.weight.astype(np.float32) for a in (along_y, along_x))
        self.outside = along_y.outside[:, None] | along_x.outside[None, :]


class _Source:
    """One slice of the store's grid: probabilities float32 [classes, y, x]."""

    def __init__(self, probabilities: NDArray[np.float32], plane: _PlanePositions) -> None:
        self.probabilities, self.plane = probabilities, plane

    @cached_property
    def corner_labels(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Of each pixel of the other grid the class of one neighbour in this slice, and whether all four have it."""
        label = best_class(self.probabilities)
        (top, bottom), (left, right) = self.plane.rows, self.plane.columns
        upper, lower = label.take(top, axis=0), label.take(bottom, axis=0)
        first = upper.take(left, axis=1)
        others = upper.take(right, axis=1), lower.take(left, axis=1), lower.take(right, axis=1)
        return first, np.logical_and.reduce([first == other for other in others])

    def at(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Probabilities [classes, pixels] at pixels of the other grid, interpolated in the plane."""
        plane = self.plane
        flat = self.probabilities.reshape(len(self.probabilities), -1)

        def line(row: int) -> NDArray[np.float32]:
            start = plane.rows[row][rows] * plane.width
            left, right = (flat.take(start + plane.columns[side][columns], axis=1) for side in (0, 1))
            return _mixed(left, right, plane.column_weight[columns])

        return _mixed(line(0), line(1), plane.row_weight[rows])

    @cached_property
    def everywhere(self) -> NDArray[np.float32]:
        """Probabilities [classes, y, x] of all pixels of the other grid."""
        plane = self.plane
        left, right = (self.probabilities.take(plane.columns[side], axis=2) for side in (0, 1))
        lines = _mixed(left, right, plane.column_weight)
        upper, lower = (lines.take(plane.rows[side], axis=1) for side in (0, 1))
        return _mixed(upper, lower, plane.row_weight[:, None])


def _mixed(
    first: NDArray[np.float32], second: NDArray[np.float32], weight: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    """``first + (second - first) * weight``, in the memory of ``second``."""
    second -= first
    second *= weight
    second += first
    return second


def _between(
    z: int, below: _Source, above: _Source, weight: float, *, is_outside: bool, with_probabilities: bool
) -> Slice:
    """The slice of the other grid that lies between two slices of the store's."""
    outside = np.ones_like(below.plane.outside) if is_outside else below.plane.outside
    label, is_one_class = below.corner_labels
    if weight > 0:
        other, is_other_one_class = above.corner_labels
        is_one_class = is_one_class & is_other_one_class & (label == other)
    label = label.copy()
    rows, columns = np.nonzero(~is_one_class)
    mixed = below.at(rows, columns)
    if weight > 0:
        mixed = _mixed(mixed, above.at(rows, columns), np.float32(weight))
    label[rows, columns] = best_class(mixed)
    label[outside] = 0
    probabilities = None
    if with_probabilities:
        dense = below.everywhere
        probabilities = _mixed(dense, above.everywhere.copy(), np.float32(weight)) if weight > 0 else dense.copy()
        probabilities[:, outside] = 0.0
        probabilities[0, outside] = 1.0
    return Slice(z, label, probabilities)
