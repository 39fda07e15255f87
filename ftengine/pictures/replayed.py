"""Patches of a replay file, made again: numbers that tell a broken patch from a sound one, and a picture of each."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.pictures.sheets import write_volume_sheet
from ftengine.training.replay import ReplayStep
from ftengine.types import Batch, Painted, PatchRecord

_SAME_PROPORTION = 1e-4  # P of Eq. 4 on another machine or number of threads


@dataclass(frozen=True)
class ReplayedPatch:
    """One patch as training got it. lowest, highest, mean: of the image on the [0, 1] scale, of its finite voxels (painting may leave it).

    num_not_finite: voxels of the image that are NaN or infinite. label_voxels: by class name, those there are. recorded, now: the
    verdict then and now, empty where nothing was painted; as_recorded: whether they are the same, None where the run's loader painted nothing
    (a generator's run, which paints in its step). With CutMix a record is that of the patch whose first slices are there. sheet: the picture, None where none was drawn.
    """

    step: int
    case: str
    dataset: str
    epoch: int
    index: int
    origin_zyx: tuple[int, int, int]
    annotated: bool
    lowest: float
    highest: float
    mean: float
    num_not_finite: int
    label_voxels: dict[str, int]
    recorded: str
    now: str
    as_recorded: bool | None
    sheet: Path | None

    def document(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "sheet": None if self.sheet is None else str(self.sheet)}


def replayed_patches(
    config: Config, step: ReplayStep, batch: Batch, folder: Path | None, *, has_verdicts: bool = True
) -> list[ReplayedPatch]:
    """Measure the patches of a batch made again, and draw each into ``folder``, where one is given.

    has_verdicts: whether the step's records hold what its loader painted.
    """
    losses = ", ".join(f"{name} {value:g}" for name, value in step.losses.items())
    patches = []
    for number, (recorded, record) in enumerate(zip(step.records, batch.records, strict=True)):
        image = batch.image[number, 0].cpu().numpy()
        label = batch.label[number, 0].cpu().numpy()
        sheet = None
        if folder is not None:
            sheet = folder / f"step-{step.step}-patch-{number}.png"
            request = record.request
            _draw(
                sheet,
                config,
                image,
                label,
                f"step {step.step} ({losses}): {request.case}, epoch {request.epoch}, index {request.index}",
            )
        measured = _measured(config, step.step, recorded, record, image, label, sheet)
        patches.append(measured if has_verdicts else replace(measured, as_recorded=None))
    return patches


def _measured(
    config: Config,
    step: int,
    recorded: PatchRecord,
    record: PatchRecord,
    image: NDArray[np.float32],
    label: NDArray[np.uint8],
    sheet: Path | None,
) -> ReplayedPatch:
    request = record.request
    finite = image[np.isfinite(image)].astype(np.float64)
    lowest, highest, mean = (float(f(finite)) for f in (np.min, np.max, np.mean)) if finite.size else (0.0, 0.0, 0.0)
    voxels = {name: int((label == value).sum()) for name, value in config.region.labels.items() if value}
    return ReplayedPatch(
        step=step,
        case=request.case,
        dataset=request.dataset,
        epoch=request.epoch,
        index=request.index,
        origin_zyx=request.box.origin_zyx,
        annotated=request.annotated,
        lowest=lowest,
        highest=highest,
        mean=mean,
        num_not_finite=int(image.size - finite.size),
        label_voxels={name: count for name, count in voxels.items() if count},
        recorded=_verdict(recorded.painted),
        now=_verdict(record.painted),
        as_recorded=_is_same(recorded.painted, record.painted),
        sheet=sheet,
    )


def _verdict(painted: Painted | None) -> str:
    if painted is None:
        return ""
    return (
        f"{painted.size_class} {painted.organ}, P {painted.proportion:.3f}, {'passed' if painted.passed else 'failed'}"
    )


def _is_same(then: Painted | None, now: Painted | None) -> bool:
    if then is None or now is None:
        return then is now
    same = (then.organ, then.center_zyx, then.num_voxels, then.passed) == (
        now.organ,
        now.center_zyx,
        now.num_voxels,
        now.passed,
    )
    both_nan = np.isnan(then.proportion) and np.isnan(now.proportion)
    return same and bool(both_nan or abs(then.proportion - now.proportion) <= _SAME_PROPORTION)


def _draw(path: Path, config: Config, image: NDArray[np.float32], label: NDArray[np.uint8], title: str) -> None:
    low, high = config.region.window_hu
    write_volume_sheet(
        path,
        np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0) * (high - low) + low,
        label,
        spacing_mm_zyx=config.region.spacing_mm_zyx,
        window_hu=config.region.window_hu,
        labels=config.region.labels,
        title=title,
    )
