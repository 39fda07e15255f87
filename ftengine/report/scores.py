"""An evaluation as the report reads it: the document of ``ftengine evaluate --json``, whichever figures it has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftengine.errors import ConfigError
from ftengine.report.run_folder import figure, mapping


@dataclass(frozen=True)
class Scores:
    """summary: figures by class. dice: by case, of the classes that its truth holds. outcomes: tp, fp, tn, fn by case and class.
    diameter_mm: of the largest true lesion, by case and class. confidence: of the summary's intervals.

    failed: why files could not be scored. num_left_out: volumes whose tumours nobody annotated.
    """

    name: str
    summary: Mapping[str, Mapping[str, Any]]
    dice: Mapping[str, Mapping[str, float]]
    outcomes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    num_left_out: int = 0
    diameter_mm: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    confidence: float = 0.95

    @property
    def classes(self) -> list[str]:
        """All classes, in order."""
        return list(dict.fromkeys([*self.summary, *(name for dice in self.dice.values() for name in dice)]))

    def of_class(self, name: str) -> dict[str, float]:
        """Dice of the cases that hold a class."""
        return {case: dice[name] for case, dice in self.dice.items() if name in dice}

    def of_case(self, case: str, classes: Sequence[str]) -> float | None:
        """Mean Dice of a case over those of ``classes`` that it holds; None where it holds none."""
        values = [value for name, value in self.dice.get(case, {}).items() if name in classes]
        return sum(values) / len(values) if values else None

    def interval(self, class_name: str, key: str) -> tuple[float, float] | None:
        """The confidence interval of a number of the summary; None where it has none."""
        bounds = mapping(self.summary.get(class_name)).get(f"{key}_interval")
        ends = (
            [figure(bound) for bound in bounds] if isinstance(bounds, Sequence) and not isinstance(bounds, str) else []
        )
        return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None

    def figure(self, class_name: str, key: str) -> float | None:
        """A number of the summary; None where it is not there."""
        return figure(mapping(self.summary.get(class_name)).get(key))


def scores_of(name: str, document: Mapping[str, Any]) -> Scores:
    """Read ``Evaluation.to_json()``. Raises ConfigError for a document that is none."""
    cases, summary = document.get("cases"), document.get("summary")
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not isinstance(summary, Mapping):
        raise ConfigError(
            f"evaluation {name}: has no list 'cases' and no table 'summary'. Give what 'ftengine evaluate ... --json' printed."
        )
    dice: dict[str, dict[str, float]] = {}
    outcomes: dict[str, dict[str, str]] = {}
    diameters: dict[str, dict[str, float]] = {}
    for entry in map(mapping, cases):
        case, classes = str(entry.get("case", "")), mapping(entry.get("classes"))
        dice[case], outcomes[case], diameters[case] = {}, {}, {}
        for label, row in classes.items():
            value = figure(mapping(row).get("dice"))
            if value is not None and figure(mapping(row).get("truth_voxels")):
                dice[case][str(label)] = value
            outcomes[case][str(label)] = str(mapping(row).get("outcome", ""))
            lesions = mapping(mapping(row).get("lesions")).get("truth")
            found = (
                [figure(mapping(lesion).get("diameter_mm")) for lesion in lesions] if isinstance(lesions, list) else []
            )
            if sizes := [size for size in found if size is not None]:
                diameters[case][str(label)] = max(sizes)
    return Scores(
        name=name,
        summary={str(label): mapping(row) for label, row in summary.items()},
        dice=dice,
        outcomes=outcomes,
        failed={str(case): str(reason) for case, reason in mapping(document.get("failed")).items()},
        num_left_out=int(figure(document.get("num_left_out")) or 0),
        diameter_mm=diameters,
        confidence=figure(mapping(document.get("settings")).get("confidence")) or 0.95,
    )


def read_scores(path: Path, name: str | None = None) -> Scores:
    """Read a file that ``ftengine evaluate --json`` was sent to. Raises ConfigError where it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read as JSON ({type(error).__name__}). Give what 'ftengine evaluate ... --json > FILE' wrote."
        ) from error
    return scores_of(name or path.stem, mapping(document))


def tumor_classes(classes: Sequence[str]) -> list[str]:
    """Which classes are tumours, by their names; all, where no name says so."""
    return [name for name in classes if "tumor" in name.lower() or "lesion" in name.lower()] or list(classes)


def worst_and_best(scores: Scores, classes: Sequence[str], count: int) -> list[tuple[str, str]]:
    """(case, why it is shown): up to ``count`` with the lowest and as many with the highest Dice of ``classes``, none twice."""
    ranked = sorted((value, case) for case in scores.dice if (value := scores.of_case(case, classes)) is not None)
    num_worst = min(count, (len(ranked) + 1) // 2)
    worst = [(case, f"Worst {n} of {len(ranked)} by Dice") for n, (_, case) in enumerate(ranked[:num_worst], start=1)]
    left = ranked[num_worst:][::-1][:count]
    return worst + [(case, f"Best {n} of {len(ranked)} by Dice") for n, (_, case) in enumerate(left, start=1)]
