"""The demonstration: the whole road on phantom CT, with the commands' own functions, and a report of what came out.

Protocol: a baseline S is trained on few tumour-annotated volumes; G is trained against S; then two students continue from S for equally
many steps, one on the same annotated volumes, one with tumours painted on organ-labelled volumes. Both are scored on held-out
phantoms. Phantoms are synthetic and made to be learnable in minutes: the figures say that the engine works, not how well FreeTumor
does on patients.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftengine.assemble import calibrate_judge, load_painters, resolve_device, train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.evaluation.evaluate import Evaluation, evaluate_checkpoint
from ftengine.evaluation.metrics import summarize
from ftengine.geometry import FloatZYX, IntZYX
from ftengine.pictures.hu_windows import WindowChoice
from ftengine.pictures.samples import painted_samples
from ftengine.prediction.infer import predict_volume
from ftengine.quality.calibrate import Calibration
from ftengine.report.cases import Predict, case_figures
from ftengine.report.data import Introduction, ReportData
from ftengine.report.figures import painted_figures
from ftengine.report.report import write_report
from ftengine.report.run_folder import read_run
from ftengine.report.scores import scores_of, worst_and_best
from ftengine.store.case import Annotation, ConvertOptions
from ftengine.store.convert import convert_cases
from ftengine.store.reader import Store, open_store
from ftengine.training.checkpoint import load_segmenter
from ftengine.training.run import Progress, TrainingResult, versions
from ftengine.volume.discover import discover
from ftengine.volume.phantom import TumorSpec, write_phantom_dataset

TUMOR = "liver_tumor"
PHANTOM_NOTICE = (
    "All CT in this report are synthetic phantoms, drawn from formulas and made to be learnable in minutes. They show no patient. The "
    "figures say that the engine works from end to end on this machine; nothing here says how well it works on patients."
)
QUICK_NOTICE = (
    "This was a quick run: a few volumes and a few training steps, to check that all parts work. The networks have hardly learned "
    "anything, so do not compare the Dice figures at all."
)
WHAT_WAS_DONE = (
    "Drew phantom CT volumes and converted them into a store.",
    "Trained a baseline segmenter S on the few volumes whose tumours are annotated.",
    "Trained a generator G to paint tumours that S takes for real ones.",
    "Trained two students that go on from S for equally many steps. The first saw the annotated volumes alone.",
    "The second saw volumes without tumours too, into which G painted tumours while it trained; S judged each, and it saw those that passed.",
    "Predicted held-out volumes that no network had seen, and compared the predictions with their known truth.",
)
ONLY_LIVER = {3: 0, 4: 0, 5: 0, 6: 0}  # the demo is a specialist: other organs become background


@dataclass(frozen=True)
class DemoSize:
    """How much of everything the demo makes."""

    num_annotated: int = 6
    num_unannotated: int = 16
    num_test: int = 12
    num_test_healthy: int = 4
    shape_zyx: IntZYX = (64, 88, 88)
    spacing_mm_zyx: FloatZYX = (3.0, 3.0, 3.0)
    baseline_steps: int = 400
    generator_steps: int = 80
    student_steps: int = 250


FULL = DemoSize()
QUICK = DemoSize(
    num_annotated=2,
    num_unannotated=2,
    num_test=2,
    num_test_healthy=1,
    shape_zyx=(48, 64, 64),
    spacing_mm_zyx=(4.0, 4.0, 4.0),
    baseline_steps=20,
    generator_steps=6,
    student_steps=10,
)


def run_demo(
    out: str | Path, *, seed: int = 0, quick: bool = False, say: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Run all stages into ``out``; returns the summary that is also written to ``summary.json``. ``say`` gets a line a stage.

    Raises ConfigError where ``out`` holds something that this demo did not make.
    """
    out = Path(out)
    size = QUICK if quick else FULL
    _prepare(out)
    clock = _StageClock(say)
    config = _config(seed, quick=quick)

    with clock.stage("phantoms"):
        _write_phantoms(out / "phantoms", seed, size)
    with clock.stage("convert"):
        store = _convert(out, config)
    with clock.stage("baseline"):
        baseline = _train(config, out, "baseline", size.baseline_steps, say)
    with clock.stage("generator"):
        generator_config = config.with_overrides({"generator_training.steps": size.generator_steps})
        generator = _finished(
            train_synthesis(
                generator_config,
                store.path,
                out / "generator",
                baseline=baseline.checkpoint,
                split="train",
                on_step=_every(20, "generator", "loss_seen", say),
            )
        )
    with clock.stage("calibrate"):
        calibration = calibrate_judge(
            config,
            store,
            judge_path=baseline.checkpoint,
            generator_path=generator.checkpoint,
            out=out / "calibration",
            split="test",
            num_painted=20 if quick else 80,
        )
    with clock.stage("student without synthesis"):
        control = _train(config, out, "student_baseline", size.student_steps, say, init=baseline.checkpoint)
    with clock.stage("student with synthesis"):
        student = _train(
            config,
            out,
            "student_synthesis",
            size.student_steps,
            say,
            init=baseline.checkpoint,
            generator_path=generator.checkpoint,
            judge_path=baseline.checkpoint,
        )
    with clock.stage("evaluate"):
        device = resolve_device(config.device)
        arms = {
            "baseline": evaluate_checkpoint(control.checkpoint, store, device=device, split="test"),
            "with synthesis": evaluate_checkpoint(student.checkpoint, store, device=device, split="test"),
        }
    students = {"baseline": control, "with synthesis": student}
    runs = {
        "baseline S": baseline,
        "generator": generator,
        "student without synthesis": control,
        "student with synthesis": student,
    }
    with clock.stage("pictures"):
        report = _report(config, store, runs, students, arms, calibration, quick=quick)
    summary = _summary(clock, arms, calibration, student, seed=seed, quick=quick)
    _write_json(out / "summary.json", summary)
    write_report(out / "report.html", replace(report, introduction=_introduction(clock.seconds, quick=quick)))
    say(f"report: {out / 'report.html'}")
    return summary


def _prepare(out: Path) -> None:
    marker = out / ".ftengine-demo"
    if out.exists() and any(out.iterdir()):
        if not marker.exists():
            raise ConfigError(f"{out}: is not empty and was not made by the demo; choose another --out.")
        import shutil

        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text("made by 'ftengine demo'; a new demo replaces this folder\n", encoding="utf-8")


def _config(seed: int, *, quick: bool) -> Config:
    overrides: dict[str, Any] = {"seed": seed, "device": "auto"}
    if quick:
        overrides |= {"network.channels": (8, 16, 32), "training.log_every": 5, "generator_training.log_every": 2}
    return Config.preset("demo").with_overrides(overrides)


def _write_phantoms(folder: Path, seed: int, size: DemoSize) -> None:
    """Three sets, as in the few-labels trial: annotated ones from two scanners only, the others from all."""
    # contrasts doubled: what a network learns in minutes, not what radiologists see
    tumors = TumorSpec(num_tumors=(1, 3), diameter_mm=(14.0, 36.0), organs=("liver",), contrast_factor=2.0)
    common: dict[str, Any] = {
        "region": "abdomen",
        "seed": seed,
        "shape_zyx": size.shape_zyx,
        "spacing_mm_zyx": size.spacing_mm_zyx,
        "vary_geometry": True,
        "tumors": tumors,
    }
    write_phantom_dataset(folder / "annotated", num_volumes=size.num_annotated, scanners=(0, 1), first_case=0, **common)
    write_phantom_dataset(
        folder / "organs",
        num_volumes=size.num_unannotated,
        num_with_tumors=0,
        annotate_tumors=False,
        first_case=1000,
        **common,
    )
    num_test = size.num_test + size.num_test_healthy
    write_phantom_dataset(
        folder / "test", num_volumes=num_test, num_with_tumors=size.num_test, first_case=2000, **common
    )


def _convert(out: Path, config: Config) -> Store:
    sets: tuple[tuple[str, Annotation, str], ...] = (
        ("annotated", "tumor", "train"),
        ("organs", "organ", "train"),
        ("test", "tumor", "test"),
    )
    for name, annotation, split in sets:
        sources = discover([out / "phantoms" / name], dataset=name)
        options = ConvertOptions(annotation=annotation, split=split, label_map=tuple(ONLY_LIVER.items()))
        report = convert_cases(sources, out / "store.zarr", config.region, options=options)
        if report.exit_code:
            raise ConfigError(
                f"the demo's own phantoms did not convert: {[o.reason for o in report.outcomes if o.reason]}"
            )
    return open_store(out / "store.zarr")


def _train(
    config: Config, out: Path, name: str, steps: int, say: Callable[[str], None], **options: Any
) -> TrainingResult:
    chosen = config.with_overrides({"training.steps": steps})
    progress = _every(50, name, "loss", say)
    return _finished(
        train_segmentation(
            chosen,
            out / "store.zarr",
            out / name,
            split="train",
            on_step=progress,
            warn=lambda text: say(f"    {name}: warning: {text}"),
            **options,
        )
    )


def _finished(result: TrainingResult) -> TrainingResult:
    """Training saves and returns on Ctrl-C; the demo as a whole stops."""
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _every(steps: int, name: str, figure: str, say: Callable[[str], None]) -> Progress:
    last = {}

    def report(step: int, values: dict[str, float]) -> None:
        last.update(values)
        if step % steps == 0:
            say(
                f"    {name}: step {step}, {figure} {last.get(figure, float('nan')):.3f}, {last.get('step_s', 0):.2f} s a step"
            )

    return report


def _report(
    config: Config,
    store: Store,
    runs: dict[str, TrainingResult],
    students: dict[str, TrainingResult],
    arms: dict[str, Evaluation],
    calibration: Calibration,
    *,
    quick: bool,
) -> ReportData:
    """What ``ftengine report`` shows of runs, evaluations, cases and painted tumours."""
    scores = [scores_of(name, arm.to_json()) for name, arm in arms.items()]
    device = resolve_device(config.device)

    def predictor(result: TrainingResult) -> Predict:
        network = load_segmenter(result.checkpoint)[0]
        return lambda _case, image: predict_volume(network, image, config, device)

    figures, notes = case_figures(
        store,
        worst_and_best(scores[-1], [TUMOR], 1 if quick else 2),
        {name: predictor(result) for name, result in students.items()},
        {s.name: s for s in scores},
        [TUMOR],
        WindowChoice().of(config.region),
    )
    painter, judge = load_painters(config, runs["generator"].checkpoint, runs["baseline S"].checkpoint)
    samples = painted_samples(
        config,
        store,
        num_patches=3 if quick else 12,
        generator=painter,
        judge=judge,
        segmenter=load_segmenter(runs["baseline S"].checkpoint)[0],
        split="train",
    )
    tiles, painted = painted_figures(config, samples, WindowChoice(), num_figures=1 if quick else 4)
    return ReportData(
        title="ftengine demo",
        runs=[read_run(result.checkpoint.parent, name) for name, result in runs.items()],
        evaluations=scores,
        cases=figures,
        case_notes=notes,
        tiles=tiles,
        painted=painted,
        calibration=calibration,
    )


def _introduction(stage_seconds: dict[str, float], *, quick: bool) -> Introduction:
    return Introduction(
        notice=PHANTOM_NOTICE, quick=QUICK_NOTICE if quick else "", steps=WHAT_WAS_DONE, stage_seconds=stage_seconds
    )


def _summary(
    clock: "_StageClock",
    arms: dict[str, Evaluation],
    calibration: Calibration,
    student: TrainingResult,
    *,
    seed: int,
    quick: bool,
) -> dict[str, Any]:
    tables = {name: summarize(e.cases) for name, e in arms.items()}
    threshold = calibration.threshold
    return {
        "dice_baseline": tables["baseline"][TUMOR]["dice"],
        "dice_synthesis": tables["with synthesis"][TUMOR]["dice"],
        "qc_pass_rate": student.quality["qc/pass_rate"],
        # next to the pass rate of painted tumours: which share of the real held-out ones the judge would pass
        "qc_pass_rate_of_real_tumors": None if threshold is None else calibration.pass_rate("real", threshold),
        "qc_recommended_threshold": calibration.recommended_threshold,
        "wait_fraction": student.stall["wait_fraction"],
        "patches_per_s": student.stall["patches_per_s"],
        "seconds": clock.total_s(),
        "seconds_per_stage": clock.seconds,
        "evaluation": tables,
        "quality": {name: student.quality[name] for name in ("by_organ", "by_size", "by_dataset")},
        "seed": seed,
        "quick": quick,
        "versions": versions(),
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class _StageClock:
    """Says which stage runs and how long each took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self._say(f"{name}: {self.seconds[name]:.1f} s")

    def total_s(self) -> float:
        return time.perf_counter() - self._started
