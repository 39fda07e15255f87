"""Draw tumours: which organ, which size, which radii, warps and textures; a function of the patch's address alone.

Three laws of shape. ``variant: released`` and ``shape: paper`` draw one warped ellipsoid from a size class. ``shape: realistic`` draws a
volume from the organ's distribution, a main ellipsoid and lobes that overlap it, from numbers fitted to real tumours (docs/shapes.md).
``synthesizer: copy-paste`` draws no shape but a tumour of the bank, and how it is turned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from ftengine.config import (
    MANY_TUMORS,
    POOLED_SHAPE,
    Range,
    RealisticShapeConfig,
    RegionConfig,
    SizeClassConfig,
    SynthesisConfig,
)
from ftengine.geometry import FloatZYX, IntZYX, float_zyx, int_zyx, mm_to_vox
from ftengine.rng import Purpose, patch_rng
from ftengine.synthesis.bank import PastedTumor, TumorBank, turns_between

# Released code (reference 1.4): class -> (lowest and highest integer radius, elastic sigmas to choose from or a range), voxels
_RELEASED_RADII_VOX = {"tiny": (3, 5), "small": (6, 10), "medium": (12, 20), "large": (24, 40)}
_RELEASED_SIGMAS_VOX = {"small": (1, 2), "medium": (3, 4, 5, 6), "large": (5, 6, 7, 8, 9, 10)}  # tiny: U(0.5, 1)
_WARP_PLANES = ((0, 1), (1, 2), (0, 2))  # pairs of x, y, z axes, in the order of the kernel's ``warp`` argument

_REFERENCE_RADIUS_MM = 20.0  # where a realistic tumour has ``lobes`` lobes on average
_MAX_LOBES = 32  # more cannot be told from each other
_RIM_OF_RADIUS = 1 / 3  # a rim is at most so wide: a core is left
_UNION_STEPS = 32  # grid points an axis that the volume of overlapping ellipsoids is counted on: within 2 %

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Ellipsoid:
    """One warped ellipsoid of a tumour, in voxels; ``offset_vox_zyx`` is its centre's from the tumour's."""

    offset_vox_zyx: IntZYX
    radii_vox_zyx: FloatZYX
    warp: FloatArray  # (3, 2, 3, 3) displacements, laid out as ``kernels.tumor_mask`` wants them

    def center_zyx(self, tumor_center_zyx: IntZYX) -> IntZYX:
        """The voxel of its centre when the tumour's lies at ``tumor_center_zyx``."""
        return int_zyx(c + o for c, o in zip(tumor_center_zyx, self.offset_vox_zyx, strict=True))


@dataclass(frozen=True)
class TumorDraw:
    """One tumour, drawn but not placed: its centre follows from ``center_draw`` and the organ's voxels.

    ``radii_vox_zyx`` and ``warp`` are those of the main ellipsoid; the tumour is the union with its ``lobes``. Where ``pasted`` is given,
    it is that tumour of the bank, and the radii are half its extent.
    """

    size_class: str
    radii_vox_zyx: FloatZYX
    warp: FloatArray  # (3, 2, 3, 3) displacements in voxels, laid out as ``kernels.tumor_mask`` wants them
    center_draw: tuple[float, float]  # uniform in [0, 1): paper uses the first; released: slice, then pixel
    lobes: tuple[Ellipsoid, ...] = ()  # shape realistic
    pasted: PastedTumor | None = None  # synthesizer copy-paste

    @property
    def ellipsoids(self) -> tuple[Ellipsoid, ...]:
        """The main ellipsoid, then the lobes."""
        return Ellipsoid((0, 0, 0), self.radii_vox_zyx, self.warp), *self.lobes


@dataclass(frozen=True)
class Style:
    """What makes the tumours of one patch look different from others, beyond G and the contrast factor.

    rim_width_mm: 0 for no rim. rim_contrast: of the rim, over the core's. target_hu: mean contrast inside M, None where G and the factor
    decide it. heterogeneity: deviation of the contrast inside M over its mean, by a noise field.
    """

    is_hyperdense: bool = False
    rim_width_mm: float = 0.0
    rim_contrast: float = 0.0
    target_hu: float | None = None
    heterogeneity: float = 0.0


@dataclass(frozen=True)
class PatchDraw:
    """Everything that is random about painting one patch."""

    organ: str
    tumors: tuple[TumorDraw, ...]
    texture_sigma_mm: float
    contrast_factor: float
    edge_sigma_vox: float  # released variant: standard deviation of the mask's edge blur
    # released variant, syntumor, heterogeneity: noise field and crop corner, uniform in [0, 1)
    texture_draw: tuple[float, float, float, float]
    style: Style = Style()
    syntumor_contrast_hu: float = 0.0  # D
    syntumor_edge_mm: float = 0.0


def count_labels(label: NDArray[np.uint8]) -> tuple[int, ...]:
    """The voxels of each label value from 0 to the largest that is there. label: uint8 of any shape."""
    return tuple(int(n) for n in np.bincount(label.ravel()))


def organs_in_patch(label_voxels: Sequence[int], region: RegionConfig, min_voxels: int) -> list[str]:
    """Organs that a tumour may be painted on: enough healthy voxels in the patch; none where any tumour is labelled.

    label_voxels: how many voxels of the patch have each label value, from 0 on; values beyond its end have none
    (``count_labels``). Flips and turns leave them as they are, so the host knows them before anything runs on a device.
    """

    def voxels(value: int) -> int:
        return label_voxels[value] if value < len(label_voxels) else 0

    if any(voxels(value) for value in region.tumor_values):
        return []
    return [name for name, organ in region.organs.items() if voxels(organ.organ) >= min_voxels]


def draw_patch(
    organs: list[str],
    config: SynthesisConfig,
    spacing_mm_zyx: FloatZYX,
    *,
    seed: int,
    epoch: int,
    index: int,
    draw: int = 0,
    bank: TumorBank | None = None,
) -> PatchDraw | None:
    """Draw what to paint on a patch that holds ``organs``; None where ``synthesis.fraction`` leaves it healthy.

    ``draw`` counts redraws of a rejected patch: they keep organ and decision to paint, and draw everything else anew. bank: for
    ``synthesizer: copy-paste``, which paints only organs that have a tumour in it.
    """
    if bank is not None:
        organs = [organ for organ in organs if organ in bank.tumors]
    choice = patch_rng(seed, Purpose.TUMOR, epoch=epoch, index=index)
    if not organs or choice.random() >= config.fraction:
        return None
    organ = organs[int(choice.integers(len(organs)))]
    rng = patch_rng(seed, Purpose.TUMOR, epoch=epoch, index=index, draw=draw + 1)
    tumors = _draw_tumors(rng, config, spacing_mm_zyx, organ, bank)
    a, b, c, d = (float(v) for v in rng.random(4))
    return PatchDraw(
        organ=organ,
        tumors=tumors,
        texture_sigma_mm=float(rng.uniform(*config.texture_sigma_mm)),
        contrast_factor=float(rng.uniform(*config.contrast_factor)),
        edge_sigma_vox=float(rng.uniform(1.0, 2.0)),
        texture_draw=(a, b, c, d),
        # new draws come last: those above keep their bits
        style=_draw_style(rng.random(6).tolist(), config, tumors, spacing_mm_zyx),
        syntumor_contrast_hu=float(rng.uniform(*config.syntumor_contrast_hu)),
        syntumor_edge_mm=float(rng.uniform(*config.syntumor_edge_mm)),
    )


def _draw_style(
    draws: list[float], config: SynthesisConfig, tumors: Sequence[TumorDraw], spacing_mm_zyx: FloatZYX
) -> Style:
    """All that a style may need is drawn at any configuration: a key that is turned on leaves what the others draw as it was."""
    sign, rim, width, contrast, target, noise = draws
    smallest_mm = min(r * s for t in tumors for r, s in zip(t.radii_vox_zyx, spacing_mm_zyx, strict=True))
    has_rim = rim < config.rim_fraction
    return Style(
        is_hyperdense=sign < config.hyperdense_fraction,
        rim_width_mm=min(_between(config.rim_width_mm, width), smallest_mm * _RIM_OF_RADIUS) if has_rim else 0.0,
        rim_contrast=_between(config.rim_contrast, contrast) if has_rim else 0.0,
        target_hu=None if config.target_contrast_hu is None else _between(config.target_contrast_hu, target),
        heterogeneity=_between(config.heterogeneity, noise),
    )


def _between(bounds: Range, draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def size_class_of(radius_mm: float, sizes: Mapping[str, SizeClassConfig]) -> str:
    """The size class of a tumour with the volume of a ball of ``radius_mm``.

    Between two classes the border lies half-way from the largest radius of the smaller one to the smallest of the larger one: with the
    released sizes at 8.25, 16.5 and 33 mm.
    """
    ordered = sorted(sizes, key=lambda name: sum(sizes[name].radius_mm))
    for smaller, larger in pairwise(ordered):
        if radius_mm < (sizes[smaller].radius_mm[1] + sizes[larger].radius_mm[0]) / 2:
            return smaller
    return ordered[-1]


def shape_law(organ: str, config: SynthesisConfig) -> RealisticShapeConfig:
    """The law of ``shape: realistic`` for an organ: its own, or the pooled one."""
    return config.realistic_shapes.get(organ) or config.realistic_shapes[POOLED_SHAPE]


def _draw_tumors(
    rng: np.random.Generator,
    config: SynthesisConfig,
    spacing_mm_zyx: FloatZYX,
    organ: str,
    bank: TumorBank | None,
) -> tuple[TumorDraw, ...]:
    if bank is not None:
        return tuple(_draw_pasted(rng, config, bank, organ) for _ in range(config.num_tumors))
    if config.syntumor_tumors == "many":
        return tuple(_draw_tumor(rng, config, spacing_mm_zyx, name) for name in _draw_many(rng, config))
    return tuple(_draw_one(rng, config, spacing_mm_zyx, organ) for _ in range(config.num_tumors))


def _draw_pasted(rng: np.random.Generator, config: SynthesisConfig, bank: TumorBank, organ: str) -> TumorDraw:
    """A tumour of the bank, each of its organ's alike, in a random orientation."""
    tumors = bank.tumors[organ]
    chosen = tumors[int(rng.integers(len(tumors)))]
    orders = turns_between(bank.spacing_mm_zyx)
    axes = orders[int(rng.integers(len(orders)))]
    z, y, x = (bool(v < 0.5) for v in rng.random(3))
    pasted = (
        PastedTumor(chosen, axes, (z, y, x))
        if config.paste_turns
        else PastedTumor(chosen, (0, 1, 2), (False, False, False))
    )
    first, end = pasted.extent_vox
    radii = float_zyx((b - a) / 2 for a, b in zip(first, end, strict=True))
    volume_mm3 = chosen.num_voxels * math.prod(bank.spacing_mm_zyx)
    name = size_class_of((3.0 * volume_mm3 / (4.0 * math.pi)) ** (1.0 / 3.0), config.sizes)
    return TumorDraw(name, radii, np.zeros((3, 2, 3, 3)), _two(rng), pasted=pasted)


def _draw_many(rng: np.random.Generator, config: SynthesisConfig) -> list[str]:
    """The size class of each tumour of a patch (``MANY_TUMORS``): all of one class or, as often as an average class, some of each."""
    names = [name for name, weight in config.size_weights.items() if weight > 0]
    weights = np.array([config.size_weights[name] for name in names])
    weights = np.append(weights, weights.mean())
    kind = int(rng.choice(len(weights), p=weights / weights.sum()))
    chosen = names if kind == len(names) else [names[kind]]
    return [name for name in chosen for _ in range(int(rng.integers(MANY_TUMORS[name][0], MANY_TUMORS[name][1] + 1)))]


def _draw_one(rng: np.random.Generator, config: SynthesisConfig, spacing_mm_zyx: FloatZYX, organ: str) -> TumorDraw:
    if config.variant == "released":
        return _draw_released_tumor(rng, config, spacing_mm_zyx)
    if config.shape == "realistic":
        return _draw_realistic_tumor(rng, config, spacing_mm_zyx, shape_law(organ, config))
    return _draw_tumor(rng, config, spacing_mm_zyx)


def _draw_size_class(rng: np.random.Generator, config: SynthesisConfig) -> str:
    names = list(config.size_weights)
    weights = np.array([config.size_weights[name] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def _draw_tumor(
    rng: np.random.Generator, config: SynthesisConfig, spacing_mm_zyx: FloatZYX, size_class: str | None = None
) -> TumorDraw:
    """Paper variant: radii and warps in millimetres, so that a tumour has the same shape at any spacing."""
    name = size_class or _draw_size_class(rng, config)
    size = config.sizes[name]
    radii_mm = rng.uniform(*size.radius_mm, size=3)
    warp_mm = rng.standard_normal((3, 2, 3, 3)) * rng.uniform(*size.warp_sigma_mm)
    radii = mm_to_vox((float(radii_mm[0]), float(radii_mm[1]), float(radii_mm[2])), spacing_mm_zyx)
    return TumorDraw(name, radii, _warp_vox(warp_mm, spacing_mm_zyx), _two(rng))


def _draw_realistic_tumor(
    rng: np.random.Generator, config: SynthesisConfig, spacing_mm_zyx: FloatZYX, law: RealisticShapeConfig
) -> TumorDraw:
    """Shape realistic: first in units of the main ellipsoid's mean radius, then scaled to the drawn volume, in mm.

    The size class is that of the drawn volume; the warps change it a little, the organ's border may cut it.
    """
    low, high = (math.log(v / law.volume_ml) for v in law.volume_range_ml)
    level = float(rng.random())
    if law.volume_log_sigma > 0:
        low_p, high_p = ndtr(low / law.volume_log_sigma), ndtr(high / law.volume_log_sigma)
        volume_ml = law.volume_ml * math.exp(law.volume_log_sigma * float(ndtri(low_p + level * (high_p - low_p))))
    else:
        volume_ml = law.volume_ml
    volume_mm3 = volume_ml * 1000.0
    radius_mm = (3.0 * volume_mm3 / (4.0 * math.pi)) ** (1.0 / 3.0)

    logs = rng.standard_normal(3) * np.array(law.axis_log_sigma_zyx)
    main = np.exp(logs - logs.mean())
    mean_lobes = law.lobes * (radius_mm / _REFERENCE_RADIUS_MM) ** law.lobes_power
    num_lobes = min(int(rng.poisson(mean_lobes)), _MAX_LOBES)
    centers, radii = np.zeros((num_lobes + 1, 3)), np.tile(main, (num_lobes + 1, 1))
    for lobe in range(1, num_lobes + 1):
        direction = rng.standard_normal(3)
        centers[lobe] = direction / np.linalg.norm(direction) * main * rng.uniform(*law.lobe_offset)
        radii[lobe] *= rng.uniform(*law.lobe_radius)
    to_mm = (volume_mm3 / union_volume(centers, radii)) ** (1.0 / 3.0)
    centers, radii = centers * to_mm, radii * to_mm

    ellipsoids = []
    for center_mm, radii_mm in zip(centers, radii, strict=True):
        own_mm = float(np.prod(radii_mm)) ** (1.0 / 3.0)
        warp_mm = rng.standard_normal((3, 2, 3, 3)) * (rng.uniform(*law.warp_sigma) * own_mm)
        offset = int_zyx(round(v) for v in mm_to_vox(float_zyx(center_mm), spacing_mm_zyx))
        ellipsoids.append(
            Ellipsoid(offset, mm_to_vox(float_zyx(radii_mm), spacing_mm_zyx), _warp_vox(warp_mm, spacing_mm_zyx))
        )
    first, *lobes = ellipsoids
    name = size_class_of(radius_mm, config.sizes)
    return TumorDraw(name, first.radii_vox_zyx, first.warp, _two(rng), tuple(lobes))


def union_volume(centers: FloatArray, radii: FloatArray) -> float:
    """Volume of the union of axis-parallel ellipsoids, centres and radii [N, 3] in any one unit, counted on a grid of points."""
    low, high = (centers - radii).min(axis=0), (centers + radii).max(axis=0)
    step = (high - low) / _UNION_STEPS
    axes = [start + (np.arange(_UNION_STEPS) + 0.5) * width for start, width in zip(low, step, strict=True)]
    inside = np.zeros((_UNION_STEPS,) * 3, dtype=bool)
    for center, radius in zip(centers, radii, strict=True):
        z, y, x = (((axis - c) / r) ** 2 for axis, c, r in zip(axes, center, radius, strict=True))
        inside |= z[:, None, None] + y[:, None] + x < 1.0
    return float(np.count_nonzero(inside) * np.prod(step))


def _warp_vox(warp_mm: FloatArray, spacing_mm_zyx: FloatZYX) -> FloatArray:
    """Displacements in mm (3, 2, 3, 3) as voxels of each component's own axis."""
    spacing_xyz = spacing_mm_zyx[::-1]
    warp = warp_mm.copy()
    for plane, axes in enumerate(_WARP_PLANES):
        for component, axis in enumerate(axes):
            warp[plane, component] /= spacing_xyz[axis]
    return warp


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
