"""The worst and the best cases of an evaluation, read from a store and drawn with truth and prediction."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.evaluation.evaluate import Evaluation
from ftengine.evaluation.metrics import score_case
from ftengine.pictures.hu_windows import Window
from ftengine.report.figures import CasePicture
from ftengine.report.scores import Scores
from ftengine.store.reader import Store

Predict = Callable[[str, NDArray[np.int16]], NDArray[np.uint8]]  # case, HU [z, y, x] -> label map of the same shape


def case_figures(
    store: Store,
    chosen: Sequence[tuple[str, str]],
    predictors: Mapping[str, Predict],
    scores: Mapping[str, Scores],
    classes: Sequence[str],
    window: Window,
) -> tuple[list[str], list[str]]:
    """HTML of each chosen (case, why) that the store holds, and a note for each that it does not, or that nobody predicted.

    predictors, scores: by model. classes: whose Dice is written beside a model.
    """
    figures, notes = [], []
    values = [store.labels[name] for name in classes if name in store.labels] or list(store.tumor_values)
    known = set(store.cases)
    for case, why in chosen:
        if case not in known:
            notes.append(
                f"{case} is not in the store {store.location}: it was scored on another one, and is not drawn."
            )
            continue
        patch = store.read_volume(case)
        try:
            predictions = {name: predict(case, patch.image) for name, predict in predictors.items()}
        except CaseError as error:
            notes.append(str(error))
            continue
        said = {name: _said(scores[name], case, classes) for name in predictors if name in scores}
        figures.append(
            CasePicture(
                case, why, patch.image, patch.label, predictions, said, store.spacing_mm_zyx, window, values
            ).html()
        )
    return figures, notes


def predictions_in(folder: Path, store: Store) -> Predict:
    """Reads what ``ftengine predict`` wrote into a folder for cases of a store, and brings it to the store's grid."""

    def predict(case: str, image_hu: NDArray[np.int16]) -> NDArray[np.uint8]:
        from ftengine.volume.readers import read_label  # what draws a network's predictions need not read files
        from ftengine.volume.resample import resample_to

        below = case.split("/", maxsplit=1)[-1]
        candidates = [folder / f"{name}{tail}" for name in (below, case) for tail in (".nii.gz", ".nii")]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            raise CaseError(
                f"{case}: {folder} holds no prediction of it ({below}.nii.gz)",
                "Predict this case too: 'ftengine predict CKPT CT --out DIR'.",
                code=FailureCode.MISSING_FILE,
            )
        label, grid = read_label(found, label_values=store.labels.values())
        try:
            moved = resample_to(label, grid, store.grid(case), nearest=True, outside=0)
        except ValueError as error:
            raise CaseError(
                f"{found}: cannot be brought to the grid of {case} in the store ({error})",
                "Give the prediction of the file that was converted.",
                code=FailureCode.GRID_MISMATCH,
            ) from error
        assert moved.shape == image_hu.shape  # noqa: S101 - the grid is the store's own
        return moved

    return predict


def score_predictions(predict: Predict, store: Store, cases: Sequence[str]) -> Evaluation:
    """Score predictions of the named cases on the store's grid; what cannot be had is listed as failed."""
    result = Evaluation()
    for case in cases:
        patch = store.read_volume(case)
        try:
            result.cases.append(score_case(case, predict(case, patch.image), patch.label, store.labels))
        except CaseError as error:
            result.failed[case] = str(error)
    return result


def _said(scores: Scores, case: str, classes: Sequence[str]) -> str:
    dice, outcomes = scores.dice.get(case, {}), scores.outcomes.get(case, {})
    words = {"tp": "detected", "fn": "missed", "fp": "false alarm", "tn": "rightly nothing"}
    said = [
        f"{name} Dice {dice[name]:.3f}, {words.get(outcomes.get(name, ''), '')}".rstrip(", ")
        if name in dice
        else f"{name} {words.get(outcomes.get(name, ''), 'not scored')}"
        for name in classes
    ]
    return "; ".join(said)
