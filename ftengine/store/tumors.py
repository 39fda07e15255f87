"""Real tumours, cut out of the annotated volumes of a store.

=======  ==========================================================================================
input    an opened store, rows of its index, a tumour's label value
does     reads the inner chunks that hold it and what lies around them, splits it into connected components
output   a ``TumorCrop`` a component, in the order of the rows
raises   StoreError where a chunk is damaged, or the index contradicts itself
=======  ==========================================================================================
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.errors import StoreError
from ftengine.geometry import Box, IntZYX, int_zyx
from ftengine.store.layout import CHUNK, chunks_per_axis
from ftengine.store.reader import Store
from ftengine.types import TumorCrop

_CONNECTED = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner, as in evaluation.shape_measures
_ROWS_AHEAD = 2  # a thread


def tumor_crops(
    store: Store, rows: Sequence[int], value: int, margin_vox_zyx: IntZYX, *, num_threads: int = 2
) -> Iterator[TumorCrop]:
    """The components of label ``value`` in these rows, cut with a margin; rows that hold none give none.

    Reads lazily, ``num_threads`` rows at a time and at most twice as many ahead: whoever has enough stops asking.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ftengine-bank") as pool:
        together = num_threads * _ROWS_AHEAD
        for first in range(0, len(rows), together):
            part = rows[first : first + together]
            for crops in pool.map(lambda row: tumors_of_row(store, row, value, margin_vox_zyx), part):
                yield from crops


def tumors_of_row(store: Store, row: int, value: int, margin_vox_zyx: IntZYX) -> list[TumorCrop]:
    """The components of one volume, in C order of their first voxels inside each group of neighbouring inner chunks."""
    case, shape = store.rows.case(row), int_zyx(store.column("shape_zyx")[row].as_py())
    chunks = _chunks_of(store, row, value)
    if not len(chunks):
        return []
    # voxels that touch lie in chunks that touch, so no component reaches into two groups
    held = np.zeros(chunks_per_axis(shape), dtype=bool)
    held.flat[chunks] = True
    groups, _ = ndi.label(held, structure=_CONNECTED)
    found = []
    for number, place in enumerate(ndi.find_objects(groups), start=1):
        inner = Box(int_zyx(s.start * CHUNK for s in place), int_zyx((s.stop - s.start) * CHUNK for s in place)).inside(
            shape
        )
        window = _grown(inner, margin_vox_zyx)
        patch = store.read(case, window.origin_zyx, window.shape_zyx)
        parts, _ = ndi.label(patch.label == value, structure=_CONNECTED)
        for part, extent in enumerate(ndi.find_objects(parts), start=1):
            if _group_at(groups, parts, part, extent, window) != number:
                continue  # of another group, whose window holds all of it
            box = _grown(
                Box(int_zyx(s.start for s in extent), int_zyx(s.stop - s.start for s in extent)), margin_vox_zyx
            )
            cut = box.slices()
            found.append(
                TumorCrop(
                    case,
                    value,
                    patch.image[cut].copy(),
                    patch.label[cut].copy(),
                    (parts[cut] == part).view(np.uint8),
                    int_zyx(o + w for o, w in zip(box.origin_zyx, window.origin_zyx, strict=True)),
                )
            )
    return found


def _chunks_of(store: Store, row: int, value: int) -> NDArray[np.int32]:
    """The inner chunks that hold a label value: the row's classes are listed by value, those without a voxel left out."""
    voxels: list[int] = store.column("class_voxels")[row].as_py()
    present = [v for v, count in enumerate(voxels) if v and count]
    lists = store.rows.chunk_lists.labelled(row)
    if value not in present or lists is None:
        return np.zeros(0, dtype=np.int32)
    place = present.index(value)
    first, last = lists.bounds[place : place + 2]
    if int(lists.voxels[first:last].sum()) != voxels[value]:
        raise StoreError(
            f"{store.location}: {store.rows.case(row)} has {voxels[value]} voxels of label {value}, and chunks with "
            f"{int(lists.voxels[first:last].sum())} in its index. Convert it again."
        )
    return lists.chunk[first:last]


def _grown(box: Box, margin_zyx: IntZYX) -> Box:
    return Box(
        int_zyx(o - m for o, m in zip(box.origin_zyx, margin_zyx, strict=True)),
        int_zyx(n + 2 * m for n, m in zip(box.shape_zyx, margin_zyx, strict=True)),
    )


def _group_at(
    groups: NDArray[np.integer[Any]], parts: NDArray[np.integer[Any]], part: int, extent: tuple[slice, ...], window: Box
) -> int:
    """The group of chunks that a component's first voxel lies in; 0 outside the volume's chunks that hold the class."""
    first = np.unravel_index(int(np.argmax(parts[extent] == part)), parts[extent].shape)
    voxel = [int(f) + s.start + o for f, s, o in zip(first, extent, window.origin_zyx, strict=True)]
    return int(groups[tuple(v // CHUNK for v in voxel)])
