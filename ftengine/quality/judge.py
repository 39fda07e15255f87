"""The judge: the frozen baseline segmenter S says which part of a painted tumour it sees as that tumour (Eq. 4-5)."""

from collections.abc import Callable, Sequence

import torch

from ftengine.config import QualityConfig, RegionConfig
from ftengine.errors import ConfigError
from ftengine.kernels import tumor_proportion


class SegmenterJudge:
    """P = share of the mask's voxels whose most probable class, by S, is the painted organ's tumour; passed where P >= T.

    ``any_tumor`` and ``strict`` give the released behaviour: any tumour class counts, and P > T.
    """

    def __init__(
        self,
        segmenter: Callable[[torch.Tensor], torch.Tensor],
        config: QualityConfig,
        region: RegionConfig,
        *,
        any_tumor: bool = False,
        strict: bool = False,
    ) -> None:
        """segmenter: float32 [B, 1, z, y, x] -> logits [B, classes, z, y, x], float of any width, in eval mode; its classes are
        the region's values. Threshold None keeps every patch.
        """
        self._segmenter = segmenter
        self._threshold = config.threshold
        self._region = region
        self._any_tumor = any_tumor
        self._strict = strict

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge painted patches: (P float32 [B], passed bool [B]). image: [B, 1, z, y, x]; mask: uint8 [B, z, y, x].

        Raises ConfigError where the segmenter's classes are not the region's.
        """
        with torch.no_grad():
            logits = self._segmenter(image)
        return self.verdict(logits, mask, tumor_values)

    def verdict(
        self, logits: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As calling it, from S's logits [B, classes, z, y, x] on the painted patches."""
        if logits.shape[1] != self._region.num_classes:
            raise ConfigError(
                f"the judge gives {logits.shape[1]} classes; region {self._region.name} has {self._region.num_classes} label values "
                f"({', '.join(self._region.labels)}). Use a segmenter that was trained for this region."
            )
        classes = self._region.tumor_values if self._any_tumor else torch.tensor(tumor_values, dtype=torch.int64)
        proportion = tumor_proportion(logits.contiguous(), mask, tumor_classes=classes)
        if self._threshold is None:
            return proportion, torch.ones_like(proportion, dtype=torch.bool)
        passed = proportion > self._threshold if self._strict else proportion >= self._threshold
        return proportion, passed
