"""What training was given, counted as it takes the batches: patches by what they show, and the verdicts of quality control."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftengine.quality.gate import QualityGate, tenth_figures
from ftengine.types import Batch, PatchRecord


@dataclass
class PatchCounts:
    """Patches by what training saw in them. Each is painted, annotated or healthy, and in one of these counts alone.

    painted: a painted tumour that quality control passed. annotated: a labelled tumour. rejected: painted and failed, so given back as
    it was (Eq. 5): it counts as healthy.
    """

    patches: int = 0
    painted: int = 0
    annotated: int = 0
    rejected: int = 0
    draws: int = 0

    @property
    def healthy(self) -> int:
        """Patches without a tumour, rejected ones among them."""
        return self.patches - self.painted - self.annotated

    def figures(self) -> dict[str, float]:
        """Shares of the patches, the ratio of labelled to synthetic ones, and draws per accepted patch; what has no value is NaN."""
        of_all, of_painted = self.patches or math.nan, self.painted or math.nan
        return {
            "mix/painted": self.painted / of_all,
            "mix/annotated": self.annotated / of_all,
            "mix/healthy": self.healthy / of_all,
            "mix/rejected": self.rejected / of_all,
            "mix/labelled_per_synthetic": self.annotated / of_painted,
            "mix/draws_per_painted": self.draws / of_painted,
        }


class PatchLedger:
    """Counts the batches of a run that paints, at the moment training takes them: counts belong to a step, however far the loader is ahead."""

    def __init__(self, tumor_values: Sequence[int], gate: QualityGate) -> None:
        """tumor_values: label values of labelled tumours. gate: judges the pass rate."""
        self.gate = gate
        self.warnings: list[str] = []
        self._tumor_values = tuple(tumor_values)
        self._line, self._epoch, self._run = PatchCounts(), PatchCounts(), PatchCounts()
        self._proportions: list[float] = []  # P of the judged patches since the last log line

    @property
    def draws_a_patch(self) -> float:
        """How often a painted patch of the run was drawn, in the mean; 1 before the first."""
        painted = self._run.painted + self._run.rejected
        return self._run.draws / painted if painted else 1.0

    def count(self, batch: Batch) -> str | None:
        """Count a batch; returns a warning where one came up. Raises RejectionError where the gate stops the run."""
        for record in batch.records:
            for counts in (self._line, self._epoch, self._run):
                self._add(counts, record)
        for record in batch.records:
            if record.painted is not None:
                if not math.isnan(record.painted.proportion):
                    self._proportions.append(record.painted.proportion)
                self.gate.record(record.painted, record.request.dataset)
        warning = self.gate.take_warning()
        if warning is not None:
            self.warnings.append(warning)
        return warning

    def take_line(self) -> dict[str, float]:
        """Figures of the batches since the last call, the tenths of their P among them, and the gate's."""
        figures, self._line = self._line.figures(), PatchCounts()
        proportions, self._proportions = self._proportions, []
        return figures | tenth_figures(proportions) | self.gate.figures()

    def take_epoch(self) -> dict[str, float]:
        """Figures of the epoch that has ended: the number of patches, their shares and the epoch's own pass rate."""
        ended, self._epoch = self._epoch, PatchCounts()
        judged = ended.painted + ended.rejected
        return {
            "patches": ended.patches,
            **ended.figures(),
            "qc/pass_rate": ended.painted / judged if judged else math.nan,
        }

    def summary(self) -> dict[str, Any]:
        """The whole run: counts, and the figures of a log line without their prefix; None where there is no value."""
        figures = {
            name.removeprefix("mix/"): x if math.isfinite(x) else None for name, x in self._run.figures().items()
        }
        return {
            "num_patches": self._run.patches,
            "num_painted": self._run.painted,
            "num_annotated": self._run.annotated,
            "num_healthy": self._run.healthy,
            "num_rejected": self._run.rejected,
            **figures,
        }

    def state_dict(self) -> dict[str, Any]:
        """All counts: numbers, texts, lists and dicts of them."""
        return {
            "line": asdict(self._line),
            "epoch": asdict(self._epoch),
            "run": asdict(self._run),
            "warnings": list(self.warnings),
            "gate": self.gate.state_dict(),
            "proportions": list(self._proportions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where ``state`` was taken."""
        self._line, self._epoch, self._run = (PatchCounts(**state[name]) for name in ("line", "epoch", "run"))
        self.warnings = list(state["warnings"])
        self._proportions = list(state.get("proportions", ()))  # checkpoints of older versions have none
        self.gate.load_state_dict(state["gate"])

    def _add(self, counts: PatchCounts, record: PatchRecord) -> None:
        counts.patches += 1
        painted = record.painted
        if painted is not None:
            counts.draws += painted.num_draws
            counts.painted += painted.passed
            counts.rejected += not painted.passed
        if (painted is None or not painted.passed) and self._shows_labelled_tumor(record):
            counts.annotated += 1

    def _shows_labelled_tumor(self, record: PatchRecord) -> bool:
        """By the patch's own label; where nobody counted its voxels, by its volume: tumours are labelled in it."""
        if record.label_voxels is None:
            return record.request.annotated
        return any(record.label_voxels[v] for v in self._tumor_values if v < len(record.label_voxels))
