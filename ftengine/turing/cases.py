"""Cases of a reader study: real tumours and painted ones, cut from one grid and rendered by one function.

A reader must not be able to tell real from synthetic by anything but the tumour. So both are boxes of one shape around the tumour's
central voxel, read from a store by the same call, mapped through the region's window and back to whole HU by the same two functions
(``to_window``, ``to_hu``), and hold exactly one tumour. Nothing is interpolated: a painted tumour is painted on the store's own voxels.
What lies outside the window is lost in all cases alike, since painting knows only what lies inside.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import Box, FloatZYX, IntZYX, int_zyx
from ftengine.pictures.panels import central_voxel, equivalent_diameter_mm
from ftengine.quality.calibrate import MIN_VOXELS
from ftengine.rng import Purpose, patch_rng
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store
from ftengine.synthesis.bank import TumorBank
from ftengine.synthesis.engine import Address, Generator, Judge, Synthesizer

PATCHES_PER_VOLUME = 4  # places tried in one volume before the next one is taken
_CONNECTED = np.ones((3, 3, 3), dtype=bool)  # voxels that share a corner, as in store.tumors


@dataclass(frozen=True)
class CaseOptions:
    """What is cut. shape_zyx: voxels of every case. Diameters: of the sphere of the tumour's volume.

    centered: the tumour lies in the middle; else up to a quarter of the case away from it, so that the place tells readers nothing.
    """

    shape_zyx: IntZYX
    least_diameter_mm: float = 5.0
    largest_diameter_mm: float = float("inf")
    split: str | None = None
    centered: bool = True


@dataclass(frozen=True)
class DrawnCase:
    """One case. image_hu: int16 [z, y, x], inside the region's window. center_zyx: in the image; radius_mm: of the ball around it that
    holds the tumour. origin_zyx: of the image in its volume. proportion: P of Eq. 4 of a painted one, None without a judge.
    """

    organ: str
    synthetic: bool
    image_hu: NDArray[np.int16]
    center_zyx: IntZYX
    radius_mm: float
    diameter_mm: float
    store: str
    case: str
    dataset: str
    origin_zyx: IntZYX
    proportion: float | None = None


def to_window(image_hu: NDArray[np.int16], window_hu: tuple[float, float]) -> NDArray[np.float32]:
    """HU as a network sees them: the window mapped to [0, 1], clipped."""
    low, high = window_hu
    unit: NDArray[np.float32] = np.clip((image_hu.astype(np.float32) - low) / (high - low), 0.0, 1.0)
    return unit


def to_hu(unit: NDArray[np.float32], window_hu: tuple[float, float]) -> NDArray[np.int16]:
    """The window's [0, 1] as whole HU inside the window; what painting left outside is clipped.

    ``to_hu(to_window(x))`` is ``x`` clipped to the window, for whole x and windows of up to 2^16 HU: float32 is off by less than 0.01.
    """
    low, high = window_hu
    hu = unit.astype(np.float64) * (high - low) + low
    return np.rint(np.clip(hu, np.ceil(low), np.floor(high))).astype(np.int16)


def box_around(center_zyx: IntZYX, shape_zyx: IntZYX) -> Box:
    """A box of a shape with a voxel in its middle; it may reach beyond the volume."""
    return Box(int_zyx(c - n // 2 for c, n in zip(center_zyx, shape_zyx, strict=True)), shape_zyx)


class Refusals(Counter[str]):
    """Why candidates were passed over."""

    def text(self) -> str:
        """One clause, the commonest first."""
        return "; ".join(f"{reason}: {count}" for reason, count in self.most_common()) or "no volume is left"


class CaseDrawer:
    """Draws cases of a region from one or two stores; a volume gives at most one, so that no reader meets a patient twice.

    A volume is known by the SHA-256 of the file it was converted from, so that a copy or a part of a store gives no second case of it; one
    without that SHA-256 is known by its name.
    """

    def __init__(
        self,
        config: Config,
        real_store: Store,
        paint_store: Store,
        options: CaseOptions,
        *,
        seed: int,
        generator: Generator | None = None,
        judge: Judge | None = None,
        bank: TumorBank | None = None,
    ) -> None:
        """generator, judge, bank: as ``Synthesizer`` takes them, the networks on the configured device. config: for the region of both stores."""
        self._config, self._options, self._seed = config, options, seed
        self._real, self._paint = real_store, paint_store
        self._device = _device_of(config)
        self._synthesizer = Synthesizer(
            config.region,
            config.synthesis.model_copy(update={"fraction": 1.0}),
            seed=seed,
            generator=generator,
            judge=judge,
            retries=config.qc.retries,
            bank=bank,
        )
        self._judged = judge is not None
        self._used: set[str] = set()  # as _volume_of names them

    def real(self, organ: str, count: int) -> list[DrawnCase]:
        """Labelled tumours of an organ. Raises ConfigError where there are fewer than ``count``, saying why."""
        refused = Refusals()
        found: list[DrawnCase] = []
        for row in self._rows(self._real, organ, synthetic=False):
            if len(found) == count:
                break
            case = self._real_of_volume(organ, row, refused)
            if case is not None:
                found.append(case)
                self._used.add(_volume_of(self._real, row))
        return self._enough(found, count, organ, "labelled", self._real, refused)

    def painted(self, organ: str, count: int) -> list[DrawnCase]:
        """Tumours painted on an organ, those that the judge passed. Raises ConfigError where there are fewer than ``count``, saying why."""
        refused = Refusals()
        found: list[DrawnCase] = []
        for row in self._rows(self._paint, organ, synthetic=True):
            if len(found) == count:
                break
            case = self._painted_of_volume(organ, row, refused)
            if case is not None:
                found.append(case)
                self._used.add(_volume_of(self._paint, row))
        return self._enough(found, count, organ, "painted", self._paint, refused)

    def _enough(
        self, found: list[DrawnCase], count: int, organ: str, kind: str, store: Store, refused: Refusals
    ) -> list[DrawnCase]:
        if len(found) == count:
            return found
        options = self._options
        raise ConfigError(
            f"{store.location}: only {len(found)} {kind} tumours of {organ} for a study that needs {count} ({refused.text()}). A volume gives one "
            f"case, which holds the whole tumour and no other inside {options.shape_zyx} voxels. Lower --per-type or --training-cases, "
            "change --size-mm or --min-diameter-mm, or convert more volumes."
        )

    def _rows(self, store: Store, organ: str, *, synthetic: bool) -> Iterator[int]:
        """Rows that may hold a case, in the order of the seed; one that was used meanwhile is passed over."""
        values = self._config.region.organs[organ]
        table = store.select(["split", "fold", "annotation", "tumor_values", "class_voxels"])
        usable = rows_in(table, split=self._options.split)
        annotation = table.column("annotation").to_pylist()
        if synthetic:
            voxels = table.column("class_voxels").to_pylist()
            least = self._config.synthesis.min_organ_voxels
            fits = [
                kind != "none" and len(counts) > values.organ and counts[values.organ] >= least
                for kind, counts in zip(annotation, voxels, strict=True)
            ]
        else:
            tumors = table.column("tumor_values").to_pylist()
            fits = [kind == "tumor" and values.tumor in held for kind, held in zip(annotation, tumors, strict=True)]
        rows = np.flatnonzero(usable & np.array(fits, dtype=bool))
        rng = patch_rng(self._seed, Purpose.READER_STUDY, epoch=int(synthetic), index=values.tumor)
        for row in rng.permutation(rows).tolist():
            if _volume_of(store, row) not in self._used:
                yield row

    def _real_of_volume(self, organ: str, row: int, refused: Refusals) -> DrawnCase | None:
        volume = self._real.read_volume(self._real.rows.case(row))
        tumors = _components(np.isin(volume.label, self._config.region.tumor_values))
        wanted = self._config.region.organs[organ].tumor
        rng = patch_rng(self._seed, Purpose.READER_STUDY, epoch=2, index=row)
        for number in rng.permutation(np.arange(1, tumors.max() + 1)).tolist():
            mask = tumors == number
            if (volume.label[mask] != wanted).any():
                continue
            case = self._cut(self._real, row, organ, mask, (0, 0, 0), refused, synthetic=False)
            if case is not None:
                return case
        return None

    def _painted_of_volume(self, organ: str, row: int, refused: Refusals) -> DrawnCase | None:
        name = self._paint.rows.case(row)
        inside = np.flatnonzero(self._paint.read_volume(name).label == self._config.region.organs[organ].organ)
        shape = self._paint.shape_zyx(name)
        rng = patch_rng(self._seed, Purpose.READER_STUDY, epoch=3, index=row)
        for attempt in range(PATCHES_PER_VOLUME):
            center = int_zyx(np.unravel_index(int(rng.choice(inside)), shape))
            case = self._paint_at(organ, row, center, attempt, refused)
            if case is not None:
                return case
        return None

    def _paint_at(self, organ: str, row: int, center_zyx: IntZYX, attempt: int, refused: Refusals) -> DrawnCase | None:
        region = self._config.region
        name = self._paint.rows.case(row)
        box = _patch_around(center_zyx, region.patch_zyx, self._paint.shape_zyx(name))
        patch = self._paint.read(name, box.origin_zyx, box.shape_zyx)
        only = np.where(patch.label == region.organs[organ].organ, patch.label, 0).astype(np.uint8)
        image = torch.from_numpy(to_window(patch.image, region.window_hu))[None, None].to(self._device)
        address = Address(region.organs[organ].tumor, row * PATCHES_PER_VOLUME + attempt)
        painting = self._synthesizer.paint(image, torch.from_numpy(only)[None, None].to(self._device), [address])
        painted = painting.records()[0]
        if painted is None or not painted.num_voxels:
            refused["too little of the organ in the patch"] += 1
            return None
        if not painted.passed:
            refused["the judge let it fail"] += 1
            return None
        tumors = _components(painting.mask[0, 0].cpu().numpy().astype(bool))
        if tumors.max() != 1:
            refused["not one connected tumour"] += 1
            return None
        unit = painting.image[0, 0].cpu().numpy()
        proportion = painted.proportion if self._judged else None
        return self._cut(
            self._paint,
            row,
            organ,
            tumors == 1,
            box.origin_zyx,
            refused,
            synthetic=True,
            unit=unit,
            proportion=proportion,
        )

    def _cut(
        self,
        store: Store,
        row: int,
        organ: str,
        mask: NDArray[np.bool_],
        origin_zyx: IntZYX,
        refused: Refusals,
        *,
        synthetic: bool,
        unit: NDArray[np.float32] | None = None,
        proportion: float | None = None,
    ) -> DrawnCase | None:
        """The case around a tumour, or None with the reason counted.

        mask: the tumour, in the volume from ``origin_zyx`` on; unit: what was painted on the mask's box, in [0, 1]; None for a real one.
        """
        options, region = self._options, self._config.region
        diameter = equivalent_diameter_mm(int(mask.sum()), store.spacing_mm_zyx)
        if not options.least_diameter_mm <= diameter <= options.largest_diameter_mm:
            refused["a tumour of another size than asked for"] += 1
            return None
        center = int_zyx(c + o for c, o in zip(central_voxel(mask, store.spacing_mm_zyx), origin_zyx, strict=True))
        box = box_around(center, options.shape_zyx)
        if not options.centered:
            rng = patch_rng(self._seed, Purpose.READER_STUDY, epoch=7 + int(synthetic), index=row)
            away = [int(rng.integers(-(n // 4), n // 4 + 1)) for n in options.shape_zyx]
            box = Box(int_zyx(o - d for o, d in zip(box.origin_zyx, away, strict=True)), box.shape_zyx)
        in_case = int_zyx(c - o for c, o in zip(center, box.origin_zyx, strict=True))
        voxels = np.argwhere(mask) + np.array(origin_zyx) - np.array(box.origin_zyx)
        if (voxels < 0).any() or (voxels >= np.array(options.shape_zyx)).any():
            refused["a tumour larger than the case"] += 1
            return None
        crop = store.read(store.rows.case(row), box.origin_zyx, box.shape_zyx)
        others = np.isin(crop.label, region.tumor_values)
        if not synthetic:
            others[tuple(voxels.T)] = False
        if _components(others).max() > 0:
            refused["another tumour beside it"] += 1
            return None
        shown = to_window(crop.image, region.window_hu)
        if unit is not None:
            _paste(shown, box, unit, Box(origin_zyx, int_zyx(unit.shape)))
        distance_mm = (voxels - np.array(in_case)) * np.array(store.spacing_mm_zyx)
        return DrawnCase(
            organ=organ,
            synthetic=synthetic,
            image_hu=to_hu(shown, region.window_hu),
            center_zyx=in_case,
            radius_mm=float(np.sqrt((distance_mm**2).sum(axis=1)).max() + max(store.spacing_mm_zyx) / 2),
            diameter_mm=diameter,
            store=str(store.location),
            case=store.rows.case(row),
            dataset=str(store.column("dataset")[row].as_py()),
            origin_zyx=box.origin_zyx,
            proportion=proportion,
        )


def shape_of(size_mm_zyx: FloatZYX, spacing_mm_zyx: FloatZYX) -> IntZYX:
    """The voxels of a case of a size. Raises ConfigError below 8 voxels an axis, where nothing can be read, and above 1024."""
    shape = int_zyx(round(mm / s) for mm, s in zip(size_mm_zyx, spacing_mm_zyx, strict=True))
    if min(shape) < 8 or max(shape) > 1024:
        raise ConfigError(
            f"--size-mm {size_mm_zyx}: is {shape} voxels of {spacing_mm_zyx} mm; want 8 to 1024 voxels on each axis (z, y, x)."
        )
    return shape


def _components(tumor: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The connected parts, numbered from 1; specks of fewer than ``MIN_VOXELS`` voxels, of the annotation or of an organ's rim, are none."""
    parts, count = ndi.label(tumor, structure=_CONNECTED)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    kept = np.flatnonzero(sizes >= MIN_VOXELS)
    kept = kept[kept > 0]
    number = np.zeros(count + 1, dtype=np.int32)
    number[kept] = np.arange(1, len(kept) + 1)
    numbered: NDArray[np.int32] = number[parts]
    return numbered


def _patch_around(center_zyx: IntZYX, shape_zyx: IntZYX, volume_zyx: IntZYX) -> Box:
    """The box around a voxel, moved into the volume; on an axis shorter than the box the volume lies in its middle."""
    origin = [
        -((n - v) // 2) if v <= n else min(max(c - n // 2, 0), v - n)
        for c, n, v in zip(center_zyx, shape_zyx, volume_zyx, strict=True)
    ]
    return Box(int_zyx(origin), shape_zyx)


def _volume_of(store: Store, row: int) -> str:
    """What names the volume of a row, in whichever store it lies: the SHA-256 of its source, or its case where that is not known."""
    return store.column("source_sha256")[row].as_py() or store.rows.case(row)


def _paste(into: NDArray[Any], box: Box, values: NDArray[Any], place: Box) -> None:
    """Write ``values``, which lie at ``place`` of a volume, over ``into``, which lies at ``box`` of it, where the two overlap."""
    start = [max(a, b) for a, b in zip(box.origin_zyx, place.origin_zyx, strict=True)]
    stop = [min(a, b) for a, b in zip(box.end_zyx, place.end_zyx, strict=True)]
    shared = Box(int_zyx(start), int_zyx(max(0, b - a) for a, b in zip(start, stop, strict=True)))
    into[shared.moved(box.origin_zyx).slices()] = values[shared.moved(place.origin_zyx).slices()]


def _device_of(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def datasets_of(cases: Sequence[DrawnCase], *, synthetic: bool) -> set[str]:
    """The data sets that the real or the painted cases come from."""
    return {case.dataset for case in cases if case.synthetic == synthetic}
