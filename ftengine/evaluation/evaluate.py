"""Evaluate a checkpoint on a store, or a folder of predictions against a folder of truths."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ftengine.config import EvaluationConfig, RegionConfig
from ftengine.errors import CaseError, ConfigError
from ftengine.evaluation.lesions import Lesions, ScoredLesion
from ftengine.evaluation.metrics import CaseScore, ClassScore, FullScoring, is_small, summarize
from ftengine.evaluation.pairs import pair_files
from ftengine.evaluation.scoring_jobs import Job, ScoreArrays, ScoreFiles, Unpredicted, run_jobs
from ftengine.evaluation.tables import csv_text
from ftengine.store.folds import cases_of_kind
from ftengine.store.reader import Store

if TYPE_CHECKING:
    import torch

OnStart = Callable[[int], None]
OnCase = Callable[[CaseScore], None]
OnFailed = Callable[[str, CaseError], None]
FORMAT = 1  # of the JSON document
UNDEFINED = {
    "dice": "null where neither truth nor prediction holds the class; 0 where one of the two does",
    "hd95_mm": "null unless both truth and prediction hold the class; num_without_hd95 counts volumes with a truth and no prediction",
    "surface_dice": "null where neither truth nor prediction holds the class; 0 where one of the two does",
    "means": "over the volumes whose truth holds the class",
    "intervals": "null where the values give none: one volume, or ratios that are all equal",
}


@dataclass
class Evaluation:
    """Scores of all volumes.

    failed: the cases that could not be scored and why. num_left_out: labelled volumes whose tumours are not annotated: they can be scored
    neither as healthy nor as ill. without_truth: predictions that have no true label. settings: the definitions.
    """

    cases: list[CaseScore] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_left_out: int = 0
    without_truth: list[str] = field(default_factory=list)
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def exit_code(self) -> int:
        """0 all scored, 1 some failed, 4 none scored."""
        return 4 if not self.cases else 1 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; what has no value is None."""
        return {
            "format": FORMAT,
            "settings": self.settings.model_dump(),
            "undefined": UNDEFINED,
            "summary": summarize(self.cases, self.settings),
            "sizes": lesion_sizes(self.cases, self.settings),
            "cases": [
                {
                    "case": score.case,
                    "classes": {n: asdict(c) | {"outcome": c.outcome} for n, c in score.classes.items()},
                }
                for score in self.cases
            ],
            "failed": self.failed,
            "num_left_out": self.num_left_out,
            "without_truth": self.without_truth,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str) -> "Evaluation":
        """Back from ``to_json``. Raises ConfigError for what is no such document; where: its name, for the error."""
        try:
            if document["format"] != FORMAT:
                raise ConfigError(
                    f"{where}: evaluation format {document['format']!r}; this ftengine reads {FORMAT}. Evaluate again."
                )
            return cls(
                [_case_from_json(c) for c in document["cases"]],
                dict(document["failed"]),
                int(document["num_left_out"]),
                list(document["without_truth"]),
                EvaluationConfig.model_validate(document["settings"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError, ValidationError) as error:
            raise ConfigError(
                f"{where}: is not what 'ftengine evaluate --json' prints ({type(error).__name__}: {str(error).splitlines()[0]}). Evaluate again."
            ) from error


def load_evaluation(path: Path) -> Evaluation:
    """Read a file that holds what ``ftengine evaluate --json`` printed. Raises ConfigError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not JSON ({error}). Write it with 'ftengine evaluate ... --json > FILE'."
        ) from error
    return Evaluation.from_json(document, str(path))


def evaluate_checkpoint(
    checkpoint: str | Path,
    store: Store,
    *,
    device: "torch.device",
    split: str | None = None,
    fold: int | None = None,
    cases: Sequence[str] | None = None,
    overlap: float | None = None,
    settings: Mapping[str, object] | None = None,
    keys: Mapping[str, object] | None = None,
    workers: int = 1,
    on_start: OnStart = lambda _total: None,
    on_case: OnCase = lambda _score: None,
) -> Evaluation:
    """Predict the tumour-annotated volumes of a store (of a split, of a fold, or the named ones) on the store's grid and score them.

    ``overlap`` replaces the checkpoint's ``inference.overlap``, ``settings`` keys of its ``evaluation``,
    ``keys`` any others, dotted. workers: with more than one,
    volumes are scored in that many processes while the next one is predicted. A volume whose scores are NaN or infinite is listed as
    failed. Raises ConfigError where nothing is left to score.
    """
    # what scores files need not have what runs networks
    from ftengine.prediction.infer import check_trained_for, predict_volume
    from ftengine.training.checkpoint import load_segmenter

    network, config = load_segmenter(checkpoint)
    check_trained_for(store, config, checkpoint)
    changed = {**(keys or {}), **{f"evaluation.{key}": value for key, value in (settings or {}).items()}}
    config = config.with_overrides(changed if overlap is None else changed | {"inference.overlap": overlap})
    wanted = list(cases) if cases is not None else cases_of_kind(store, "tumor", split, fold)
    if not wanted:
        raise ConfigError(
            f"{store.location}: no labelled volume{'' if split is None else f' in split {split!r}'}{'' if fold is None else f' in fold {fold}'} to evaluate on."
        )
    full = FullScoring(store.spacing_mm_zyx, config.region.tumor_values, config.evaluation)

    def predicted() -> Iterator[Job]:
        for case in wanted:
            patch = store.read_volume(case)
            try:
                label = predict_volume(network, patch.image, config, device, case=case)
            except CaseError as error:
                yield Unpredicted(case, error)
                continue
            yield ScoreArrays(case, label, patch.label, store.labels, full)

    result = Evaluation(settings=config.evaluation)
    result.num_left_out = 0 if cases is not None else len(cases_of_kind(store, "organ", split, fold))
    on_start(len(wanted))
    return _collect(result, predicted(), wanted, workers, on_case, lambda _case, _error: None)


def evaluate_folders(
    predictions: Path,
    truths: Path,
    region: RegionConfig,
    settings: EvaluationConfig,
    *,
    label_map: Mapping[int, int] | None = None,
    predicted_map: Mapping[int, int] | None = None,
    workers: int = 1,
    on_start: OnStart = lambda _total: None,
    on_case: OnCase = lambda _score: None,
    on_failed: OnFailed = lambda _case, _error: None,
) -> Evaluation:
    """Score the label files of a folder against those of the same names in another (``pairs.pair_files``), each pair on its own grid.

    label_map, predicted_map: value in the true or predicted files -> value of the region; values that they do not name stay.
    workers: processes that read and score; 1 is this one. on_start: called once with the number of pairs; on_case and on_failed as cases end.

    A truth without a prediction is listed as failed, never left out in silence; so is a pair on different grids or with foreign values.
    A prediction without a truth is listed in ``without_truth``. Raises ConfigError and CaseError as ``pair_files``.
    """
    pairing = pair_files(predictions, truths)
    on_start(len(pairing.pairs))
    result = Evaluation(failed=dict(pairing.failed), without_truth=pairing.without_truth, settings=settings)
    jobs = [ScoreFiles(p, region, settings, dict(label_map or {}), dict(predicted_map or {})) for p in pairing.pairs]
    return _collect(result, jobs, [p.case for p in pairing.pairs], workers, on_case, on_failed)


def _collect(
    result: Evaluation, jobs: Iterable[Job], order: Sequence[str], workers: int, on_case: OnCase, on_failed: OnFailed
) -> Evaluation:
    """Run the jobs; scores and failures in ``order``, whichever worker was faster."""
    outcomes = {}
    for case, outcome in run_jobs(jobs, workers):
        outcomes[case] = outcome
        if isinstance(outcome, CaseError):
            on_failed(case, outcome)
        else:
            on_case(outcome)
    for case in order:
        outcome = outcomes[case]
        if isinstance(outcome, CaseError):
            result.failed[case] = str(outcome)
        else:
            result.cases.append(outcome)
    return result


def dataset_of(case: str) -> str:
    """The data set of a case: what stands before the first ``/`` of its name; "" where nothing does."""
    dataset, slash, _ = case.partition("/")
    return dataset if slash else ""


def lesion_sizes(cases: Sequence[CaseScore], settings: EvaluationConfig) -> dict[str, dict[str, dict[str, int]]]:
    """Number of small and large true lesions by data set and tumour class (Table A9)."""
    sizes: dict[str, dict[str, dict[str, int]]] = {}
    for score in cases:
        for name, of_class in score.classes.items():
            if of_class.lesions is None:
                continue
            counts = sizes.setdefault(dataset_of(score.case), {}).setdefault(name, {"small": 0, "large": 0})
            for lesion in of_class.lesions.truth:
                counts["small" if is_small(lesion, settings) else "large"] += 1
    return sizes


def cases_csv(result: Evaluation) -> str:
    """One line per case and class, and one per failed case, of outcome ``failed``; what has no value is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            "case", "class", "dice", "hd95_mm", "surface_dice", "truth_voxels", "predicted_voxels", "overlap_voxels", "outcome",
            "lesions", "lesions_found", "small_lesions", "small_lesions_found", "predicted_lesions", "false_positive_lesions",
        ]
    )  # fmt: skip
    for score in result.cases:
        for name, c in score.classes.items():
            figures = ("" if v is None else f"{v:.6f}" for v in (c.dice, c.hd95_mm, c.surface_dice))
            voxels = (c.truth_voxels, c.predicted_voxels, c.overlap_voxels, c.outcome)
            lesions = _lesion_columns(c.lesions, result.settings)
            writer.writerow([csv_text(score.case), csv_text(name), *figures, *voxels, *lesions])
    for case in result.failed:
        writer.writerow([csv_text(case), *("",) * 7, "failed", *("",) * 6])
    return stream.getvalue()


def _lesion_columns(lesions: Lesions | None, settings: EvaluationConfig) -> tuple[int | str, ...]:
    if lesions is None:
        return ("",) * 6
    small = [lesion for lesion in lesions.truth if is_small(lesion, settings)]
    num_right = sum(p.matched for p in lesions.predicted)
    return (
        len(lesions.truth),
        sum(t.matched for t in lesions.truth),
        len(small),
        sum(t.matched for t in small),
        len(lesions.predicted),
        len(lesions.predicted) - num_right,
    )


def _case_from_json(document: Mapping[str, Any]) -> CaseScore:
    classes = {}
    for name, fields in document["classes"].items():
        values = {key: value for key, value in fields.items() if key not in {"outcome", "lesions"}}
        classes[str(name)] = ClassScore(**values, lesions=_lesions_from_json(fields["lesions"]))
    return CaseScore(str(document["case"]), classes)


def _lesions_from_json(document: Mapping[str, Any] | None) -> Lesions | None:
    if document is None:
        return None
    truth, predicted = (tuple(ScoredLesion(**lesion) for lesion in document[side]) for side in ("truth", "predicted"))
    return Lesions(truth, predicted)
