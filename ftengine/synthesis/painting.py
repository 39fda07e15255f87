"""The batch that is painted on, what comes out of it, and the one copy from the device that says how it went."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ftengine.geometry import int_zyx
from ftengine.kernels import upload
from ftengine.synthesis.rows import copied, with_values
from ftengine.synthesis.shape import PatchDraw
from ftengine.types import Painted


@dataclass(frozen=True)
class Verdicts:
    """P, verdict, voxels and centres of the patches of one draw, copied once behind one CUDA event; reading them waits for that.

    rows: the patches of the batch. number: of the draw, 0 for the first. figures: float64 [R, 3 + 3 N] on the host, exact; N: most tumours.
    """

    rows: list[int]
    draws: list[PatchDraw]
    number: int
    figures: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        rows: list[int],
        draws: list[PatchDraw],
        number: int,
        *,
        proportion: torch.Tensor,
        passed: torch.Tensor,
        num_voxels: torch.Tensor,
        centers: torch.Tensor,
    ) -> "Verdicts":
        """Start the copy. proportion: float32 [R]; passed: bool [R]; num_voxels: int64 [R]; centers: int64 [R, N, 3]."""
        columns = (proportion.unsqueeze(1), passed.unsqueeze(1), num_voxels.unsqueeze(1), centers.flatten(1))
        figures = torch.cat([c.to(torch.float64) for c in columns], dim=1)
        if figures.device.type != "cuda":
            return cls(rows, draws, number, figures, None)
        on_host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        on_host.copy_(figures, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
        copied.record(torch.cuda.current_stream(figures.device))
        return cls(rows, draws, number, on_host, copied)

    def failed(self) -> list[int]:
        """The rows to draw again; waits for the copy."""
        return [row for row, (_, passed, *_) in zip(self.rows, self._table(), strict=True) if not passed]

    def records(self) -> dict[int, Painted]:
        """A record a row; waits for the copy."""
        return {
            row: Painted(
                organ=draw.organ,
                size_class=draw.tumors[0].size_class,
                center_zyx=tuple(int_zyx(center[3 * i : 3 * i + 3]) for i in range(len(draw.tumors))),
                radii_vox_zyx=tuple(t.radii_vox_zyx for t in draw.tumors),
                num_voxels=int(num_voxels),
                proportion=proportion,
                passed=bool(passed),
                num_draws=self.number + 1,
            )
            for row, draw, (proportion, passed, num_voxels, *center) in zip(
                self.rows, self.draws, self._table(), strict=True
            )
        }

    def _table(self) -> list[list[float]]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.figures.tolist()


@dataclass(frozen=True)
class Painting:
    """A batch after synthesis and quality control; tensors as in ``Batch``. mask: uint8 [B, 1, z, y, x], also of rejected patches.

    On a GPU the tensors belong to the stream that painted; nothing has waited for it, but for the draws before the last one.
    """

    image: torch.Tensor
    label: torch.Tensor
    mask: torch.Tensor
    verdicts: Sequence[Verdicts]

    def records(self) -> list[Painted | None]:
        """What was painted on each patch, None where nothing was; waits for the last copy, and so for all that was painted."""
        found: dict[int, Painted] = {}
        for verdicts in self.verdicts:  # a later draw replaces an earlier one
            found.update(verdicts.records())
        return [found.get(row) for row in range(len(self.image))]


class Canvas:
    """A batch while it is painted: the given image and label stay as they are; what is accepted goes to tensors of its own."""

    def __init__(self, image: torch.Tensor, label: torch.Tensor) -> None:
        """image: float32 [B, 1, z, y, x]; label: uint8 [B, 1, z, y, x]."""
        self._given_image, self._given_label = image, label
        self._image: torch.Tensor | None = None
        self._label: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def copy_of(self, rows: list[int]) -> torch.Tensor:
        """The given images of some patches, to be painted in place: [R, z, y, x]."""
        if _is_all(rows, self._given_image):
            return copied(self._given_image)[:, 0]
        return take_rows(self._given_image, rows)[:, 0]

    def write(
        self,
        rows: list[int],
        painted: torch.Tensor,
        mask: torch.Tensor,
        box: torch.Tensor,
        tumor_values: Sequence[int],
        passed: torch.Tensor | None,
    ) -> None:
        """Keep what passed of painted patches; decided on the device.

        painted: float32 [R, z, y, x], the given image outside the mask's soft edge; mask: uint8 [R, z, y, x], of 0 and 1; box: int64
        [R, 2, 3], around the mask; passed: bool [R], or None for all.
        """
        if passed is not None:
            painted = torch.where(passed.view(-1, 1, 1, 1), painted, take_rows(self._given_image, rows)[:, 0])
        label = with_values(take_rows(self._given_label, rows)[:, 0], mask, box, tumor_values, passed)
        if _is_all(rows, self._given_image):
            self._image, self._label, self._mask = painted.unsqueeze(1), label.unsqueeze(1), mask.unsqueeze(1)
            return
        index = _index(rows, mask.device)
        self._image, self._label, self._mask = (
            into.index_copy_(0, index, values.unsqueeze(1))
            for into, values in zip(self.finished(), (painted, label, mask), strict=True)
        )

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image, label and mask as they now are."""
        return (
            self._given_image.clone() if self._image is None else self._image,
            self._given_label.clone() if self._label is None else self._label,
            torch.zeros_like(self._given_label) if self._mask is None else self._mask,
        )


def take_rows(batch: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The given rows of a batch, without a host sync; the batch itself where they are all of it."""
    return batch if _is_all(rows, batch) else batch.index_select(0, _index(rows, batch.device))


def _is_all(rows: list[int], batch: torch.Tensor) -> bool:
    return rows == list(range(len(batch)))


def _index(rows: list[int], device: torch.device) -> torch.Tensor:
    return upload(np.array(rows, dtype=np.int64), device)
