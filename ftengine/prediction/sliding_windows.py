"""Sliding windows over a volume that never hold the scores of all of it: a slab of slices moves along z, finished slices leave it.

=======  ==========================================================================================
input    a volume int16 HU [z, y, x] at the region's spacing; a network; ``config.inference``
does     windows the HU patch by patch, evaluates windows in MONAI's order, sums weighted scores in a ring of ``patch_z`` slices
output   ``Slab``s in order of z: the weighted mean of the scores of all windows that hold a voxel
raises   MemoryLimitError where a call does not fit the device; CaseError where a score is NaN or infinite
=======  ==========================================================================================

The windows, their order, their weights and the order of the sums are those of MONAI's ``sliding_window_inference``: on the CPU the scores
are the same bit by bit. What is held is ``classes * patch_z * y * x`` float32 instead of ``classes * z * y * x``: 0.7 GB instead of 7.3 GB
for 7 classes of 1000 x 512 x 512 voxels and patches of 96.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import CaseError, FailureCode, MemoryLimitError
from ftengine.geometry import Box, IntZYX, int_zyx
from ftengine.training.learner import Precision, autocast

OnWindows = Callable[[int, int], None]  # windows done, windows in all
_SLICES = 8  # that are divided and handed on at a time
_AXES = {"z": -3, "y": -2, "x": -1}
_AIR_LOGIT = 200.0  # of background, where no window was evaluated: its softmax is 1 in float32, that of the others 0


@dataclass(frozen=True)
class Slab:
    """Finished slices of a volume: ``scores`` float32 [classes, slices, y, x] of the slices from ``first_z`` on.

    is_probability: the scores are probabilities, else logits.
    """

    first_z: int
    scores: torch.Tensor
    is_probability: bool

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The class of the highest score, uint8 [slices, y, x] on the host; of equal ones the lowest class."""
        if self.scores.device.type == "cpu":
            return best_class(self.scores.numpy())
        labels: NDArray[np.uint8] = self.scores.argmax(0).to(torch.uint8).cpu().numpy()
        return labels

    @property
    def probabilities(self) -> torch.Tensor:
        """float32 [classes, slices, y, x], sums to 1 over the classes."""
        return self.scores if self.is_probability else self.scores.softmax(0)


def best_class(scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The class of the highest score, uint8, of scores [classes, ...]; of equal ones the lowest: ``argmax(0)``.

    ``argmax`` over the first of several axes takes three times as long, NumPy's as torch's.
    """
    best = scores[0].copy()
    label = np.zeros(best.shape, dtype=np.uint8)
    for value, of_class in enumerate(scores[1:], start=1):
        label[of_class > best] = value
        np.maximum(best, of_class, out=best)
    return label


def chosen_precision(config: Config, device: torch.device) -> Precision:
    """``inference.precision``, where auto is the precision of the segmenter's training on a GPU and float32 on a CPU."""
    wanted = config.inference.precision
    if wanted != "auto":
        return wanted
    return config.training.precision if device.type == "cuda" else "fp32"


class WindowScores:
    """A network as windows are evaluated: float32 [B, 1, z, y, x] in [0, 1] -> float32 scores [B, classes, z, y, x].

    Without mirroring the scores are logits. With ``inference.mirror_axes`` they are the mean of the probabilities over all flips of the
    axes (2, 4 or 8 evaluations), each flipped back.
    """

    def __init__(self, network: nn.Module, config: Config, device: torch.device) -> None:
        """network: is moved to ``device`` and put into eval mode."""
        self._network = network.to(device).eval()
        self._device = device
        self._precision: Precision = chosen_precision(config, device)
        axes = [_AXES[name] for name in config.inference.mirror_axes]
        self._flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]
        self.is_probability = len(self._flips) > 1

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """Evaluate. Raises MemoryLimitError where the device's memory does not suffice."""
        try:
            with torch.no_grad():
                if not self.is_probability:
                    return self._logits(windows)
                total = self._logits(windows).softmax(1)
                for flip in self._flips[1:]:
                    total += self._logits(windows.flip(flip)).softmax(1).flip(flip)
                return total / len(self._flips)
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"{len(windows)} windows of {tuple(windows.shape[2:])} voxels do not fit the memory of {self._device}. Run fewer at a "
                "time (predict: --windows-per-call 1; training: --set inference.windows_per_call=1; evaluate: --device cpu, or predict "
                "first and score the files that it wrote)."
            ) from error

    def _logits(self, windows: torch.Tensor) -> torch.Tensor:
        with autocast(self._device, self._precision):
            logits: torch.Tensor = self._network(windows)
        return logits.float()


def slabs_of(
    image_hu: NDArray[np.int16],
    network: nn.Module,
    config: Config,
    device: torch.device,
    *,
    case: str = "volume",
    on_windows: OnWindows = lambda _done, _total: None,
) -> Iterator[Slab]:
    """The scores of a volume int16 HU [z, y, x], RAS+ at the region's spacing, a few slices at a time, in order of z, each slice once.

    A volume smaller than the patch is padded on both sides with the low end of the window, as MONAI pads with 0. With
    ``inference.skip_air`` windows whose voxels all lie at or below that end are not evaluated: their voxels get the mean of the other
    windows that hold them, and where there is none they are background. case: its name in errors. Raises CaseError where a score is NaN or
    infinite: its voxels would become background without a word.
    """
    settings, patch = config.inference, int_zyx(config.region.patch_zyx)
    evaluate = WindowScores(network, config, device)
    view = _Windowed(image_hu, patch, config.region.window_hu, device)
    starts = window_starts(view.padded_zyx, patch, settings.overlap)
    if settings.skip_air:
        starts = [start for start in starts if view.has_body(start)]
    weight = compute_importance_map(
        patch, mode=settings.weighting, sigma_scale=0.125, device=device, dtype=torch.float32
    )
    ring = _Ring(config.region.num_classes, patch[0], view.padded_zyx, device)

    def finished(until_z: int) -> Iterator[Slab]:
        for first_z, sums, weights in ring.take(until_z):
            scores = sums.div_(weights)
            if settings.skip_air:
                _fill_background(scores, weights, 1.0 if evaluate.is_probability else _AIR_LOGIT)
            slab = view.unpadded(first_z, scores)
            if slab is not None:
                _check_finite(slab[1], case)
                yield Slab(*slab, evaluate.is_probability)

    for done in range(0, len(starts), settings.windows_per_call):
        batch = starts[done : done + settings.windows_per_call]
        scores = evaluate(torch.stack([view.unit(start) for start in batch])[:, None])
        for start, of_window in zip(batch, scores, strict=True):
            yield from finished(start[0])  # windows come in order of z: nothing reaches the slices below any more
            ring.add(start, of_window if settings.weighting == "constant" else of_window * weight, weight)
        on_windows(done + len(batch), len(starts))
    yield from finished(view.padded_zyx[0])


def window_starts(shape_zyx: IntZYX, patch_zyx: IntZYX, overlap: float) -> list[IntZYX]:
    """Where windows begin, x fastest; no axis of the volume is shorter than the patch. The same as MONAI's ``dense_patch_slices``.

    They lie ``int(patch * (1 - overlap))`` voxels apart, at least 1; the last of an axis ends where the volume ends.
    """
    along = []
    for size, length in zip(shape_zyx, patch_zyx, strict=True):
        step = max(1, int(length * (1 - overlap)))
        along.append([*range(0, size - length, step), size - length])
    return [int_zyx(start) for start in product(*along)]


class _Windowed:
    """A volume as windows see it: padded to at least a patch, HU windowed to [0, 1], box by box."""

    def __init__(
        self, image_hu: NDArray[np.int16], patch_zyx: IntZYX, window_hu: tuple[float, float], device: torch.device
    ) -> None:
        self._image, self._patch, self._device = image_hu, patch_zyx, device
        self._low_hu, self._high_hu = window_hu
        self.padded_zyx = int_zyx(max(n, p) for n, p in zip(image_hu.shape, patch_zyx, strict=True))
        self._before = int_zyx((a - n) // 2 for a, n in zip(self.padded_zyx, image_hu.shape, strict=True))

    def unit(self, start_zyx: IntZYX) -> torch.Tensor:
        """A window, float32 [z, y, x] in [0, 1], on the device; 0 in the padding."""
        box, inside = self._boxes(start_zyx)
        unit = torch.from_numpy(self._image[inside.slices()]).to(self._device).to(torch.float32)
        unit.sub_(self._low_hu).div_(self._high_hu - self._low_hu).clamp_(0.0, 1.0)
        if inside == box:
            return unit
        window = torch.zeros(self._patch, device=self._device)
        window[inside.moved(box.origin_zyx).slices()] = unit
        return window

    def has_body(self, start_zyx: IntZYX) -> bool:
        """Whether any voxel of a window lies above the low end of the HU window."""
        return bool((self._image[self._boxes(start_zyx)[1].slices()] > self._low_hu).any())

    def unpadded(self, first_z: int, scores: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """Slices of the padded volume as slices of the volume; None where all of them are padding."""
        z, y, x = self._before
        depth, height, width = self._image.shape
        first, end = max(first_z - z, 0), min(first_z - z + scores.shape[1], depth)
        if first >= end:
            return None
        return first, scores[:, first + z - first_z : end + z - first_z, y : y + height, x : x + width]

    def _boxes(self, start_zyx: IntZYX) -> tuple[Box, Box]:
        """A window in the volume's own indices, and the part of it that lies inside."""
        box = Box(int_zyx(s - b for s, b in zip(start_zyx, self._before, strict=True)), self._patch)
        return box, box.inside(int_zyx(self._image.shape))


class _Ring:
    """Sums of scores and weights of ``depth`` slices: slice z lies at z modulo depth, so that nothing is moved when the slab goes on."""

    def __init__(self, num_classes: int, depth: int, shape_zyx: IntZYX, device: torch.device) -> None:
        _, height, width = shape_zyx
        self._scores = torch.zeros((num_classes, depth, height, width), device=device)
        self._weights = torch.zeros((depth, height, width), device=device)
        self._depth, self._first_z = depth, 0

    def add(self, start_zyx: IntZYX, scores: torch.Tensor, weight: torch.Tensor) -> None:
        """Add a window, scores [classes, z, y, x]; it must begin at the first slice that was not taken, or fit behind it."""
        z, y, x = start_zyx
        length, height, width = weight.shape
        place = z % self._depth
        head = min(length, self._depth - place)
        for ring_z, window_z in (
            (slice(place, place + head), slice(0, head)),
            (slice(0, length - head), slice(head, length)),
        ):
            if window_z.start < window_z.stop:
                target = (ring_z, slice(y, y + height), slice(x, x + width))
                self._scores[(slice(None), *target)] += scores[:, window_z]
                self._weights[target] += weight[window_z]

    def take(self, until_z: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The slices before ``until_z`` that were not taken yet: first slice, scores (a copy) and weights; their places are free again."""
        while self._first_z < until_z:
            place = self._first_z % self._depth
            count = min(_SLICES, until_z - self._first_z, self._depth - place)
            taken = slice(place, place + count)
            yield self._first_z, self._scores[:, taken].clone(), self._weights[taken]
            self._scores[:, taken] = 0.0
            self._weights[taken] = 0.0
            self._first_z += count


def _check_finite(scores: torch.Tensor, case: str) -> None:
    if not math.isfinite(float(scores.sum())):
        raise CaseError(
            f"{case}: the network gives NaN or infinity.",
            "With inference.precision fp16 use bf16 or fp32; else the weights are damaged, or their training diverged.",
            code=FailureCode.NOT_FINITE,
        )


def _fill_background(scores: torch.Tensor, weights: torch.Tensor, value: float) -> None:
    """Make voxels without any weight background, in place."""
    empty = weights == 0
    scores.masked_fill_(empty, 0.0)
    scores[0].masked_fill_(empty, value)
