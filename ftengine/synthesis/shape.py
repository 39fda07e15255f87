"""Draw tumours: which organ, which size, which radii, warps and textures; a function of the patch's address alone."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ftengine.config import RegionConfig, SynthesisConfig
from ftengine.geometry import FloatZYX, mm_to_vox
from ftengine.rng import Purpose, patch_rng

# Released code (reference 1.4): class -> (lowest and highest integer radius, elastic sigmas to choose from or a range), voxels
_RELEASED_RADII_VOX = {"tiny": (3, 5), "small": (6, 10), "medium": (12, 20), "large": (24, 40)}
_RELEASED_SIGMAS_VOX = {"small": (1, 2), "medium": (3, 4, 5, 6), "large": (5, 6, 7, 8, 9, 10)}  # tiny: U(0.5, 1)
_WARP_PLANES = ((0, 1), (1, 2), (0, 2))  # pairs of x, y, z axes, in the order of the kernel's ``warp`` argument

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class TumorDraw:
    """One tumour, drawn but not placed: its centre follows from ``center_draw`` and the organ's voxels."""

    size_class: str
    radii_vox_zyx: FloatZYX
    warp: FloatArray  # (3, 2, 3, 3) displacements in voxels, laid out as ``kernels.tumor_mask`` wants them
    center_draw: tuple[float, float]  # uniform in [0, 1): paper uses the first; released: slice, then pixel


@dataclass(frozen=True)
class PatchDraw:
    """Everything that is random about painting one patch."""

    organ: str
    tumors: tuple[TumorDraw, ...]
    texture_sigma_mm: float
    contrast_factor: float
    edge_sigma_vox: float  # released variant: standard deviation of the mask's edge blur
    texture_draw: tuple[float, float, float, float]  # released variant: field and crop corner, uniform in [0, 1)


def organs_in_patch(label: NDArray[np.uint8], region: RegionConfig, min_voxels: int) -> list[str]:
    """Organs that a tumour may be painted on: enough healthy voxels in the patch; none where any tumour is labelled.

    label: uint8 of any shape. Decided from the label before anything runs.
    """
    counts = np.bincount(label.ravel(), minlength=256)
    if counts[list(region.tumor_values)].any():
        return []
    return [name for name, organ in region.organs.items() if counts[organ.organ] >= min_voxels]


def draw_patch(
    organs: list[str],
    config: SynthesisConfig,
    spacing_mm_zyx: FloatZYX,
    *,
    seed: int,
    epoch: int,
    index: int,
    draw: int = 0,
) -> PatchDraw | None:
    """Draw what to paint on a patch that holds ``organs``; None where ``synthesis.fraction`` leaves it healthy.

    ``draw`` counts redraws of a rejected patch: they keep organ and decision to paint, and draw everything else anew.
    """
    choice = patch_rng(seed, Purpose.TUMOR, epoch=epoch, index=index)
    if not organs or choice.random() >= config.fraction:
        return None
    organ = organs[int(choice.integers(len(organs)))]
    rng = patch_rng(seed, Purpose.TUMOR, epoch=epoch, index=index, draw=draw + 1)
    draw_one = _draw_released_tumor if config.variant == "released" else _draw_tumor
    tumors = tuple(draw_one(rng, config, spacing_mm_zyx) for _ in range(config.num_tumors))
    a, b, c, d = (float(v) for v in rng.random(4))
    return PatchDraw(
        organ=organ,
        tumors=tumors,
        texture_sigma_mm=float(rng.uniform(*config.texture_sigma_mm)),
        contrast_factor=float(rng.uniform(*config.contrast_factor)),
        edge_sigma_vox=float(rng.uniform(1.0, 2.0)),
        texture_draw=(a, b, c, d),
    )


def _draw_size_class(rng: np.random.Generator, config: SynthesisConfig) -> str:
    names = list(config.size_weights)
    weights = np.array([config.size_weights[name] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def _draw_tumor(rng: np.random.Generator, config: SynthesisConfig, spacing_mm_zyx: FloatZYX) -> TumorDraw:
    """Paper variant: radii and warps in millimetres, so that a tumour has the same shape at any spacing."""
    name = _draw_size_class(rng, config)
    size = config.sizes[name]
    radii_mm = rng.uniform(*size.radius_mm, size=3)
    warp_mm = rng.standard_normal((3, 2, 3, 3)) * rng.uniform(*size.warp_sigma_mm)
    radii = mm_to_vox((float(radii_mm[0]), float(radii_mm[1]), float(radii_mm[2])), spacing_mm_zyx)
    spacing_xyz = spacing_mm_zyx[::-1]
    warp = warp_mm.copy()
    for plane, axes in enumerate(_WARP_PLANES):
        for component, axis in enumerate(axes):
            warp[plane, component] /= spacing_xyz[axis]
    return TumorDraw(name, radii, warp, _two(rng))


def _draw_released_tumor(rng: np.random.Generator, config: SynthesisConfig, _spacing_mm_zyx: FloatZYX) -> TumorDraw:
    """Released variant: integer radii in voxels whatever the spacing (reference 1.4)."""
    name = _draw_size_class(rng, config)
    low, high = _RELEASED_RADII_VOX[name]
    x, y, z = (float(r) for r in rng.integers(low, high + 1, size=3))
    sigmas = _RELEASED_SIGMAS_VOX.get(name)
    sigma = float(rng.uniform(0.5, 1.0)) if sigmas is None else float(sigmas[int(rng.integers(len(sigmas)))])
    return TumorDraw(name, (z, y, x), rng.standard_normal((3, 2, 3, 3)) * sigma, _two(rng))


def _two(rng: np.random.Generator) -> tuple[float, float]:
    first, second = (float(v) for v in rng.random(2))
    return first, second
