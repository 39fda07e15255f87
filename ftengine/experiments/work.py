"""What each unit does, with the engine's own stages: trainings, calibration, evaluation. Runs in a worker process, or in torchrun's."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftengine.assemble import calibrate_judge, resolve_device, train_segmentation, train_synthesis
from ftengine.config import Config
from ftengine.errors import ConfigError, FtengineError
from ftengine.evaluation.evaluate import Evaluation, evaluate_checkpoint, evaluate_folders
from ftengine.experiments.folder import log_file, read_unit, result_file, unit_folder
from ftengine.experiments.serve import Advance, InterruptedRunError
from ftengine.experiments.stores import PATHS, read_paths, subset_path
from ftengine.files import write_json_whole
from ftengine.store.reader import open_store
from ftengine.training.distributed import world_of_environment
from ftengine.training.run import CHECKPOINT, TrainingResult, versions

_SECONDS_BETWEEN_REPORTS = 1.0
_RUN = "run"
# what a run that paints nothing does not use: a plan may change it and the run goes on
_IDLE = ("synthesis", "qc", "generator")
Result = dict[str, Any]


class UnitFailedError(FtengineError):
    """The processes of a training ended without a result."""


def do(folder: Path, key: str, device: str, advance: Advance, *, keep_fds: Sequence[int] = ()) -> None:
    """Do a unit and write its result. What a killed run left is taken up. keep_fds: files that torchrun inherits."""
    unit = read_unit(folder, key)
    if unit["spec"].get("processes", 1) > 1 and not _is_inside_torchrun():
        _in_processes(folder, key, device, unit["spec"]["processes"], keep_fds)
        return
    started, resumed = time.perf_counter(), checkpoint(folder, key).exists()
    work: Mapping[str, Callable[..., Result]] = {
        "segmenter": _segmenter,
        "student": _segmenter,
        "generator": _generator,
        "calibration": _calibration,
        "evaluation": _evaluation,
        "predictions": _predictions,
    }
    result = work[unit["kind"]](folder, key, unit["spec"], device, advance)
    if not world_of_environment().is_main:
        return
    about = {
        "seconds": time.perf_counter() - started,
        "resumed": resumed,
        "device": _device_name(device),
        "versions": versions(),
    }
    write_json_whole(result_file(folder, key), {**unit, **result, **about})


def checkpoint(folder: Path, key: str) -> Path:
    """The network that a unit has trained."""
    return unit_folder(folder, key) / _RUN / CHECKPOINT


def _segmenter(folder: Path, key: str, spec: Mapping[str, Any], device: str, advance: Advance) -> Result:
    config = _config(spec, device)
    given = {role: checkpoint(folder, spec[role]) for role in ("generator", "judge", "init") if role in spec}
    paints = "generator" in given or not config.synthesis.needs_generator
    trained = train_segmentation(
        config,
        subset_path(folder, spec["store"]),
        checkpoint(folder, key).parent,
        held_out_fold=spec["fold"],
        resume=checkpoint(folder, key).exists(),
        on_step=_steps(config.training.steps, advance),
        allow=() if paints else _IDLE,
        generator_path=given.get("generator"),
        judge_path=given.get("judge"),
        init=given.get("init"),
    )
    return _of_training(trained)


def _generator(folder: Path, key: str, spec: Mapping[str, Any], device: str, advance: Advance) -> Result:
    config = _config(spec, device)
    trained = train_synthesis(
        config,
        subset_path(folder, spec["store"]),
        checkpoint(folder, key).parent,
        baseline=checkpoint(folder, spec["baseline"]),
        held_out_fold=spec["fold"],
        resume=checkpoint(folder, key).exists(),
        on_step=_steps(config.generator_training.steps, advance),
    )
    return _of_training(trained)


def _calibration(folder: Path, key: str, spec: Mapping[str, Any], device: str, _advance: Advance) -> Result:
    calibration = calibrate_judge(
        _config(spec, device),
        open_store(subset_path(folder, spec["store"])),
        judge_path=checkpoint(folder, spec["judge"]),
        generator_path=checkpoint(folder, spec["generator"]) if "generator" in spec else None,
        out=unit_folder(folder, key),
        fold=spec["fold"],
        num_painted=spec["num_painted"],
    )
    threshold = calibration.threshold
    return {
        "threshold": threshold,
        "recommended_threshold": calibration.recommended_threshold,
        "pass_rates": {
            origin: None if threshold is None else calibration.pass_rate(origin, threshold)
            for origin in ("real", "painted")
        },
    }


def _evaluation(folder: Path, _key: str, spec: Mapping[str, Any], device: str, advance: Advance) -> Result:
    num, done = len(spec["cases"]), 0

    def on_case(_score: object) -> None:
        nonlocal done
        done += 1
        advance(done / num, f"volume {done} of {num}")

    evaluation = evaluate_checkpoint(
        checkpoint(folder, spec["checkpoint"]),
        open_store(read_paths(folder / PATHS)[spec["store"]]),
        device=resolve_device(device),
        cases=spec["cases"],
        keys=spec["keys"],
        on_case=on_case,
    )
    return _of_evaluation(evaluation)


def _predictions(_folder: Path, _key: str, spec: Mapping[str, Any], _device: str, _advance: Advance) -> Result:
    for role in ("predictions", "truth"):
        if not Path(spec[role]).exists():
            raise ConfigError(f"{spec[role]}: is not there; want the {role} that the plan's external section names.")
    region = Config.preset(spec["preset"]).region
    settings = Config(region=region).with_overrides(spec["keys"]).evaluation
    return _of_evaluation(evaluate_folders(Path(spec["predictions"]), Path(spec["truth"]), region, settings))


def _of_evaluation(evaluation: Evaluation) -> Result:
    """Raises ConfigError where volumes failed: a mean over the others would be another figure."""
    if evaluation.exit_code:
        reasons = "; ".join(evaluation.failed.values()) or "there is none"
        raise ConfigError(f"{len(evaluation.failed)} volumes cannot be scored: {reasons}")
    return {"evaluation": evaluation.to_json()}


def _of_training(result: TrainingResult) -> Result:
    if result.interrupted:
        raise InterruptedRunError(f"{result.checkpoint}: stopped after {result.steps} steps; the same command goes on.")
    return {
        "steps": result.steps,
        "quality": result.quality,
        "mix": result.mix,
        "warnings": result.warnings,
        "bad_reads": result.bad_reads,
        "wait_fraction": result.stall.get("wait_fraction"),
    }


def _config(spec: Mapping[str, Any], device: str) -> Config:
    return Config.from_dict(spec["config"], where="unit").with_overrides({"device": device})


def _steps(total: int, advance: Advance) -> Callable[[int, dict[str, float]], None]:
    last = [0.0]

    def report(step: int, _values: dict[str, float]) -> None:
        now = time.monotonic()
        if now - last[0] >= _SECONDS_BETWEEN_REPORTS:
            last[0] = now
            advance(step / total, f"step {step} of {total}")

    return report


def _is_inside_torchrun() -> bool:
    return world_of_environment().size > 1


def _in_processes(folder: Path, key: str, device: str, number: int, keep_fds: Sequence[int]) -> None:
    """A training in several processes, by torchrun."""
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)),
        *("-m", "ftengine.experiments.worker", str(folder), device, "--unit", key),
    ]
    code, stopped = run_group(command, keep_fds)
    if result_file(folder, key).is_file():
        return
    if stopped:
        raise InterruptedRunError(f"{key}: stopped; the same command goes on.")
    raise UnitFailedError(f"its {number} processes ended with code {code}; see {log_file(folder, key)}")


def run_group(command: Sequence[str], keep_fds: Sequence[int]) -> tuple[int, bool]:
    """Run a command in a process group of its own, none of which outlives this call: (exit code, whether this process was told to stop).

    A signal to stop is passed on to the command as SIGTERM, once. keep_fds: files that it inherits, so that the experiment's lock is held
    while it lives, also where this process is killed.
    """
    stopped: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(signal_number: int, _frame: object) -> None:
        stopped.append(signal_number)
        if process is not None and len(stopped) == 1:
            process.terminate()

    previous = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, pass_fds=keep_fds, start_new_session=True)  # noqa: S603 - of this package
        if stopped:
            process.terminate()
        return process.wait(), bool(stopped)
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for n, handler in previous.items():
            signal.signal(n, handler)


def _device_name(device: str) -> str:
    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else "cpu"
