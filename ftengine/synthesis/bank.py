"""The tumour bank of ``synthesizer: copy-paste``: real tumours of the training volumes, in memory, by organ."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import scipy.ndimage as ndi
from numpy.typing import NDArray

from ftengine.config import RegionConfig, SynthesisConfig
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX, int_zyx, mm_to_vox
from ftengine.kernels.gaussian_blur import TRUNCATE
from ftengine.types import TumorCrop

_Voxel = TypeVar("_Voxel", np.int16, np.uint8)

RING_MM = 6.0  # how far around a tumour its organ is looked at


@dataclass(frozen=True, eq=False)
class BankTumor:
    """One tumour. image_hu: int16 and mask: uint8 [z, y, x], a crop with the margin that a soft edge needs.

    Outside the tumour and its organ ``image_hu`` holds the nearest tumour voxel's HU, so that no other tissue is pasted with a soft edge.
    surround_hu: mean of the organ's voxels within ``RING_MM``; NaN where none is.
    """

    case: str
    image_hu: NDArray[np.int16]
    mask: NDArray[np.uint8]
    surround_hu: float

    @property
    def num_bytes(self) -> int:
        """Memory of its arrays."""
        return self.image_hu.nbytes + self.mask.nbytes

    @cached_property
    def num_voxels(self) -> int:
        """Voxels of the tumour."""
        return int(np.count_nonzero(self.mask))

    @classmethod
    def of(cls, crop: TumorCrop, organ_value: int, spacing_mm_zyx: FloatZYX, edge_reach_vox_zyx: IntZYX) -> "BankTumor":
        """Take what is needed of a crop whose margin is ``cut_margin_vox``."""
        margin = cut_margin_vox(spacing_mm_zyx, edge_reach_vox_zyx)
        inside, organ = crop.mask.astype(bool), crop.label == organ_value
        distance_mm, nearest = ndi.distance_transform_edt(~inside, sampling=spacing_mm_zyx, return_indices=True)
        ring = crop.image_hu[(distance_mm <= RING_MM) & organ]
        image = np.where(inside | organ, crop.image_hu, crop.image_hu[tuple(nearest)])
        place = tuple(slice(m - r, n - m + r) for m, r, n in zip(margin, edge_reach_vox_zyx, inside.shape, strict=True))
        surround = float(ring.mean(dtype=np.float64)) if ring.size else math.nan
        return cls(crop.case, np.ascontiguousarray(image[place]), np.ascontiguousarray(crop.mask[place]), surround)


@dataclass(frozen=True)
class TumorBank:
    """Tumours by organ; an organ without one is not painted. spacing_mm_zyx: of their voxels."""

    tumors: Mapping[str, tuple[BankTumor, ...]]
    spacing_mm_zyx: FloatZYX

    @classmethod
    def collect(
        cls, crops: Mapping[str, Iterable[TumorCrop]], region: RegionConfig, config: SynthesisConfig
    ) -> "TumorBank":
        """Fill the memory of ``synthesis.bank_mb``: each organ takes crops in their order until one does not fit its equal part.

        crops: by organ, cut with ``cut_margin_vox``. Components below ``bank_least_mm3`` are left out, and for ``paste: contrast`` those
        that touch no voxel of their organ.
        """
        limit = config.bank_mb * 1_000_000 // max(1, len(crops))
        reach = edge_reach_vox(config.edge_sigma_mm, region.spacing_mm_zyx)
        taken: dict[str, tuple[BankTumor, ...]] = {}
        for organ, found in crops.items():
            kept: list[BankTumor] = []
            left = limit
            for crop in found:
                if np.count_nonzero(crop.mask) * math.prod(region.spacing_mm_zyx) < config.bank_least_mm3:
                    continue
                tumor = BankTumor.of(crop, region.organs[organ].organ, region.spacing_mm_zyx, reach)
                if config.paste == "contrast" and math.isnan(tumor.surround_hu):
                    continue
                if tumor.num_bytes > left:
                    break
                kept.append(tumor)
                left -= tumor.num_bytes
            if kept:
                taken[organ] = tuple(kept)
        return cls(taken, region.spacing_mm_zyx)

    def __len__(self) -> int:
        return sum(map(len, self.tumors.values()))

    @property
    def num_bytes(self) -> int:
        """Memory of all tumours."""
        return sum(t.num_bytes for tumors in self.tumors.values() for t in tumors)

    def summary(self) -> str:
        """One sentence: how many tumours of which organs, in how much memory."""
        by_organ = ", ".join(f"{organ} {len(tumors)}" for organ, tumors in self.tumors.items())
        return f"the bank holds {len(self)} tumours ({by_organ or 'none'}) in {self.num_bytes / 1e6:.1f} MB"


@dataclass(frozen=True, eq=False)
class PastedTumor:
    """A tumour of the bank as it is pasted. axes: which of its axes become z, y, x; flips: of those, which are reversed."""

    tumor: BankTumor
    axes: IntZYX
    flips: tuple[bool, bool, bool]

    @cached_property
    def image_hu(self) -> NDArray[np.int16]:
        """int16 [z, y, x], turned: a view of the bank's memory."""
        return self._turned(self.tumor.image_hu)

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """uint8 [z, y, x], turned: a view of the bank's memory."""
        return self._turned(self.tumor.mask)

    @cached_property
    def extent_vox(self) -> tuple[IntZYX, IntZYX]:
        """First voxel of the mask and the one behind its last, counted from the voxel that is laid on the chosen centre."""
        ((z0, z1), (y0, y1), (x0, x1)) = self._bounds
        cz, cy, cx = self.middle
        return (z0 - cz, y0 - cy, x0 - cx), (z1 - cz, y1 - cy, x1 - cx)

    @cached_property
    def middle(self) -> IntZYX:
        """The voxel in the middle of the mask's extent."""
        return int_zyx((a + b) // 2 for a, b in self._bounds)

    @cached_property
    def _bounds(self) -> tuple[tuple[int, int], ...]:
        bounds = []
        for axis in range(3):
            held = np.flatnonzero(self.mask.any(axis=tuple(a for a in range(3) if a != axis)))
            bounds.append((int(held[0]), int(held[-1]) + 1))
        return tuple(bounds)

    def _turned(self, array: NDArray[_Voxel]) -> NDArray[_Voxel]:
        steps = tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)
        return array.transpose(self.axes)[steps]


def edge_reach_vox(edge_sigma_mm: float, spacing_mm_zyx: FloatZYX) -> IntZYX:
    """Voxels that a soft edge reaches beyond the mask: the window of ``kernels.gaussian_blur``."""
    return int_zyx(int(TRUNCATE * s + 0.5) for s in mm_to_vox(edge_sigma_mm, spacing_mm_zyx))


def cut_margin_vox(spacing_mm_zyx: FloatZYX, edge_reach_vox_zyx: IntZYX) -> IntZYX:
    """The margin of the crops that a bank is made of: the ring around the tumour, and the reach of a soft edge."""
    ring = (math.ceil(RING_MM / s) for s in spacing_mm_zyx)
    return int_zyx(max(a, b) for a, b in zip(ring, edge_reach_vox_zyx, strict=True))


def turns_between(spacing_mm_zyx: FloatZYX) -> list[IntZYX]:
    """The orders of axes that keep every axis's spacing: all six at an isotropic spacing, two where only y and x are alike."""
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    return [
        o for o in orders if all(math.isclose(spacing_mm_zyx[a], s) for a, s in zip(o, spacing_mm_zyx, strict=True))
    ]


def require_bank(bank: TumorBank | None, config: SynthesisConfig, spacing_mm_zyx: FloatZYX) -> TumorBank | None:
    """The bank, checked against the configuration; ConfigError where it is missing, superfluous, empty or of another spacing."""
    if config.synthesizer != "copy-paste":
        if bank is not None:
            raise ConfigError(
                f"a tumour bank with synthesis.synthesizer={config.synthesizer}; want copy-paste. Leave the bank out, or set the synthesizer."
            )
        return None
    if bank is None:
        raise ConfigError(
            "synthesis.synthesizer=copy-paste without a tumour bank; want one. Build it from a store with annotated tumours: "
            "assemble.build_bank(config, store)."
        )
    if not len(bank):
        raise ConfigError(
            "synthesis.synthesizer=copy-paste: the tumour bank is empty. Convert volumes with labelled tumours, choose another --split or "
            f"--fold, lower synthesis.bank_least_mm3 (now {config.bank_least_mm3:g}) or raise synthesis.bank_mb (now {config.bank_mb})."
        )
    off = max(abs(have / want - 1) for have, want in zip(spacing_mm_zyx, bank.spacing_mm_zyx, strict=True))
    if off > 0.01:
        raise ConfigError(
            f"synthesis.synthesizer=copy-paste: the bank's tumours have voxels of {bank.spacing_mm_zyx} mm (z, y, x), the patch has "
            f"{tuple(round(s, 3) for s in spacing_mm_zyx)}; want the same. Resample the volume first."
        )
    return bank
