"""``RandTumorSynthesisd``: our synthesis and quality control as a dictionary transform of MONAI."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.type_conversion import convert_to_dst_type
from torch import nn

from ftengine.adapters.verdict import painted_of, verdict_of
from ftengine.assemble import build_synthesizer_of_any_size, load_networks, resolve_device, working_box
from ftengine.config import Config, OrganConfig, RegionConfig
from ftengine.errors import ConfigError
from ftengine.geometry import (
    MAX_SPACING_MM,
    MIN_SPACING_MM,
    Box,
    FloatZYX,
    Grid,
    IntZYX,
    float_zyx,
    grid_from_codes,
    grid_from_matrix,
    grid_offset_vox,
    int_zyx,
    ras_permutation,
)
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.inference import Inference
from ftengine.types import Painted

Organs = str | Sequence[str] | Mapping[str, tuple[int, int]]
Network = nn.Module | str | Path

_WHERE = "RandTumorSynthesisd"
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_GRID_TOLERANCE_VOX = 0.1
_SPACING_TOLERANCE = (
    0.05  # networks see tissue at the spacing they were trained at; resampling to it leaves less than this
)


@dataclass(frozen=True)
class _Frame:
    """How a channel-first array [1, a, b, c] becomes z, y, x in RAS+, and back.

    source: the axis of the reversed array (c, b, a) that becomes z, y, x. flip: which of z, y, x are then turned round.
    """

    source: IntZYX
    flip: tuple[bool, bool, bool]
    spacing_mm_zyx: FloatZYX

    @classmethod
    def of(cls, grid: Grid) -> "_Frame":
        """grid: of the array reversed, so that a, b, c are its x, y, z."""
        source, flip = ras_permutation(grid)
        return cls(source, flip, float_zyx(grid.spacing_mm_zyx[axis] for axis in source))

    def to_zyx(self, array: torch.Tensor) -> torch.Tensor:
        """[1, a, b, c] -> [z, y, x], a copy."""
        moved = array[0].permute(2, 1, 0).permute(self.source)
        return self._flipped(moved).clone(memory_format=torch.contiguous_format)

    def from_zyx(self, array: torch.Tensor) -> torch.Tensor:
        """[z, y, x] -> [1, a, b, c], contiguous."""
        moved = self._flipped(array).permute([self.source.index(axis) for axis in range(3)])
        return moved.permute(2, 1, 0)[None].contiguous()

    def _flipped(self, array: torch.Tensor) -> torch.Tensor:
        axes = [axis for axis in range(3) if self.flip[axis]]
        return array.flip(axes) if axes else array


@dataclass(frozen=True)
class _Result:
    """A painted sample: image, label and mask (uint8) in the shape and axes of the sample, and what was done."""

    image: torch.Tensor
    label: torch.Tensor
    mask: torch.Tensor
    painted: Painted


class RandTumorSynthesisd(MapTransform, RandomizableTransform):
    """Paints a tumour into an organ of a CT sample, with its label; samples without such an organ or with a tumour pass unchanged.

    Image and label are channel first with one channel, [1, a, b, c], of one shape: numpy arrays, tensors or MetaTensors, on the CPU or a GPU.
    Where an array has an affine (a MetaTensor that was loaded or resampled), it says which axis is which and how far voxels lie apart; for
    others ``axcodes`` and ``pixdim`` do. The synthesis and its networks always see z, y, x in RAS+, so that the order and the direction
    of the axes change nothing. A sample larger than ``config.region.patch_zyx`` is painted in one patch of it around a voxel of an organ.

    Outputs keep type, dtype, device, meta data and ``applied_operations`` (to which, like MONAI's intensity transforms, this one adds
    nothing: it has no inverse). Voxels outside the tumour (with a soft edge: outside the organ) are bit-identical; a tumour that quality
    control throws away leaves image and label as they were (Eq. 5). The inputs are never changed in place.

    Everything random follows from ``self.R``, three numbers of it a sample, so ``set_random_state`` reproduces a run. For workers that are spawned
    give generator and judge as paths: each process loads them when it first paints.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        *,
        config: Config | str = "abdomen",
        input: Literal["hu", "unit"] = "hu",  # noqa: A002 - what goes in
        organs: Organs | None = None,
        prob: float = 1.0,
        generator: Network | None = None,
        judge: Network | None = None,
        pixdim: tuple[float, float, float] | None = None,
        axcodes: str = "RAS",
        mask_key: str | None = None,
        verdict_key: str | None = "synthesis",
        device: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        """Check the arguments; networks are loaded when a sample is first painted.

        keys: the image's and the label's. config: a configuration or the name of a preset; its region (window, patch, label values, organs),
        synthesis, qc and seed apply, but for ``synthesis.fraction``, whose place ``prob`` takes.
        input: "hu", or "unit" for floats that were clipped to ``region.window_hu`` and scaled to [0, 1].
        organs: those to paint, by name (None: all of the region), where labels have the region's values; or {name: (value of the organ,
        value of its tumour)} as the labels have them. Other values are left alone, those of a listed tumour forbid painting.
        generator, judge: networks, of which copies are used, or checkpoints of ``ftengine train``; without a generator
        ``synthesis.fixed_contrast`` is painted, without a judge every tumour is kept. Both need samples at the region's spacing.
        pixdim: mm between voxels along each array axis, in the order of the array, for arrays without an affine. axcodes: where those axes
        run to, as in MONAI's ``Orientationd``; "RAS" is x, y, z.
        mask_key: where to put the mask of the drawn tumour, in the type of the label, also of one that was thrown away; zeros elsewhere.
        verdict_key: where to put ``adapters.verdict.verdict_of``. device: where to paint; None is where the image lies.

        Raises ConfigError for an argument that cannot be, and, when called, for a sample that does not fit: channels, shapes, spacing,
        values outside [0, 1] of a "unit" image, fractional labels.
        """
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if len(self.keys) != 2:
            raise ConfigError(
                f"{_WHERE}: keys={self.keys}; want two, the image's and the label's, e.g. ('image', 'label')."
            )
        if input not in ("hu", "unit"):
            raise ConfigError(f"{_WHERE}: input={input!r}; want 'hu' or 'unit'.")
        config = Config.preset(config) if isinstance(config, str) else config
        synthesis = config.synthesis.model_copy(update={"fraction": 1.0})
        self.config = config.model_copy(update={"synthesis": synthesis})
        self._input = input
        self._values, self._forbidding = _label_values(organs, config.region)
        self._networks = (generator, judge)
        self._pixdim = None if pixdim is None else _checked_spacing(tuple(float(p) for p in pixdim), "pixdim")
        self._axcodes = axcodes
        grid_from_codes((1, 1, 1), (1.0, 1.0, 1.0), axcodes)  # refuses codes that cannot be
        self._mask_key, self._verdict_key = mask_key, verdict_key
        self._device = device
        self._address = Address(0, 0)
        self._synthesizer: tuple[tuple[FloatZYX, torch.device], Synthesizer] | None = None

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """As MONAI's: seed ``self.R``, or take ``state`` for it."""
        super().set_random_state(seed, state)
        return self

    def randomize(self, data: Any = None) -> None:
        """Decide whether to paint, and draw the address that everything else follows from. The same numbers whatever the sample holds."""
        super().randomize(data)
        epoch, index = self.R.randint(0, 2**63 - 1, size=2, dtype=np.int64).tolist()
        self._address = Address(epoch, index)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Paint one sample."""
        sample = dict(data)
        self.randomize()
        if not set(self.keys) <= sample.keys():
            if self.allow_missing_keys:
                return sample
            raise KeyError(
                f"{_WHERE}: the sample has no {', '.join(map(repr, set(self.keys) - sample.keys()))}; it has {list(sample)}."
            )
        image_key, label_key = self.keys
        image, label = sample[image_key], sample[label_key]
        frame = self._frame(image, label)
        result = self._paint(_tensor(image), _tensor(label), frame) if self._do_transform else None
        if result is not None and result.painted.passed:
            sample[image_key] = convert_to_dst_type(result.image, dst=image)[0]
            sample[label_key] = convert_to_dst_type(result.label, dst=label)[0]
        if self._mask_key is not None:
            mask = torch.zeros(tuple(label.shape), dtype=torch.uint8) if result is None else result.mask
            sample[self._mask_key] = convert_to_dst_type(mask, dst=label)[0]
        if self._verdict_key is not None:
            sample[self._verdict_key] = verdict_of(None if result is None else result.painted)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """Without the synthesizer, which every process and copy makes for itself."""
        return self.__dict__ | {"_synthesizer": None}

    def _frame(self, image: Any, label: Any) -> _Frame:
        """Check the shapes and find out how the axes lie; ConfigError where the sample does not fit."""
        for key, array in zip(self.keys, (image, label), strict=True):
            if not isinstance(array, np.ndarray | torch.Tensor):
                raise ConfigError(
                    f"{_WHERE}: {key!r} is a {type(array).__name__}; want a numpy array or a tensor. Put LoadImaged before this transform."
                )
            if array.ndim != 4 or array.shape[0] != 1:
                raise ConfigError(
                    f"{_WHERE}: {key!r} has shape {tuple(array.shape)}; want one channel and three axes, [1, x, y, z]. "
                    "EnsureChannelFirstd adds the channel; of a one-hot label take the classes as values."
                )
        wanted = "if" if self._input == "hu" else "f"
        if _kind(image) not in wanted:
            raise ConfigError(
                f"{_WHERE}: {self.keys[0]!r} is {image.dtype}; want {'signed HU' if wanted == 'if' else 'floats'} for input={self._input!r}."
            )
        if _kind(label) not in "iuf":
            raise ConfigError(
                f"{_WHERE}: {self.keys[1]!r} is {label.dtype}; want numbers, which can hold an organ and its tumour."
            )
        if tuple(image.shape) != tuple(label.shape):
            raise ConfigError(
                f"{_WHERE}: {self.keys[0]!r} has shape {tuple(image.shape)}, {self.keys[1]!r} {tuple(label.shape)}; want the same grid."
            )
        grid, label_grid = _grid_of(image), _grid_of(label)
        if grid is not None and label_grid is not None and grid_offset_vox(grid, label_grid) > _GRID_TOLERANCE_VOX:
            raise ConfigError(
                f"{_WHERE}: the affines of {self.keys[0]!r} and {self.keys[1]!r} lie {grid_offset_vox(grid, label_grid):.2f} voxels apart; "
                "want the same grid. Give both keys to every spatial transform."
            )
        grid = grid or label_grid
        if grid is None:
            if self._pixdim is None:
                raise ConfigError(
                    f"{_WHERE}: {self.keys[0]!r} has no affine, so that the size of its voxels is not known. Give pixdim=(x, y, z) in mm."
                )
            grid = grid_from_codes(int_zyx(image.shape[:0:-1]), float_zyx(self._pixdim[::-1]), self._axcodes)
        return _Frame.of(grid)

    def _paint(self, image: torch.Tensor, label: torch.Tensor, frame: _Frame) -> _Result | None:
        """Paint a sample [1, a, b, c]; None where it is not eligible."""
        device = image.device if self._device is None else resolve_device(self._device)
        new_label = frame.to_zyx(label).to(device)
        region_label = self._in_region_values(new_label)
        organs = self._eligible_organs(region_label)
        if not organs:
            return None
        new_image = frame.to_zyx(image).to(device)
        place = Box((0, 0, 0), int_zyx(new_image.shape)).slices()
        if any(n > p for n, p in zip(new_image.shape, self.config.region.patch_zyx, strict=True)):
            organ = organs[self._address.index % len(organs)]
            inside = region_label == self.config.region.organs[organ].organ
            place = working_box(self.config, inside, self._address.index, frame.spacing_mm_zyx).slices()
            region_label = torch.where(inside, region_label, 0)
        unit = self._windowed(new_image[place])
        synthesizer = self._synthesizer_for(frame.spacing_mm_zyx, device)
        painting = synthesizer.paint(unit[None, None], region_label[place][None, None].contiguous(), [self._address])
        painted = painted_of(painting)
        if painted is None:
            return None
        mask = torch.zeros_like(new_label, dtype=torch.uint8)
        mask[place] = painting.mask[0, 0]
        if painted.passed:
            new_image[place] = self._with_tumor(new_image[place], unit, painting.image[0, 0])
            new_label[mask.bool()] = self._values[painted.organ].tumor
        return _Result(frame.from_zyx(new_image), frame.from_zyx(new_label), frame.from_zyx(mask), painted)

    def _in_region_values(self, label: torch.Tensor) -> torch.Tensor:
        """The label in the region's values, uint8: organs to paint and tumours that forbid it; all else is 0."""
        if label.is_floating_point() and bool((label != label.round()).any()):
            raise ConfigError(
                f"{_WHERE}: {self.keys[1]!r} holds fractions; want whole values. Give it mode='nearest' in every spatial transform."
            )
        region = self.config.region
        region_label = torch.zeros_like(label, dtype=torch.uint8)
        values = [(v.organ, region.organs[name].organ) for name, v in self._values.items()]
        for theirs, ours in values + [(value, region.tumor_values[0]) for value in self._forbidding]:
            region_label += (label == theirs).view(torch.uint8).mul_(ours)
        return region_label

    def _eligible_organs(self, region_label: torch.Tensor) -> list[str]:
        region, counts = self.config.region, torch.bincount(region_label.flatten(), minlength=256).tolist()
        if any(counts[value] for value in region.tumor_values):
            return []
        least = self.config.synthesis.min_organ_voxels
        return [name for name in self._values if counts[region.organs[name].organ] >= least]

    def _windowed(self, image: torch.Tensor) -> torch.Tensor:
        """The image as the networks take it: float32 in [0, 1]. ConfigError for values that are not of the kind ``input`` says."""
        least, most = (float(v) for v in image.aminmax())
        is_unit = least >= 0.0 and most <= 1.0
        if self._input == "hu":
            if is_unit or not math.isfinite(least) or not math.isfinite(most):
                raise ConfigError(
                    f"{_WHERE}: {self.keys[0]!r} holds {least:g} to {most:g}; want HU for input='hu'. For an image that is scaled already, "
                    "give input='unit'."
                )
            low, high = self.config.region.window_hu
            return ((image.float() - low) / (high - low)).clamp_(0.0, 1.0)
        if not is_unit:
            low, high = self.config.region.window_hu
            raise ConfigError(
                f"{_WHERE}: {self.keys[0]!r} holds {least:g} to {most:g}; want 0 to 1 for input='unit'. Put ScaleIntensityRanged(keys, "
                f"{low:g}, {high:g}, 0, 1, clip=True) right before this transform, and changes of intensity behind it; for HU give input='hu'."
            )
        return image.float()

    def _with_tumor(self, image: torch.Tensor, unit: torch.Tensor, painted: torch.Tensor) -> torch.Tensor:
        """``image`` with what was painted on ``unit``, the windowed form of it; voxels that were not painted keep their bits."""
        changed = painted != unit
        new = image.clone()
        if self._input == "unit":
            new[changed] = painted[changed].to(image.dtype)
            return new
        low, high = self.config.region.window_hu
        # HU outside the window keep their distance to it
        hu = image[changed].double() + (painted[changed] - unit[changed]).double() * (high - low)
        new[changed] = (hu if image.is_floating_point() else hu.round()).to(image.dtype)
        return new

    def _synthesizer_for(self, spacing_mm_zyx: FloatZYX, device: torch.device) -> Synthesizer:
        """The synthesizer of this spacing and device; the one used last is kept."""
        key = (spacing_mm_zyx, device)
        if self._synthesizer is None or self._synthesizer[0] != key:
            trained = self.config.region.spacing_mm_zyx
            off = max(abs(have / want - 1) for have, want in zip(spacing_mm_zyx, trained, strict=True))
            if off > _SPACING_TOLERANCE and any(network is not None for network in self._networks):
                shown = tuple(round(s, 3) for s in spacing_mm_zyx)
                raise ConfigError(
                    f"{_WHERE}: the sample's spacing_mm_zyx is {shown}; generator and judge were trained at {trained}. Resample first: "
                    f"Spacingd(keys, pixdim={trained[::-1]}, mode=('bilinear', 'nearest'))."
                )
            generator, segmenter = _networks_on(self.config, self._networks, device)
            synthesizer = build_synthesizer_of_any_size(
                self.config, generator, segmenter, spacing_mm_zyx=spacing_mm_zyx
            )
            self._synthesizer = key, synthesizer
        return self._synthesizer[1]


def _networks_on(
    config: Config, given: tuple[Network | None, Network | None], device: torch.device
) -> tuple[nn.Module | None, nn.Module | None]:
    """G and S on ``device``, as ``load_networks`` gives them; of networks that were given, copies. No CUDA graphs: samples may have any shape."""
    config = config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"cuda_graphs": False})})
    paths = [None if isinstance(network, nn.Module) else network for network in given]
    loaded = load_networks(config.model_copy(update={"device": str(device)}), paths[0], paths[1])
    generator, segmenter = (
        Inference(
            copy.deepcopy(network).to(device).eval().requires_grad_(requires_grad=False), config.synthesis, device
        )
        if isinstance(network, nn.Module)
        else from_file
        for network, from_file in zip(given, loaded, strict=True)
    )
    return generator, segmenter


def _label_values(organs: Organs | None, region: RegionConfig) -> tuple[dict[str, OrganConfig], tuple[int, ...]]:
    """The values of each organ to paint as the labels have them, and those of tumours that forbid painting."""
    if isinstance(organs, Mapping):
        named = {name: _checked_values(name, values) for name, values in organs.items()}
        forbidding = tuple(sorted({values.tumor for values in named.values()}))
    else:
        names = list(region.organs) if organs is None else [organs] if isinstance(organs, str) else list(organs)
        named = {name: region.organs[name] for name in names if name in region.organs}
        forbidding = tuple(sorted(set(region.tumor_values)))
    unknown = sorted(({organs} if isinstance(organs, str) else set(organs or ())) - region.organs.keys())
    if unknown or not named:
        raise ConfigError(
            f"{_WHERE}: organs={organs!r}; want at least one of {', '.join(region.organs)}, the organs of region {region.name}."
        )
    taken = [values.organ for values in named.values()]
    if len(set(taken)) < len(taken) or set(taken) & set(forbidding):
        raise ConfigError(f"{_WHERE}: organs={organs!r}; want each value for one organ, or for tumours, only.")
    return named, forbidding


def _checked_values(name: str, values: tuple[int, int]) -> OrganConfig:
    try:
        organ, tumor = values
        return OrganConfig(organ=organ, tumor=tumor)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{_WHERE}: organs[{name!r}]={values!r}; want (value of the organ, value of its tumour), each 1 to 255."
        ) from error


def _grid_of(array: Any) -> Grid | None:
    """The grid of a MetaTensor read as x, y, z; None without an affine.

    MONAI gives a MetaTensor that was made without one the identity: that says nothing, unless a reader left ``original_affine`` beside it.
    """
    if not isinstance(array, MetaTensor):
        return None
    matrix = array.affine.detach().cpu().numpy().astype(np.float64)
    if matrix.shape == (4, 4) and np.array_equal(matrix, np.eye(4)) and "original_affine" not in array.meta:
        return None
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ConfigError(f"{_WHERE}: the affine is {matrix.tolist()}; want a finite 4 x 4 matrix of one sample.")
    grid = grid_from_matrix(int_zyx(array.shape[:0:-1]), matrix)
    _checked_spacing(grid.spacing_mm_zyx, "spacing_mm_zyx of the affine")
    return grid


def _checked_spacing(spacing_mm: tuple[float, ...], what: str) -> tuple[float, ...]:
    if len(spacing_mm) != 3 or not all(MIN_SPACING_MM <= s <= MAX_SPACING_MM for s in spacing_mm):
        raise ConfigError(
            f"{_WHERE}: {what}={spacing_mm}; want three numbers of {MIN_SPACING_MM} to {MAX_SPACING_MM} mm."
        )
    return spacing_mm


def _kind(array: Any) -> str:
    """i, u, f, b or c as numpy's ``dtype.kind``."""
    if isinstance(array, np.ndarray):
        return array.dtype.kind
    dtype: torch.dtype = array.dtype
    if dtype.is_floating_point:
        return "f"
    return "u" if dtype in _UNSIGNED else "b" if dtype is torch.bool else "c" if dtype.is_complex else "i"


def _tensor(array: Any) -> torch.Tensor:
    """The bare tensor of a sample's array; of a numpy array a copy, which may be read-only or have negative strides."""
    if isinstance(array, np.ndarray):
        tensor = torch.from_numpy(np.array(array, order="C"))
    else:
        tensor = array.as_tensor() if isinstance(array, MetaTensor) else array
    # torch stores wide unsigned integers but hardly computes with them
    return tensor.long() if tensor.dtype in _UNSIGNED[1:] else tensor
