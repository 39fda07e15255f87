"""``ftengine predict``: many cases, each predicted on its own grid and committed whole; what is complete is not done again.

=======  ==========================================================================================
input    a segmenter's checkpoint, ``Input``s, ``PredictOptions``; several processes share the cases out
does     reads, streams windows, brings scores to the native grid, warns of implausible scans, commits
output   one ``Outcome`` a case, in the order of the cases, on every rank
raises   ConfigError before anything is predicted, OSError of the output folder; errors of single cases become outcomes
=======  ==========================================================================================
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import CaseError, ConfigError, FailureCode, FtengineError, MemoryLimitError, StoreError
from ftengine.geometry import Grid, from_ras, ras_grid
from ftengine.prediction.inputs import GridName, Input, Scan
from ftengine.prediction.onto_grid import onto_grid
from ftengine.prediction.outputs import (
    EXTENSIONS,
    Places,
    ProbabilityFiles,
    check_replaceable,
    commit,
    partial_folder,
    places_of,
    read_record,
)
from ftengine.prediction.plausibility import implausible_scan, missing_organs
from ftengine.prediction.sliding_windows import OnWindows, chosen_precision, slabs_of
from ftengine.training.distributed import ALONE, World
from ftengine.training.memory import is_out_of_memory
from ftengine.volume.nifti import write_nifti
from ftengine.volume.readers import STRICT, ReadOptions

Status = Literal["predicted", "complete", "failed"]
Format = Literal["nifti", "dicom-seg"]


@dataclass(frozen=True)
class PredictOptions:
    """What is written. grid: of the input itself, or RAS+ at the checkpoint's spacing.

    probabilities: of all classes, too. overwrite: predict what is complete again, and replace files that something else wrote.
    Raises ConfigError for values that are not known or do not go together.
    """

    grid: GridName = "native"
    file_format: Format = "nifti"
    probabilities: bool = False
    overwrite: bool = False
    reading: ReadOptions = STRICT

    def __post_init__(self) -> None:
        if self.grid not in ("native", "store"):
            raise ConfigError(f"--grid {self.grid}: want native or store.")
        if self.file_format not in EXTENSIONS:
            raise ConfigError(f"--format {self.file_format}: want {' or '.join(EXTENSIONS)}.")
        if self.file_format == "dicom-seg" and self.grid == "store":
            raise ConfigError("--format dicom-seg: refers to the slices of the input; want --grid native.")


@dataclass(frozen=True)
class Outcome:
    """What became of one case. class_voxels: by label name, on the grid of the result. reason, code: why it failed."""

    case: str
    status: Status
    path: str = ""
    class_voxels: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    code: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Model:
    """A network with what is needed to use it and to say which it was."""

    network: nn.Module
    config: Config
    sha256: str
    device: torch.device


def predict_cases(
    inputs: Sequence[Input],
    model: Model,
    out: Path,
    options: PredictOptions,
    *,
    world: World = ALONE,
    on_start: Callable[[str], None] = lambda _case: None,
    on_windows: OnWindows = lambda _done, _total: None,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Predict all cases into ``out``; with several processes each takes every ``world.size``-th.

    on_start, on_windows, on_outcome: of this process's own cases. Raises ConfigError where a result would replace an input, or where
    highdicom is missing; KeyboardInterrupt leaves what was committed.
    """
    check_outputs(inputs, out, options)
    mine = []
    for one in inputs[world.rank :: world.size]:
        on_start(one.case)
        mine.append(_outcome_of(one, model, out, options, on_windows))
        on_outcome(mine[-1])
    by_case = {outcome.case: outcome for part in world.gather(mine) for outcome in part}
    return [by_case[one.case] for one in inputs]


def check_outputs(inputs: Sequence[Input], out: Path, options: PredictOptions) -> None:
    """ConfigError where a result would replace one of the files that are to be predicted, or where its format cannot be written."""
    if options.file_format == "dicom-seg":
        from ftengine.prediction.dicom_seg import check_installed

        check_installed()
    files = {file.resolve() for one in inputs for file in one.files}
    for one in inputs:
        places = places_of(out, one.stem, options.file_format, with_probabilities=options.probabilities)
        for path in (*places.results, places.record):
            if path.resolve() in files:
                raise ConfigError(
                    f"{path}: is an input and would be replaced by its prediction; choose another folder for --out."
                )


def _outcome_of(one: Input, model: Model, out: Path, options: PredictOptions, on_windows: OnWindows) -> Outcome:
    started = time.perf_counter()
    places = places_of(out, one.stem, options.file_format, with_probabilities=options.probabilities)
    try:
        identity = {
            "source_sha256": one.digest(),
            "checkpoint_sha256": model.sha256,
            "settings": settings_of(model, options),
        }
        record = None if options.overwrite else read_record(places, identity)
        if record is not None:
            return _complete(one, places, record)
        if not options.overwrite:
            check_replaceable(places)
        made = _predict(one, model, places, options, identity, on_windows)
        return Outcome(one.case, "predicted", str(places.label), **made, seconds=time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001 - one odd scan must not end a run over thousands
        reason, code = _failure(one.case, error)
        return Outcome(one.case, "failed", reason=reason, code=code, seconds=time.perf_counter() - started)


def _failure(case: str, error: Exception) -> tuple[str, str]:
    """Reason and code of a case that failed. Raises again what every case would meet: wrong settings, a disk that is full."""
    if isinstance(error, CaseError):
        return str(error), error.code.value
    if isinstance(error, StoreError):
        return str(error), "store"
    if isinstance(error, MemoryLimitError) or is_out_of_memory(error):
        found = " ".join(str(error).split())[:160] or type(error).__name__
        advice = "Use --windows-per-call 1, leave out --probabilities, or predict it on a larger machine."
        return f"{case}: does not fit the memory ({found}). {advice}", FailureCode.OUT_OF_MEMORY.value
    if isinstance(error, FtengineError | OSError):
        raise error
    advice = "Please report it with the scan's kind and origin; leave the scan out meanwhile."
    return f"{case}: an unexpected {type(error).__name__} while predicting. {advice}", FailureCode.INTERNAL.value


def _complete(one: Input, places: Places, record: dict[str, Any]) -> Outcome:
    return Outcome(
        one.case,
        "complete",
        str(places.label),
        record["class_voxels"],
        tuple(record["warnings"]),
        tuple(record["notes"]),
    )


def settings_of(model: Model, options: PredictOptions) -> dict[str, Any]:
    """What decides a result besides checkpoint and scan, as plain values; what only costs time or memory is left out."""
    inference = model.config.inference.model_dump(mode="json", exclude={"windows_per_call", "precision"})
    return {
        **inference,
        "precision": chosen_precision(model.config, model.device),
        "grid": options.grid,
        "reading": asdict(options.reading),
    }


def _predict(
    one: Input,
    model: Model,
    places: Places,
    options: PredictOptions,
    identity: dict[str, Any],
    on_windows: OnWindows,
) -> dict[str, Any]:
    """Predict one case and commit it; what its outcome and its record say of it."""
    region = model.config.region
    slices = _slices(one) if options.file_format == "dicom-seg" else []
    with partial_folder(places) as folder:
        scan = one.read(region.spacing_mm_zyx)
        target = scan.native if options.grid == "native" else scan.grid
        odd, notes = implausible_scan(scan.image_hu, scan.grid.spacing_mm_zyx), scan.notes
        label = _label_on(one.case, target, scan, model, folder, places, on_windows)
        del scan  # its voxels are not needed to write the result
        counts = _count(label, region.num_classes)
        if slices:
            from ftengine.prediction.dicom_seg import write_dicom_seg

            write_dicom_seg(folder / places.label.name, label, target, slices, region, model.sha256)
        else:
            write_nifti(folder / places.label.name, label, target)
        voxel_ml = math.prod(target.spacing_mm_zyx) / 1000
        class_voxels = {name: counts[value] for name, value in region.labels.items()}
        missing = missing_organs({name: count * voxel_ml for name, count in class_voxels.items()}, region)
        warnings = tuple(f"{one.case}: {sentence}." for sentence in (*odd, *missing))
        commit(
            places,
            {
                "case": one.case,
                **identity,
                "engine_version": __version__,
                "labels": region.labels,
                "class_voxels": class_voxels,
                "warnings": warnings,
                "notes": notes,
            },
        )
    return {"class_voxels": class_voxels, "warnings": warnings, "notes": notes}


def _slices(one: Input) -> list[Any]:
    from ftengine.prediction.dicom_seg import read_series

    return read_series(one.series(), one.case)


def _label_on(
    case: str, target: Grid, scan: Scan, model: Model, folder: Path, places: Places, on_windows: OnWindows
) -> NDArray[np.uint8]:
    """The label map uint8 [z, y, x] in the axis order of ``target``; probabilities are written on the way where they are asked for."""
    ras = ras_grid(target)
    slabs = slabs_of(scan.image_hu, model.network, model.config, model.device, case=case, on_windows=on_windows)
    label = np.empty(ras.shape_zyx, dtype=np.uint8)
    if places.probabilities is None:
        for found in onto_grid(slabs, scan.grid, ras):
            label[found.z] = found.label
        return from_ras(label, target)
    with closing(ProbabilityFiles(folder / places.probabilities.name, model.config.region)) as files:
        for found in onto_grid(slabs, scan.grid, ras, with_probabilities=True):
            label[found.z] = found.label
            assert found.probabilities is not None  # noqa: S101 - asked for
            files.add(found.probabilities)
        files.finish(target)
    return from_ras(label, target)


def _count(label: NDArray[np.uint8], num_classes: int) -> list[int]:
    """Voxels of each class, slice by slice: ``bincount`` makes an int64 copy of what it counts."""
    counts = np.zeros(num_classes, dtype=np.int64)
    for plane in label:
        counts += np.bincount(plane.ravel(), minlength=num_classes)
    return [int(count) for count in counts]
