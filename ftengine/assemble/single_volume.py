"""One tumour painted into one CT that is in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.assemble.build import build_synthesizer_of_any_size, check_blend, resolve_device
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import Box, FloatZYX, int_zyx
from ftengine.kernels import choose_center
from ftengine.synthesis.bank import TumorBank
from ftengine.synthesis.center import margin_vox
from ftengine.synthesis.engine import Address, Generator
from ftengine.training.checkpoint import load_generator, load_segmenter


@dataclass(frozen=True)
class SynthesisResult:
    """One painted CT. image_hu int16, label and mask uint8, all [z, y, x]; proportion is P of Eq. 4, NaN without a judge.

    Where ``passed`` is false, image and label are the ones given (Eq. 5) and mask shows where the tumour would have been.
    """

    image_hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    proportion: float
    passed: bool


def synthesize(
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8],
    organ: str,
    *,
    seed: int = 0,
    spacing_mm_zyx: FloatZYX | None = None,
    generator: Generator | str | Path | None = None,
    judge: nn.Module | str | Path | None = None,
    config: Config | None = None,
    bank: TumorBank | None = None,
) -> SynthesisResult:
    """Paint one tumour into ``organ`` of a CT.

    image_hu: int16 HU [z, y, x], RAS+; label: uint8 of the same shape with the region's values (the organ must be there). A volume
    larger than the region's patch is painted in one patch around the tumour's place. generator, judge: networks or checkpoint files;
    generator None: a fixed contrast instead of tanh(G(x)); judge None: no quality control. config: its region and synthesis sections
    apply (default: the abdomen preset, or the chest one where ``organ`` is lung); ``synthesis.synthesizer: copy-paste`` takes a bank, as
    ``build_bank`` makes it. Voxels outside
    the mask (with a soft edge: outside the organ) come back bit-identical.
    Raises ConfigError for an unknown organ, shapes that differ, an organ that the label does not hold, or one without a tumour in the bank.
    """
    if config is None:
        config = Config.preset("chest" if organ == "lung" else "abdomen")
    region = config.region
    if organ not in region.organs:
        raise ConfigError(f"organ={organ!r}: region {region.name} has {', '.join(region.organs)}.")
    image_hu, label = np.asarray(image_hu), np.asarray(label)
    if image_hu.ndim != 3 or image_hu.shape != label.shape:
        raise ConfigError(
            f"image_hu has shape {image_hu.shape} and label {label.shape}; want two equal [z, y, x] shapes."
        )
    if not np.issubdtype(image_hu.dtype, np.integer) or not np.issubdtype(label.dtype, np.integer):
        raise ConfigError(
            f"image_hu is {image_hu.dtype} and label {label.dtype}; want integer HU and integer label values."
        )
    if bank is not None and organ not in bank.tumors:
        raise ConfigError(
            f"the bank holds no tumour of {organ}; it has {', '.join(bank.tumors) or 'none'}. Choose one of these."
        )
    spacing = spacing_mm_zyx or region.spacing_mm_zyx
    inside = label == region.organs[organ].organ
    if not inside.any():
        raise ConfigError(
            f"label holds no {organ} (value {region.organs[organ].organ}); want at least one voxel of it."
        )

    box = working_box(config, torch.from_numpy(np.ascontiguousarray(inside)), seed, spacing)
    place = box.slices()
    low, high = region.window_hu
    device = resolve_device(config.device)
    window = np.clip((image_hu[place].astype(np.float32) - low) / (high - low), 0.0, 1.0)
    only_organ = np.where(inside[place], label[place], 0).astype(
        np.uint8
    )  # real tumours nearby neither forbid nor take part
    image_batch = torch.from_numpy(window)[None, None].to(device)
    label_batch = torch.from_numpy(only_organ)[None, None].to(device)
    synthesis = config.synthesis.model_copy(update={"fraction": 1.0, "min_organ_voxels": 1})
    loaded_generator: Generator | None
    if isinstance(generator, str | Path):
        loaded_generator, trained = load_generator(generator)
        check_blend(config, trained, generator)
    else:
        loaded_generator = generator
    if isinstance(loaded_generator, nn.Module):
        loaded_generator = loaded_generator.to(device).eval()
    segmenter = load_segmenter(judge)[0] if isinstance(judge, str | Path) else judge
    synthesizer = build_synthesizer_of_any_size(
        config.model_copy(update={"synthesis": synthesis, "seed": seed}),
        loaded_generator,
        None if segmenter is None else segmenter.to(device).eval(),
        spacing_mm_zyx=spacing,
        bank=bank,
    )
    painting = synthesizer.paint(image_batch, label_batch, [Address(0, 0)])
    painted = painting.records()[0]
    assert painted is not None  # noqa: S101 - fraction 1 and an organ that is there: always painted
    mask = np.zeros(label.shape, dtype=np.uint8)
    mask[place] = painting.mask[0, 0].cpu().numpy()
    new_image, new_label = image_hu.astype(np.int16, copy=True), label.astype(np.uint8, copy=True)
    if painted.passed:
        change = (painting.image - image_batch)[0, 0].cpu().numpy() * (high - low)
        new_image[place] += np.rint(change).astype(np.int16)  # HU outside the window keep their distance to it
        new_label[mask.astype(bool)] = region.organs[organ].tumor
    return SynthesisResult(new_image, new_label, mask, painted.proportion, painted.passed)


def working_box(config: Config, inside: torch.Tensor, seed: int, spacing_mm_zyx: FloatZYX) -> Box:
    """The whole volume where it fits a patch of the region, else a patch around a voxel of the organ.

    inside: bool [z, y, x], the organ, at least one voxel of it; seed: decides the voxel.
    """
    shape = int_zyx(inside.shape)
    patch = config.region.patch_zyx
    if all(n <= p for n, p in zip(shape, patch, strict=True)):
        return Box((0, 0, 0), shape)
    margin = margin_vox(config.synthesis.center_margin_mm, spacing_mm_zyx)
    organ = inside.contiguous()[None]
    center = int_zyx(choose_center(organ, margin, [np.random.default_rng(seed).random()])[0, 0].tolist())
    size = int_zyx(min(n, p) for n, p in zip(shape, patch, strict=True))
    origin = int_zyx(min(max(c - s // 2, 0), n - s) for c, s, n in zip(center, size, shape, strict=True))
    return Box(origin, size)
