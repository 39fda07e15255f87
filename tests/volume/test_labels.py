"""Label values: boxes, counts and maps equal what NumPy says of the whole array at once."""

import hypothesis.strategies as st
import numpy as np
import scipy.ndimage as ndi
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from ftengine.geometry import grid_from_codes
from ftengine.volume.labels import value_extents
from ftengine.volume.lesions import find_lesions
from ftengine.volume.values import RawImage, to_label

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@given(label=hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 0, 1, 2, 255]), fill=st.just(0)))
@settings(deadline=None)
def test_extents_are_those_of_each_value(label: NDArray[np.uint8]) -> None:
    extents = value_extents(label)
    assert list(extents) == [int(v) for v in np.unique(label) if v]
    for value, extent in extents.items():
        where = np.nonzero(label == value)
        assert extent.num_voxels == len(where[0])
        assert extent.box == tuple(slice(int(i.min()), int(i.max()) + 1) for i in where)
        assert extent.origin_zyx == tuple(int(i.min()) for i in where)


@given(
    label=hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 0, 1, 2]), fill=st.just(0)),
    spacing_mm_zyx=st.tuples(st.floats(0.5, 5), st.floats(0.5, 5), st.floats(0.5, 5)),
)
@settings(deadline=None, max_examples=50)
def test_lesions_are_the_components_that_scipy_finds_in_its_order(
    label: NDArray[np.uint8], spacing_mm_zyx: tuple[float, float, float]
) -> None:
    wanted = []
    for value in (2, 1):
        components, number = ndi.label(label == value, structure=np.ones((3, 3, 3)))
        for component in range(1, number + 1):
            planes = [np.argwhere(p) * spacing_mm_zyx[1:] for p in components == component if p.any()]
            longest = max(pdist(points).max(initial=0.0) for points in planes) + np.mean(spacing_mm_zyx[1:])
            wanted.append((value, int((components == component).sum()), longest))
    found = find_lesions(label, (2, 1), spacing_mm_zyx)
    assert [(lesion.value, lesion.num_voxels) for lesion in found] == [wish[:2] for wish in wanted]
    # five roundings: two squares, their sum, the root, the sum with a voxel
    np.testing.assert_allclose(
        [lesion.diameter_mm for lesion in found], [wish[2] for wish in wanted], rtol=5 * np.finfo(float).eps
    )


@given(
    stored=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32]).flatmap(
        lambda dtype: hnp.arrays(dtype, SHAPES, elements=st.sampled_from([0, 0, 1, 2, 7]), fill=st.just(0))
    ),
    label_map=st.dictionaries(st.sampled_from([0, 1, 2, 7]), st.integers(0, 255)),
)
@settings(deadline=None)
def test_labels_are_mapped_voxel_by_voxel(
    stored: NDArray[np.uint8 | np.int16 | np.uint16 | np.int32 | np.float32], label_map: dict[int, int]
) -> None:
    raw = RawImage(stored, grid_from_codes((stored.shape[0], stored.shape[1], stored.shape[2]), (1.0, 1.0, 1.0), "RAS"))
    label = to_label(raw, "x", label_values=None, label_map=label_map)
    assert label.dtype == np.uint8
    wanted = np.vectorize(lambda v: label_map.get(int(v), int(v)))(stored)
    np.testing.assert_array_equal(label, wanted)
