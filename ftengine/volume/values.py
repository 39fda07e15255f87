"""From the numbers of a file to Hounsfield units and region labels: the limits, the roundings and what is refused.

=======  ==========================================================================================
input    the numbers as stored, z y x in the file's own axis order, with their slope and intercept
does     value = stored * slope + intercept; clips HU to -1024..30000; maps and checks label values
output   int16 (float32 only for fractions) HU; uint8 labels; notes on what was repaired
raises   CaseError for NaN, infinity, fractional labels and label values outside the region
=======  ==========================================================================================

Everything works slice by slice, so that no float64 copy of a whole volume is ever made.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.geometry import Grid, IntZYX, checked_grid

MIN_HU = -1024  # the value of air and of padding everywhere in ftengine; scanners pad with -2000, -3024 and others
MAX_HU = 30_000  # far above metal (our own test CT reaches 3382), and rounding at int16's end cannot wrap
MIN_AXIS_VOXELS = (
    4  # scouts, single slices and two- or three-slice stubs are not volumes: nothing 3-D can be learnt from them
)
INTEGER_TOLERANCE = 1e-3  # a stored 1.0000001 is a rounded 1; a stored 1.5 is not
AIR_HU = -200  # a CT volume without any voxel below this shows no air and no lung: perhaps not HU
MAX_DEFLATE_RATIO = 1032  # of deflate itself: a header that promises more is lying, and no memory is touched for it
_COUNTED_RANGE = 1 << 17  # labels within this span are counted by bincount, wilder ones by sorting
_MAX_LISTED = 10


@dataclass(frozen=True)
class RawImage:
    """One image file as stored: what each format's loader returns.

    values: numbers of any real dtype, z y x in the file's own axis order; HU or labels after ``* slope + intercept``.
    grid: where they lie (already checked and made exactly orthogonal).
    notes: what the loader repaired or noticed.
    """

    values: NDArray[Any]
    grid: Grid
    slope: float = 1.0
    intercept: float = 0.0
    notes: tuple[str, ...] = ()


def shown(path: Path) -> str:
    """The path as one printable line: control characters and undecodable bytes of a file name are escaped."""
    text = str(path)
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    )


def read_failure(
    where: str, error: OSError | ValueError, advice: str = "Check the path and its permissions."
) -> CaseError:
    """The error of a file that the system does not hand over, to be raised from ``error``. A path with a NUL gives a ValueError."""
    reason, code = refusal(error)
    return CaseError(f"{where}: {reason}.", advice, code=code)


def refusal(error: OSError | ValueError) -> tuple[str, FailureCode]:
    """What the system said of a file, without its name, and the code of it."""
    if isinstance(error, FileNotFoundError):
        return "does not exist", FailureCode.MISSING_FILE
    why = (error.strerror if isinstance(error, OSError) else "") or type(error).__name__
    code = FailureCode.NO_PERMISSION if isinstance(error, PermissionError) else FailureCode.UNREADABLE
    return f"cannot be read ({why})", code


def stream_failure(where: str, error: Exception, what: str = "gzip stream") -> CaseError:
    """The error of a compressed stream that ends early (EOFError) or fails its own checks, to be raised from ``error``."""
    return CaseError(
        f"{where}: the {what} is cut short or damaged ({type(error).__name__}); want a whole file.",
        "Copy or download it again.",
        code=FailureCode.TRUNCATED if isinstance(error, EOFError) else FailureCode.DAMAGED_DATA,
    )


def volume_grid(grid: Grid, where: str) -> Grid:
    """The grid with exactly orthogonal axes (``checked_grid``), or a CaseError for stubs, shears and impossible spacings."""
    if min(grid.shape_zyx) < MIN_AXIS_VOXELS:
        raise CaseError(
            f"{where}: not a volume: shape {grid.shape_zyx} in the file's own z, y, x order; want at least {MIN_AXIS_VOXELS} slices on each "
            "axis.",
            "A scout, single slice or stub: leave it out, or give the whole series.",
            code=FailureCode.NOT_A_VOLUME,
        )
    return checked_grid(grid, where)


class HuStack:
    """Fills one volume slice by slice with HU, int16 as long as every value is an integer.

    The first slice with fractions (more than 1e-3 from an integer) turns the whole volume to float32.
    """

    def __init__(self, shape_zyx: IntZYX, where: str, *, nan_hu: float | None = None) -> None:
        """nan_hu: what takes the place of NaN and infinity, counted in a note; None refuses them."""
        self._where = where
        self._nan_hu = nan_hu
        self._num_nan = 0
        self._image: NDArray[np.int16] | NDArray[np.float32] = np.empty(shape_zyx, dtype=np.int16)
        self._num_low = self._num_high = 0

    def put(self, index: int, stored: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> None:
        """Store one slice [y, x] of numbers as HU; raises CaseError for NaN or infinity that nothing replaces."""
        with np.errstate(all="ignore"):  # what is not finite is refused below
            value = stored.astype(np.float64)  # exact for every integer type that can hold HU
            if slope != 1.0:
                value *= slope
            if intercept != 0.0:
                value += intercept
        finite = np.isfinite(value)
        if not finite.all():
            if self._nan_hu is None:
                raise CaseError(
                    f"{self._where}: slice {index} holds NaN or infinity; want a finite HU in every voxel.",
                    "Replace them with --nan -1024 (air) or leave the case out.",
                    code=FailureCode.NOT_FINITE,
                )
            self._num_nan += int(np.count_nonzero(~finite))
            value[~finite] = self._nan_hu
        self._num_low += int(np.count_nonzero(value < MIN_HU))
        self._num_high += int(np.count_nonzero(value > MAX_HU))
        np.clip(value, MIN_HU, MAX_HU, out=value)
        whole = np.rint(value)
        if self._image.dtype == np.int16:
            if np.abs(whole - value).max(initial=0.0) <= INTEGER_TOLERANCE:
                self._image[index] = whole
                return
            self._image = self._image.astype(np.float32)
        self._image[index] = value

    def finish(self) -> tuple[NDArray[np.int16] | NDArray[np.float32], list[str]]:
        """The volume and one note for each thing that was changed or looks odd."""
        notes = _hu_notes(self._image, self._num_low, self._num_high)
        if self._num_nan:
            notes.insert(0, f"{self._num_nan:,} voxels of NaN or infinity set to {self._nan_hu:g} HU, as asked")
        return self._image, notes


def to_hu(
    raw: RawImage, where: str, *, nan_hu: float | None = None
) -> tuple[NDArray[np.int16] | NDArray[np.float32], list[str]]:
    """HU of an image file in its own axis order: int16, or float32 where the file holds fractions; and notes.

    Values below -1024 become -1024 and values above 30000 become 30000, each counted in a note; so is NaN or infinity
    that becomes ``nan_hu``. Without a ``nan_hu`` CaseError is raised for them.
    """
    values = raw.values
    if values.dtype == np.int16 and values.dtype.isnative and raw.slope == 1.0 and raw.intercept == 0.0:
        image = values if values.flags.writeable else values.copy()
        num_low = num_high = 0
        for plane in image:
            num_low += int(np.count_nonzero(plane < MIN_HU))
            num_high += int(np.count_nonzero(plane > MAX_HU))
            np.clip(plane, MIN_HU, MAX_HU, out=plane)
        return image, _hu_notes(image, num_low, num_high)
    z, y, x = values.shape
    stack = HuStack((z, y, x), where, nan_hu=nan_hu)
    for index, plane in enumerate(values):
        stack.put(index, plane, raw.slope, raw.intercept)
    return stack.finish()


def _hu_notes(image: NDArray[np.int16] | NDArray[np.float32], num_low: int, num_high: int) -> list[str]:
    notes = []
    if num_low:
        notes.append(f"{num_low:,} voxels below {MIN_HU} HU (padding) set to {MIN_HU}")
    if num_high:
        notes.append(f"{num_high:,} voxels above {MAX_HU} HU set to {MAX_HU}")
    if image.dtype != np.int16:
        notes.append(
            "the file holds fractions of a HU; they are kept here and rounded half to even when the volume is resampled"
        )
    lowest = float(image.min())
    if lowest > AIR_HU:
        notes.append(f"no air in the volume: its lowest value is {lowest:g} HU; check that this is a CT in HU")
    return notes


def to_label(
    raw: RawImage,
    where: str,
    *,
    label_values: Collection[int] | None,
    label_map: Mapping[int, int] | None,
    map_option: str = "--label-map",
) -> NDArray[np.uint8]:
    """Labels of a file in its own axis order, uint8, in the region's values.

    label_values: what may be left after the map; None allows 0 to 255. label_map: value in the file -> value in the region;
    values that it does not name stay. map_option: the option that sets it, for the error. Raises CaseError for fractions (1e-3 is
    allowed), NaN, and values outside the region.
    """
    counts: dict[int, int] = {}
    for plane in _integer_planes(raw, where):
        for value, number in _count(plane):
            counts[value] = counts.get(value, 0) + number
    mapping = dict(label_map or {})
    allowed = set(range(256)) if label_values is None else set(label_values) & set(range(256))
    wrong = sorted(v for v in counts if mapping.get(v, v) not in allowed)
    if wrong:
        listed = ", ".join(f"{v} ({counts[v]:,} voxels)" for v in wrong[:_MAX_LISTED])
        more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
        want = "0 to 255" if label_values is None else ", ".join(str(v) for v in sorted(allowed))
        raise CaseError(
            f"{where}: label values {listed}{more} are not labels of the region; want {want}.",
            f"Map each with {map_option} {wrong[0]}=VALUE (0 is background) or leave the case out.",
            code=FailureCode.LABEL_VALUES,
        )
    keys = np.array(sorted(counts), dtype=np.int64)
    targets = np.array([mapping.get(int(k), int(k)) for k in keys], dtype=np.uint8)
    label = np.empty(raw.values.shape, dtype=np.uint8)
    for index, plane in enumerate(_integer_planes(raw, where)):
        _map_plane(plane, keys, targets, label[index])
    return label


def _map_plane(
    plane: NDArray[Any], keys: NDArray[np.int64], targets: NDArray[np.uint8], out: NDArray[np.uint8]
) -> None:
    """``targets[i]`` where ``plane`` is ``keys[i]``, into ``out``; most voxels of a label are 0, and most labels need no map."""
    if plane.dtype == np.uint8 and np.array_equal(keys, targets):
        out[...] = plane
        return
    zero = np.searchsorted(keys, 0)
    out[...] = targets[zero] if zero < len(keys) and keys[zero] == 0 else 0
    inside = plane != 0
    out[inside] = targets[np.searchsorted(keys, plane[inside])]


def _integer_planes(raw: RawImage, where: str) -> Iterator[NDArray[Any]]:
    """The slices of a label file as integers."""
    plain = raw.values.dtype.kind in "iu" and raw.slope == 1.0 and raw.intercept == 0.0
    for index, plane in enumerate(raw.values):
        if plain:
            yield plane
            continue
        with np.errstate(all="ignore"):
            value = plane.astype(np.float64) * raw.slope + raw.intercept
            whole = np.rint(value)
            wrong = ~(np.abs(value - whole) <= INTEGER_TOLERANCE)  # true for NaN and infinity too
        if wrong.any():
            raise CaseError(
                f"{where}: slice {index} of the label holds {float(value[wrong][0]):g}, which is not a whole number; want integer labels.",
                "It may have been resampled linearly, or be a probability map: write it again with nearest-neighbour values.",
                code=FailureCode.FRACTIONAL_LABEL,
            )
        yield np.clip(whole, -(2.0**62), 2.0**62).astype(np.int64)


def _count(plane: NDArray[Any]) -> list[tuple[int, int]]:
    """(value, voxels) of one slice."""
    inside = plane[plane != 0]  # most voxels of a label are 0: counting them one by one would take most of the time
    found = [(0, plane.size - inside.size)] if inside.size < plane.size else []
    if not inside.size:
        return found
    low, high = int(inside.min()), int(inside.max())
    if high - low < _COUNTED_RANGE:
        # through int64, since uint8 minus a Python int may wrap
        number = np.bincount(inside.astype(np.int64) - low)
        return found + [(int(v) + low, int(number[v])) for v in np.flatnonzero(number)]
    values, numbers = np.unique(inside, return_counts=True)
    return found + [(int(v), int(n)) for v, n in zip(values, numbers, strict=True)]
