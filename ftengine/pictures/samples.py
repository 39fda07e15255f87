"""Patches painted as training paints them, with what a picture of them needs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage as ndi
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.plan import Mix, Plan
from ftengine.store.reader import Store
from ftengine.synthesis.bank import TumorBank
from ftengine.synthesis.engine import Address, Generator, Judge, Synthesizer
from ftengine.synthesis.shape import count_labels, organs_in_patch
from ftengine.types import Augmentation, Painted, Patch, PatchRequest

# patches looked at for one sheet: eligible ones are rarer than 1 in 100 only where a run would starve too
TRIES_PER_SHEET = 100

Segmenter = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PaintedSample:
    """A painted patch; arrays are [z, y, x] on one grid, images in HU inside the region's window.

    mask: M. predicted: the tumour that the judge sees, or None. tumors: the masks of the single tumours of M, the largest first.
    """

    request: PatchRequest
    painted: Painted
    original_hu: NDArray[np.float32]
    synthetic_hu: NDArray[np.float32]
    mask: NDArray[np.bool_]
    predicted: NDArray[np.bool_] | None

    @property
    def difference_hu(self) -> NDArray[np.float32]:
        """Synthetic minus original."""
        return self.synthetic_hu - self.original_hu

    @property
    def tumors(self) -> list[NDArray[np.bool_]]:
        """The tumours of M, the largest first: as many connected parts (26) as were drawn; all of M where one was, cut in two or not."""
        num_drawn = len(self.painted.center_zyx)
        if num_drawn == 1:
            return [self.mask]
        parts, _ = ndi.label(self.mask, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        return [parts == 1 + number for number in np.argsort(-sizes, kind="stable")[:num_drawn].tolist()]


class _Witness:
    """Asks the judge and keeps the image it judged: a failed patch is handed back unpainted (Eq. 5), but a sheet shows why it failed."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.image: torch.Tensor | None = None

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.image = image
        return self._judge(image, mask, tumor_values)


def painted_samples(
    config: Config,
    store: Store,
    *,
    num_patches: int,
    per_size: bool = False,
    generator: Generator | None = None,
    judge: Judge | None = None,
    segmenter: Segmenter | None = None,
    bank: TumorBank | None = None,
    mix: Mix = "mixed",
    split: str | None = None,
) -> Iterator[PaintedSample]:
    """Patches as the loader reads them, painted and judged: the first ``num_patches`` that can be painted, or with ``per_size`` the first
    so many of each size class.

    Patches come in the loader's order, from epoch 0 on, through the loader's own plan, reader and DALI graph; tumours have the
    addresses they have in training, and every eligible patch is painted whatever ``synthesis.fraction`` says. One difference: the
    random flips, turns and intensity changes are left out, so that the pictures stay in radiological orientation; where training draws
    some for a patch, the tumour it paints there lies elsewhere in the same organ.

    config: for the store's region. generator, judge: as ``Synthesizer`` takes them, on the configured device; generator None paints a
    fixed contrast, judge None keeps every tumour; bank: as ``assemble.build_bank`` makes it, for copy-paste. segmenter: float32
    [1, 1, z, y, x] -> logits [1, classes, z, y, x], the network the judge asks; a module is moved to the device and set to eval mode.
    split: only volumes of that split. Tries ``TRIES_PER_SHEET`` patches for each that is asked for, and ends with fewer where those do
    not suffice. Raises ConfigError where none can be painted, where configuration and store differ, or for ``num_patches`` below 1.
    """
    if num_patches < 1:
        raise ConfigError(f"num_patches={num_patches}; want at least 1.")
    if (store.spacing_mm_zyx, store.labels) != (config.region.spacing_mm_zyx, config.region.labels):
        raise ConfigError(
            f"{store.location}: holds {store.region} at {store.spacing_mm_zyx} mm with labels {store.labels}; the configuration is for "
            f"{config.region.name} at {config.region.spacing_mm_zyx} mm with labels {config.region.labels}. Choose the store's own."
        )
    sizes = size_classes(config) if per_size else [""]
    missing = Counter(dict.fromkeys(sizes, num_patches))
    refused: Counter[str] = Counter()
    painter = _Painter(config, store, generator, judge, segmenter, bank)
    num_found = 0
    for request in _requests(Plan(config, store, mix=mix, split=split), missing.total() * TRIES_PER_SHEET):
        sample = painter.paint(request, refused)
        if sample is None:
            continue
        kind = sample.painted.size_class if per_size else ""
        if missing[kind] < 1:
            continue
        missing[kind] -= 1
        num_found += 1
        yield sample
        if not missing.total():
            return
    if not num_found:
        raise ConfigError(_nothing_to_paint(config, store, split, refused))


def size_classes(config: Config) -> list[str]:
    """The size classes that are painted, in the configuration's order: those with a weight, where the weights decide."""
    synthesis = config.synthesis
    by_weight = synthesis.synthesizer != "copy-paste" and synthesis.shape == "paper"
    return [name for name in synthesis.sizes if not by_weight or synthesis.size_weights.get(name, 0.0) > 0]


def _requests(plan: Plan, count: int) -> Iterator[PatchRequest]:
    """The first ``count`` requests of a run, in the loader's order."""
    per_epoch = plan.batches_per_epoch * plan.batch_size
    for number in range(count):
        yield plan.request(*divmod(number, per_epoch))


def _nothing_to_paint(config: Config, store: Store, split: str | None, refused: Counter[str]) -> str:
    where = "" if split is None else f" of split {split!r}"
    counts = "; ".join(f"{reason}: {count}" for reason, count in refused.most_common())
    return (
        f"{store.location}: none of {refused.total()} patches{where} can be painted ({counts}). A patch is painted where its label holds at least "
        f"synthesis.min_organ_voxels={config.synthesis.min_organ_voxels} voxels of {' or '.join(config.region.organs)} and no tumour. Convert "
        "volumes with organ labels, raise loader.positive_fraction where organs are small, or lower synthesis.min_organ_voxels."
    )


class _Painter:
    """Turns patch requests into painted samples, one at a time."""

    def __init__(
        self,
        config: Config,
        store: Store,
        generator: Generator | None,
        judge: Judge | None,
        segmenter: Segmenter | None,
        bank: TumorBank | None,
    ) -> None:
        device = _device(config)
        self._config, self._store = config, store
        self._pipeline = PatchPipeline(config, 1, device=device)
        self._witness = None if judge is None else _Witness(judge)
        self._segmenter = segmenter.to(device).eval() if isinstance(segmenter, nn.Module) else segmenter
        self._synthesizer = Synthesizer(
            config.region,
            config.synthesis.model_copy(update={"fraction": 1.0, "box": "full"}),  # the judge sees what is drawn
            seed=config.seed,
            generator=generator,
            judge=self._witness,
            retries=config.qc.retries,
            bank=bank,
        )

    def paint(self, request: PatchRequest, refused: Counter[str]) -> PaintedSample | None:
        """Read and paint; None, with the reason counted in ``refused``, for a patch that is not eligible."""
        patch = self._store.read(request.case, request.box.origin_zyx, request.box.shape_zyx)
        reason = self._ineligible(patch)
        if reason is not None:
            refused[reason] += 1
            return None
        image, label, _ = self._pipeline([patch], [replace(request, augmentation=Augmentation(), read=request.box)])
        painting = self._synthesizer.paint(image, label, [Address(request.epoch, request.index)])
        painted = painting.records()[0]
        if painted is None or painted.num_voxels == 0:
            refused["the drawn tumour holds no voxel of the organ"] += 1
            return None
        synthetic = painting.image if self._witness is None else self._witness.image
        assert synthetic is not None  # noqa: S101 - a patch that was painted was judged
        return PaintedSample(
            request,
            painted,
            self._hu(image),
            self._hu(synthetic),
            painting.mask[0, 0].cpu().numpy().astype(bool),
            self._predicted(synthetic, painted.organ),
        )

    def _ineligible(self, patch: Patch) -> str | None:
        region = self._config.region
        if organs_in_patch(count_labels(patch.label), region, self._config.synthesis.min_organ_voxels):
            return None
        if np.isin(patch.label, region.tumor_values).any():
            return "a labelled tumour in the patch"
        return "too little healthy organ in the patch"

    def _hu(self, image: torch.Tensor) -> NDArray[np.float32]:
        low, high = self._config.region.window_hu
        unit: NDArray[np.float32] = image[0, 0].cpu().numpy()
        return unit * np.float32(high - low) + np.float32(low)

    def _predicted(self, synthetic: torch.Tensor, organ: str) -> NDArray[np.bool_] | None:
        if self._segmenter is None:
            return None
        with torch.no_grad():
            classes = self._segmenter(synthetic).argmax(1)[0].cpu().numpy()
        released = self._config.synthesis.variant == "released"  # whose judge counts any tumour class
        region = self._config.region
        values = region.tumor_values if released else (region.organs[organ].tumor,)
        predicted: NDArray[np.bool_] = np.isin(classes, values)
        return predicted


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
