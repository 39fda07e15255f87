"""Evaluate a checkpoint on a store, or a folder of predictions against a folder of truths."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftengine.config import RegionConfig
from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.evaluation.infer import check_trained_for, predict_volume
from ftengine.evaluation.metrics import CaseScore, score_case, summarize
from ftengine.geometry import grid_offset_vox
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store
from ftengine.training.checkpoint import load_segmenter

OnCase = Callable[[CaseScore], None]


@dataclass
class Evaluation:
    """Scores of all volumes; ``failed`` names the files that could not be scored and why."""

    cases: list[CaseScore] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_left_out: int = (
        0  # labelled volumes whose tumours are not annotated: they can be scored neither as healthy nor as ill
    )

    @property
    def exit_code(self) -> int:
        """0 all scored, 1 some failed, 4 none scored."""
        return 4 if not self.cases else 1 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; a Dice without a truth is None."""
        cases = [
            {
                "case": score.case,
                "classes": {
                    n: {**asdict(c), "dice": None if np.isnan(c.dice) else c.dice, "outcome": c.outcome}
                    for n, c in score.classes.items()
                },
            }
            for score in self.cases
        ]
        return {
            "summary": summarize(self.cases),
            "cases": cases,
            "failed": self.failed,
            "num_left_out": self.num_left_out,
        }


def evaluate_checkpoint(
    checkpoint: str | Path,
    store: Store,
    *,
    device: torch.device,
    split: str | None = None,
    fold: int | None = None,
    cases: Sequence[str] | None = None,
    overlap: float | None = None,
    on_case: OnCase = lambda _score: None,
) -> Evaluation:
    """Predict the tumour-annotated volumes of a store (of a split, of a fold, or the named ones) on the store's grid and score them.

    ``overlap`` replaces the checkpoint's ``inference.overlap``. Raises ConfigError where nothing is left to score.
    """
    network, config = load_segmenter(checkpoint)
    check_trained_for(store, config, checkpoint)
    if overlap is not None:
        config = config.with_overrides({"inference.overlap": overlap})
    wanted = list(cases) if cases is not None else cases_of_kind(store, "tumor", split, fold)
    if not wanted:
        raise ConfigError(
            f"{store.location}: no labelled volume{'' if split is None else f' in split {split!r}'}{'' if fold is None else f' in fold {fold}'} to evaluate on."
        )
    result = Evaluation(num_left_out=0 if cases is not None else len(cases_of_kind(store, "organ", split, fold)))
    for case in wanted:
        patch = store.read_volume(case)
        result.cases.append(
            score_case(case, predict_volume(network, patch.image, config, device), patch.label, store.labels)
        )
        on_case(result.cases[-1])
    return result


def cases_of_kind(store: Store, kind: str, split: str | None, fold: int | None) -> list[str]:
    """The volumes of a store whose annotation is ``kind`` (tumor, organ, none), of a split and of a fold."""
    used = rows_in(store.select(["split", "fold"]), split=split, fold=fold)
    rows = zip(store.cases, store.column("annotation").to_pylist(), used, strict=True)
    return [case for case, annotation, is_used in rows if is_used and annotation == kind]


def evaluate_folders(
    predictions: Path, truths: Path, region: RegionConfig, *, on_case: OnCase = lambda _score: None
) -> Evaluation:
    """Score label files of a folder against the files of the same relative name in another, each pair on its own grid.

    A truth without a prediction is listed as failed, never left out in silence; so is a pair on different grids.
    """
    from ftengine.volume.readers import read_label  # what scores stores alone need not have what reads CT files

    found = sorted(p for p in truths.rglob("*.nii*") if p.is_file()) if truths.is_dir() else [truths]
    if not found or not truths.exists():
        raise ConfigError(f"{truths}: holds no label files (.nii or .nii.gz); want the true labels.")
    result = Evaluation()
    for truth_file in found:
        name = truth_file.relative_to(truths).as_posix() if truths.is_dir() else truth_file.name
        predicted_file = _matching(predictions, name)
        try:
            if predicted_file is None:
                raise CaseError(
                    f"{name}: has no prediction in {predictions}.",
                    "Predict this case too: a file of the same name (with or without _label) is wanted.",
                    code=FailureCode.MISSING_FILE,
                )
            truth, truth_grid = read_label(truth_file, label_values=region.labels.values())
            predicted, predicted_grid = read_label(predicted_file, label_values=region.labels.values())
            if truth.shape == predicted.shape and grid_offset_vox(truth_grid, predicted_grid) > 0.1:
                raise CaseError(
                    f"{predicted_file}: lies on another grid than {truth_file}; want the same affine within 0.1 voxel.",
                    "Bring the prediction to the grid of its truth.",
                    code=FailureCode.GRID_MISMATCH,
                )
            result.cases.append(score_case(name, predicted, truth, region.labels))
            on_case(result.cases[-1])
        except CaseError as error:
            result.failed[name] = str(error)
    return result


def _matching(predictions: Path, name: str) -> Path | None:
    """The prediction of a truth file: the same name, or the CT's name where the truth has a _label, _seg or _mask behind it."""
    if predictions.is_file():
        return predictions
    stem = name.removesuffix(".gz").removesuffix(".nii")
    bases = [stem, *(stem.removesuffix(s) for s in ("_label", "_seg", "_mask") if stem.endswith(s))]
    for base in bases:
        for tail in ("", "_ct", "_image"):
            for extension in (".nii.gz", ".nii"):
                candidate = predictions / f"{base}{tail}{extension}"
                if candidate.is_file():
                    return candidate
    return None


def write_csv(result: Evaluation, path: Path) -> None:
    """One line per case and class; a case name that a spreadsheet would take for a formula gets a leading apostrophe."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", "class", "dice", "truth_voxels", "predicted_voxels", "overlap_voxels", "outcome"])
        for score in result.cases:
            case = f"'{score.case}" if score.case[:1] in "=+-@" else score.case
            for name, c in score.classes.items():
                dice = "" if np.isnan(c.dice) else f"{c.dice:.6f}"
                writer.writerow([case, name, dice, c.truth_voxels, c.predicted_voxels, c.overlap_voxels, c.outcome])
