"""What a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ftengine.pictures.sheets import Tile
from ftengine.quality.calibrate import Calibration
from ftengine.report.figures import PaintedFigure
from ftengine.report.run_folder import RunLog
from ftengine.report.scores import Scores, tumor_classes


@dataclass(frozen=True)
class Introduction:
    """What a reader should know first. notice: what the data are; quick: that the run was too short to compare
    anything, where it was; steps: what was done, a sentence each; stage_seconds: duration of each stage, in order.
    """

    notice: str = ""
    quick: str = ""
    steps: Sequence[str] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportData:
    """What a report shows; all texts are escaped when written.

    runs: of training, as ``read_run`` gives them. evaluations: the first is what the others are compared with. cases: figures of
    ``case_figures``; case_notes: why some are not drawn. tiles, painted: painted tumours. calibration: of the judge. created: when and by
    which version, a text.
    """

    title: str
    runs: Sequence[RunLog] = ()
    evaluations: Sequence[Scores] = ()
    cases: Sequence[str] = ()
    case_notes: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    painted: Sequence[PaintedFigure] = ()
    calibration: Calibration | None = None
    introduction: Introduction = field(default_factory=Introduction)
    created: str = ""

    @property
    def classes(self) -> list[str]:
        """The tumour classes of the evaluations."""
        return tumor_classes(list(dict.fromkeys(name for scores in self.evaluations for name in scores.classes)))

    @property
    def painting_run(self) -> RunLog | None:
        """The last run that trained a segmenter with painted tumours."""
        painting = [run for run in self.runs if run.keys("mix/") and run.keys("qc/pass_rate")]
        return painting[-1] if painting else None
