"""Judge calibration: P (Eq. 4) of the judge on real held-out tumours beside its P on painted ones, and the T that follows.

Eq. 4-5 keep what S sees. Whether that says anything about how real a painted tumour is depends on how much S sees of real ones: a judge
that passes a third of the real tumours at T removes mostly what it finds hard. Each connected component of a tumour class is a mask M of its
own, in a patch of the region's size around it, and is judged exactly as a painted patch is. ``docs/calibration.md`` says how to read it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray

from ftengine.config import RegionConfig
from ftengine.errors import ConfigError
from ftengine.files import sha256_of_files, write_text_whole
from ftengine.geometry import FloatZYX
from ftengine.quality.contrast import contrast_hu

FORMAT = 1
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))  # that T is recommended from
LOWEST_THRESHOLD = 0.1  # a judge that fails half of the real tumours even there should not judge
WANTED_SHARE = 0.5  # of the real tumours that a judge must pass
FEW_TUMORS = 20  # with fewer, the share at a threshold is uncertain by more than 0.2
FEW_CONTRASTS = 10  # with fewer real or painted ones, shares that differ by SIDE_GAP may be chance
SIDE_GAP = 0.5  # between the shares of real and of painted tumours that are brighter than their organ
MIN_VOXELS = 8  # smaller components are specks of the annotation
_FILE = ".calibration.json"

Origin = Literal["real", "painted"]
Judge = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RealTumor:
    """One component of a labelled tumour, ready to be judged.

    image: float32 [z, y, x] of the region's patch size, window mapped to [0, 1], air beyond the volume. mask: uint8, the component.
    diameter_mm: of the ball of its volume. contrast_hu: to the organ around it, NaN without enough of it. is_cut: larger than the patch.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    organ: str
    tumor_value: int
    diameter_mm: float
    contrast_hu: float
    is_cut: bool


@dataclass(frozen=True)
class JudgedTumor:
    """What the judge said of one tumour. proportion: P of Eq. 4; size: its size class; contrast_hu: None where it cannot be measured."""

    origin: Origin
    organ: str
    size: str
    diameter_mm: float
    contrast_hu: float | None
    proportion: float


@dataclass(frozen=True)
class Calibration:
    """All judged tumours, and where they came from.

    judge_sha256, generator_sha256: of the files; the latter empty without one. held_out: whether the judge's own run left these volumes
    out; None where its checkpoint does not say. threshold: ``qc.threshold`` of the configuration.
    """

    judge_sha256: str
    generator_sha256: str
    store: str
    split: str
    fold: int | None
    held_out: bool | None
    threshold: float | None
    sizes: tuple[str, ...]
    tumors: tuple[JudgedTumor, ...]
    num_left_out: int = 0  # real components of fewer than ``MIN_VOXELS`` voxels
    num_cut: int = 0  # real components larger than the patch: P is that of the part inside
    released: bool = False  # variant released: passes where P > T
    notes: tuple[str, ...] = field(default_factory=tuple)

    def proportions(self, origin: Origin, size: str | None = None) -> NDArray[np.float64]:
        """P of the real or the painted tumours, of one size class or of all, ascending."""
        chosen = [t.proportion for t in self.tumors if t.origin == origin and size in (None, t.size)]
        return np.sort(np.array(chosen, dtype=np.float64))

    def pass_rate(self, origin: Origin, threshold: float, size: str | None = None) -> float | None:
        """Share of tumours with P >= T (released: P > T); None without any."""
        values = self.proportions(origin, size)
        if not len(values):
            return None
        return float((values > threshold if self.released else values >= threshold).mean())

    @property
    def recommended_threshold(self) -> float | None:
        """The largest of 0.05, 0.1 ... 0.95 at which at least half of the real tumours pass; None where that is below 0.1, or nothing is real."""
        passing = [t for t in THRESHOLDS if (self.pass_rate("real", t) or 0.0) >= WANTED_SHARE]
        return max(passing) if passing and max(passing) >= LOWEST_THRESHOLD else None

    @property
    def is_certain(self) -> bool:
        """Whether there were enough real tumours to recommend anything."""
        return len(self.proportions("real")) >= FEW_TUMORS

    def advice(self) -> str:
        """The recommendation in words."""
        num, recommended = len(self.proportions("real")), self.recommended_threshold
        if not num:
            return "no real tumour was judged: nothing can be recommended"
        doubt = "" if self.is_certain else f" (of {num} real tumours only: uncertain)"
        if recommended is None:
            return (
                f"recommended: qc.threshold=null{doubt}. Even at T={LOWEST_THRESHOLD} the judge fails more than half of the real tumours; train it "
                "on more volumes before it judges anything."
            )
        return f"recommended: qc.threshold={recommended:g}{doubt}, the largest at which it passes at least half of the real tumours"

    def contrasts_hu(self, origin: Origin, size: str | None = None) -> NDArray[np.float64]:
        """Contrasts of the real or the painted tumours, of one size class or of all, where they could be measured, ascending."""
        known = [t.contrast_hu for t in self.tumors if t.origin == origin and size in (None, t.size)]
        return np.sort(np.array([c for c in known if c is not None], dtype=np.float64))

    def side_finding(self) -> str | None:
        """What to say where painted tumours lie on the other side of their organ's HU than real ones; None where they do not.

        Nothing in Eq. 2-3 tells G the sign of its contrast: it takes the one by which S finds its tumours most easily.
        """
        real, painted = self.contrasts_hu("real"), self.contrasts_hu("painted")
        if min(len(real), len(painted)) < FEW_CONTRASTS:
            return None
        share_real, share_painted = float((real > 0).mean()), float((painted > 0).mean())
        if abs(share_real - share_painted) <= SIDE_GAP:
            return None
        remedy = (
            "Train the generator anew with another seed, or set the contrast yourself (synthesis.target_contrast_hu, synthesis.hyperdense_fraction)"
            if self.generator_sha256
            else "Choose another contrast in the section synthesis (docs/synthesisers.md)"
        )
        return (
            f"{share_painted:.0%} of {len(painted)} painted tumours are brighter than their organ, but {share_real:.0%} of {len(real)} real ones: "
            f"a student would learn the wrong contrast. {remedy}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: everything, and the pass rates by threshold and size."""
        limits = sorted({*THRESHOLDS, *(() if self.threshold is None else (self.threshold,))})
        return {
            "format": FORMAT,
            **{k: v for k, v in asdict(self).items() if k != "tumors"},
            "recommended_threshold": self.recommended_threshold,
            "advice": self.advice(),
            "side_finding": self.side_finding(),
            "pass_rates": {
                origin: {
                    size: {f"{t:g}": self.pass_rate(origin, t, None if size == "all" else size) for t in limits}
                    for size in ("all", *self.sizes)
                }
                for origin in ("real", "painted")
            },
            "tumors": [asdict(t) for t in self.tumors],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Calibration":
        """Read what ``to_json`` gave. Raises KeyError, TypeError or ValueError for anything else."""
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, want {FORMAT}")
        names = cls.__dataclass_fields__
        values = {name: document[name] for name in names}
        tumors = tuple(JudgedTumor(**t) for t in document["tumors"])
        return cls(**{**values, "tumors": tumors, "sizes": tuple(values["sizes"]), "notes": tuple(values["notes"])})


def find_real_tumors(
    image_hu: NDArray[np.int16], label: NDArray[np.uint8], region: RegionConfig, spacing_mm_zyx: FloatZYX
) -> tuple[list[RealTumor], int]:
    """The tumours of a volume (int16 HU and uint8 [z, y, x]), and how many components were too small to be one.

    Components have 26 neighbours. A patch lies around its component's bounding box, moved into the volume where it can be.
    """
    found: list[RealTumor] = []
    num_small = 0
    for organ, values in region.organs.items():
        components, _ = ndi.label(label == values.tumor, structure=np.ones((3, 3, 3)))
        for number, place in enumerate(ndi.find_objects(components), start=1):
            if np.count_nonzero(components[place] == number) < MIN_VOXELS:
                num_small += 1
                continue
            origin = tuple(
                _origin((s.start + s.stop) // 2, n, p)
                for s, n, p in zip(place, label.shape, region.patch_zyx, strict=True)
            )
            own = components == number
            found.append(_real_tumor(image_hu, label, own, origin, organ, region, spacing_mm_zyx))
    return found, num_small


def _origin(center: int, length: int, patch: int) -> int:
    """First voxel of a patch around ``center``, inside the volume; a volume smaller than the patch is centred in it."""
    return (length - patch) // 2 if length <= patch else min(max(center - patch // 2, 0), length - patch)


def _real_tumor(
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8],
    own: NDArray[np.bool_],
    origin: tuple[int, ...],
    organ: str,
    region: RegionConfig,
    spacing_mm_zyx: FloatZYX,
) -> RealTumor:
    low, high = region.window_hu
    values = region.organs[organ]
    hu = _cropped(np.clip(image_hu, low, high).astype(np.float32), origin, region.patch_zyx, low)
    mask = _cropped(own, origin, region.patch_zyx, fill=False)
    healthy = _cropped(label == values.organ, origin, region.patch_zyx, fill=False)
    num_voxels = int(np.count_nonzero(own))
    return RealTumor(
        image=((hu - low) / (high - low)).astype(np.float32),
        mask=mask.astype(np.uint8),
        organ=organ,
        tumor_value=values.tumor,
        diameter_mm=ball_diameter_mm(num_voxels, spacing_mm_zyx),
        contrast_hu=contrast_hu(hu, mask, healthy, spacing_mm_zyx),
        is_cut=int(np.count_nonzero(mask)) < num_voxels,
    )


def _cropped(array: NDArray[Any], origin: Sequence[int], shape: Sequence[int], fill: float) -> NDArray[Any]:
    """A box of an array, ``fill`` where it reaches beyond."""
    result = np.full(tuple(shape), fill, dtype=array.dtype)
    inner = tuple(slice(max(0, -o), min(p, n - o)) for o, p, n in zip(origin, shape, array.shape, strict=True))
    outer = tuple(slice(o + s.start, o + s.stop) for o, s in zip(origin, inner, strict=True))
    result[inner] = array[outer]
    return result


def ball_diameter_mm(num_voxels: int, spacing_mm_zyx: FloatZYX) -> float:
    """Diameter of the ball with the volume of so many voxels."""
    return float((6.0 / math.pi * num_voxels * math.prod(spacing_mm_zyx)) ** (1.0 / 3.0))


def judge_real_tumors(
    tumors: Sequence[RealTumor],
    judge: Judge,
    size_of: Callable[[float], str],
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[JudgedTumor]:
    """Ask the judge about real tumours, ``batch_size`` patches at a time. size_of: the size class of a radius in mm."""
    for first in range(0, len(tumors), batch_size):
        batch = tumors[first : first + batch_size]
        image = torch.from_numpy(np.stack([t.image for t in batch])).unsqueeze(1).to(device)
        mask = torch.from_numpy(np.stack([t.mask for t in batch])).to(device)
        proportion, _ = judge(image, mask, [t.tumor_value for t in batch])
        for tumor, p in zip(batch, proportion.tolist(), strict=True):
            yield judged("real", tumor.organ, tumor.diameter_mm, tumor.contrast_hu, p, size_of)


def judged(
    origin: Origin, organ: str, diameter_mm: float, contrast: float, proportion: float, size_of: Callable[[float], str]
) -> JudgedTumor:
    """A judged tumour with the size class of its volume."""
    contrast_or_none = None if math.isnan(contrast) else contrast
    return JudgedTumor(origin, organ, size_of(diameter_mm / 2), diameter_mm, contrast_or_none, proportion)


def calibration_file(judge: str | Path) -> Path:
    """Where the calibration of a judge lies: beside it."""
    judge = Path(judge)
    return judge.with_name(f"{judge.stem}{_FILE}")


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write it beside ``path`` and move it there."""
    write_text_whole(path, json.dumps(calibration.to_json(), indent=1, allow_nan=False) + "\n", durable=False)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration. Raises ConfigError where the file is none."""
    try:
        return Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is no calibration of this version ({type(error).__name__}: {error}). Make it again with 'ftengine qc calibrate'."
        ) from error


def judge_warning(judge: str | Path, threshold: float | None) -> str | None:
    """What a run with this judge and T should be told before it begins; None where there is nothing to say.

    Taken from the calibration beside the judge, if that can be read and is of the same file by its SHA-256.
    """
    if threshold is None:
        return None
    file = calibration_file(judge)
    how = f"'ftengine qc calibrate STORE --judge {judge}' shows what it passes of real held-out tumours at T={threshold:g}"
    if not file.is_file():
        return f"{judge}: this judge has not been calibrated; {how}"
    try:
        known = read_calibration(file)
    except ConfigError as error:
        return f"{error} Until then nothing is known of this judge; {how}"
    if known.judge_sha256 != sha256_of_files(Path(judge)):
        return f"{file}: is of another judge than {judge} now holds; {how}"
    rate = known.pass_rate("real", threshold)
    if rate is None:
        return f"{file}: held no real tumour; {how}"
    if rate >= WANTED_SHARE:
        return None
    seen = "" if known.held_out else ", some of which it may have been trained on"
    return (
        f"{judge}: at T={threshold:g} this judge passes {rate:.0%} of {len(known.proportions('real'))} real tumours{seen}: quality control will "
        f"keep what it finds easy and drop much that is like real ones; {known.advice()}"
    )


def painter_warning(judge: str | Path, generator: str | Path | None) -> str | None:
    """What a run with this generator should be told of the contrast of its tumours; None where there is nothing to say.

    Taken from the calibration beside the judge, if it is of the same judge and the same generator by their SHA-256.
    """
    file = calibration_file(judge)
    if generator is None or not file.is_file():
        return None
    try:
        known = read_calibration(file)
    except ConfigError:
        return None  # ``judge_warning`` says so
    if (known.judge_sha256, known.generator_sha256) != (sha256_of_files(Path(judge)), sha256_of_files(Path(generator))):
        return None
    finding = known.side_finding()
    return None if finding is None else f"{generator}: {finding}"
