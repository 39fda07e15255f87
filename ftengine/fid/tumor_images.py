"""Pictures of tumours, real and painted, cut out of a store in one and the same way.

=======  ==========================================================================================
input    rows of a store, or batches before and after painting; how a feature network wants a tumour to be cut
does     splits the tumour class into connected components, reads what lies around each from the volume, applies the region's window
output   a ``TumorImage`` a component of at least ``quality.calibrate.MIN_VOXELS`` voxels
raises   StoreError where a chunk is damaged
=======  ==========================================================================================

What lies around a painted tumour comes from the volume too, so that the picture does not end where the painted patch ends.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.errors import ConfigError
from ftengine.geometry import Box, FloatZYX, IntZYX, float_zyx, int_zyx
from ftengine.quality.calibrate import MIN_VOXELS, ball_diameter_mm
from ftengine.store.reader import Store
from ftengine.store.tumors import tumor_crops
from ftengine.types import Augmentation, Batch

Slices = Literal["all", "largest"]
BoxAround = Callable[[Box, IntZYX, FloatZYX], Box]  # bounding box, shape of the volume, spacing in mm: what is cut
_CONNECTED = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner, as in store.tumors


@dataclass(frozen=True)
class CropRule:
    """How tumours are shown to a feature network; the paper does not say how it does, so all of this is ours.

    slices: all axial slices that hold a voxel of the tumour, or the one that holds most. margin_mm: what is left around the tumour's
    bounding box. Raises ConfigError for another word and for a margin that is negative or not finite.
    """

    slices: Slices = "all"
    margin_mm: float = 10.0

    def __post_init__(self) -> None:
        if self.slices not in get_args(Slices):
            raise ConfigError(f"slices={self.slices!r}: want {' or '.join(get_args(Slices))}.")
        if not 0 <= self.margin_mm < np.inf:
            raise ConfigError(f"margin_mm={self.margin_mm}: want at least 0, in mm.")


@dataclass(frozen=True)
class TumorImage:
    """A tumour and what lies around it.

    image: float32 [z, y, x], the region's window mapped to [0, 1] and clipped, air outside the volume. mask: bool, the tumour.
    box: where the image lies in its volume. extent: the tumour's bounding box in the volume. diameter_mm: of the ball of its volume.
    """

    case: str
    organ: str
    diameter_mm: float
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    box: Box
    extent: Box

    def slices(self, which: Slices) -> slice:
        """The axial slices that hold the tumour, from the first to the last one, or the one that holds most of it."""
        area = self.mask.sum(axis=(1, 2))
        if which == "largest":
            fullest = int(area.argmax())
            return slice(fullest, fullest + 1)
        held = np.flatnonzero(area)
        return slice(int(held[0]), int(held[-1]) + 1)

    def covered(self, margin_mm: float, spacing_mm_zyx: FloatZYX) -> NDArray[np.float32]:
        """1 in the bounding box of the tumour with a margin, 0 elsewhere: float32 of the shape of ``image``."""
        margins = [round(margin_mm / s) for s in spacing_mm_zyx]
        extent = self.extent.moved(self.box.origin_zyx)
        grown = Box(
            int_zyx(o - m for o, m in zip(extent.origin_zyx, margins, strict=True)),
            int_zyx(n + 2 * m for n, m in zip(extent.shape_zyx, margins, strict=True)),
        )
        result = np.zeros(self.image.shape, dtype=np.float32)
        result[grown.inside(int_zyx(self.image.shape)).slices()] = 1.0
        return result


def square_around(extent: Box, margin_mm: float, spacing_mm_zyx: FloatZYX) -> Box:
    """The slices of a bounding box, and on them a square around it, in mm: its longer side and the margin on both ends.

    To the nearest voxel on each axis; may reach out of the volume.
    """
    _, dy, dx = spacing_mm_zyx
    z, y, x = extent.origin_zyx
    nz, ny, nx = extent.shape_zyx
    side_mm = max(ny * dy, nx * dx) + 2.0 * margin_mm
    height, width = max(1, round(side_mm / dy)), max(1, round(side_mm / dx))
    return Box((z, y + (ny - height) // 2, x + (nx - width) // 2), (nz, height, width))


def patch_around(extent: Box, patch_zyx: IntZYX, volume_shape_zyx: IntZYX) -> Box:
    """A patch around a bounding box, moved into the volume where that is not smaller than the patch; else centred on the volume."""
    origin = []
    for start, size, patch, length in zip(
        extent.origin_zyx, extent.shape_zyx, patch_zyx, volume_shape_zyx, strict=True
    ):
        wanted = start + size // 2 - patch // 2
        origin.append((length - patch) // 2 if length <= patch else min(max(wanted, 0), length - patch))
    return Box(int_zyx(origin), patch_zyx)


def real_tumors(
    store: Store, rows: Sequence[int], organ: str, region: RegionConfig, box: BoxAround, *, num_threads: int = 2
) -> Iterator[TumorImage]:
    """The labelled tumours of an organ in these rows of the index, in their order."""
    for crop in tumor_crops(store, rows, region.organs[organ].tumor, (0, 0, 0), num_threads=num_threads):
        if np.count_nonzero(crop.mask) < MIN_VOXELS:
            continue
        extent = Box(crop.origin_zyx, int_zyx(crop.mask.shape))
        yield _image(store, crop.case, organ, region, extent, crop.mask.astype(bool), box, None)


@dataclass(frozen=True)
class PaintedTumors:
    """The tumours of a painted batch. cut: the organs of those that end where their patch ends, inside the volume, and are left out."""

    tumors: tuple[TumorImage, ...]
    cut: tuple[str, ...]


def painted_tumors(
    store: Store,
    before: Batch,
    after: Batch,
    region: RegionConfig,
    box: BoxAround,
    *,
    wants: Callable[[str, float], bool] = lambda _organ, _diameter_mm: True,
) -> PaintedTumors:
    """The tumours that a batch was given, of the patches that passed quality control.

    before, after: the batch as it came from the loader, without any augmentation, and as it was painted. wants: whether a tumour of an
    organ and a diameter in mm is looked at any further.
    """
    found: list[TumorImage] = []
    cut: list[str] = []
    for row, record in enumerate(after.records):
        if record.painted is None or not record.painted.passed:
            continue
        if record.request.augmentation != Augmentation():
            raise ConfigError(
                f"{record.request.case}: the patch was flipped, turned or changed; want a loader with all probabilities of augment set to 0."
            )
        organ = record.painted.organ
        value = region.organs[organ].tumor
        mask = ((after.label[row, 0] == value) & (before.label[row, 0] != value)).cpu().numpy()
        volume = store.shape_zyx(record.request.case)
        parts, _ = ndi.label(mask, structure=_CONNECTED)
        for part, place in enumerate(ndi.find_objects(parts), start=1):
            own = parts[place] == part
            num_voxels = int(np.count_nonzero(own))
            if num_voxels < MIN_VOXELS or not wants(organ, ball_diameter_mm(num_voxels, region.spacing_mm_zyx)):
                continue
            origin = int_zyx(s.start + o for s, o in zip(place, record.request.box.origin_zyx, strict=True))
            extent = Box(origin, int_zyx(own.shape))
            if _is_cut(extent, record.request.box, volume):
                cut.append(organ)
                continue
            painted = after.image[row, 0].cpu().numpy(), record.request.box
            found.append(_image(store, record.request.case, organ, region, extent, own, box, painted))
    return PaintedTumors(tuple(found), tuple(cut))


def _is_cut(extent: Box, patch: Box, volume_shape_zyx: IntZYX) -> bool:
    """Whether a tumour touches a face of its patch that lies inside the volume."""
    below = zip(extent.origin_zyx, patch.origin_zyx, strict=True)
    above = zip(extent.end_zyx, patch.end_zyx, volume_shape_zyx, strict=True)
    return any(e == p > 0 for e, p in below) or any(e == p < n for e, p, n in above)


def _image(
    store: Store,
    case: str,
    organ: str,
    region: RegionConfig,
    extent: Box,
    own: NDArray[np.bool_],
    box: BoxAround,
    painted: tuple[NDArray[np.float32], Box] | None,
) -> TumorImage:
    """own: the tumour in its bounding box ``extent``. painted: a patch in [0, 1] and where it lies, to be put over what is read."""
    wanted = box(extent, store.shape_zyx(case), float_zyx(region.spacing_mm_zyx))
    low, high = region.window_hu
    hu = store.read(case, wanted.origin_zyx, wanted.shape_zyx).image.astype(np.float32)
    image = (hu - np.float32(low)) / np.float32(high - low)
    if painted is not None:
        _put(image, wanted, *painted)
    mask = np.zeros(wanted.shape_zyx, dtype=bool)
    _put(mask, wanted, own, extent)
    diameter_mm = ball_diameter_mm(int(np.count_nonzero(own)), region.spacing_mm_zyx)
    return TumorImage(case, organ, diameter_mm, np.clip(image, 0.0, 1.0), mask, wanted, extent)


def _put(target: NDArray[Any], target_box: Box, source: NDArray[Any], source_box: Box) -> None:
    """Copy what lies in both boxes; both are of one volume."""
    both = source_box.moved(target_box.origin_zyx).inside(target_box.shape_zyx)
    if min(both.shape_zyx) == 0:
        return
    seen = Box(
        int_zyx(
            b + t - s for b, t, s in zip(both.origin_zyx, target_box.origin_zyx, source_box.origin_zyx, strict=True)
        ),
        both.shape_zyx,
    )
    target[both.slices()] = source[seen.slices()]
