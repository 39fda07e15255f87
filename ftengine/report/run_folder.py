"""The folder of a training run as the report reads it: forgiving, since a run may still be going on, have been killed, or be an old one.

=======  ==========================================================================================================
input    a folder that ``ftengine train`` wrote: ``metrics.jsonl``, ``validation.jsonl``, ``run.json``, ``config.yaml``, ``result.json``
does     reads what is there; lines and files that cannot be read become notes, never errors
output   ``RunLog``
raises   ConfigError where the folder is no run at all
=======  ==========================================================================================================
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftengine.errors import ConfigError
from ftengine.training.run import RESULT

_MAX_PICTURES = 4
_SECTIONS = {"segmenter": "training", "generator": "generator_training"}


@dataclass(frozen=True)
class RunLog:
    """A run. metrics, validations: logged lines in order, finite numbers only. document: ``run.json``; result: ``result.json``, None where
    there is none. config_yaml: as written. pictures: the latest PNG files that the run drew. notes: what is missing or broken, a
    sentence each.
    """

    name: str
    folder: Path
    metrics: Sequence[Mapping[str, float]]
    validations: Sequence[Mapping[str, float]]
    document: Mapping[str, Any]
    result: Mapping[str, Any] | None
    config_yaml: str
    pictures: Sequence[Path] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def kind(self) -> str:
        """segmenter, generator, or empty where an old run does not say."""
        kind = self.document.get("kind", "")
        return kind if kind in _SECTIONS else ""

    @property
    def steps_done(self) -> int:
        """Steps up to the last logged one."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration as plain values, empty where it cannot be read."""
        return mapping(self.document.get("config"))

    def setting(self, *path: str) -> Any:
        """A value of the configuration; None where it has none."""
        value: Any = self.config
        for name in path:
            value = mapping(value).get(name)
        return value

    @property
    def steps_wanted(self) -> int | None:
        """Steps that the configuration asks for."""
        steps = self.setting(_SECTIONS[self.kind], "steps") if self.kind else None
        return steps if isinstance(steps, int) else None

    @property
    def samples_per_step(self) -> float | None:
        """Patches of an update of the weights, of one process."""
        section = _SECTIONS.get(self.kind, "")
        size, parts = (figure(self.setting(section, name)) for name in ("batch_size", "accumulate"))
        return None if size is None else size * (parts or 1.0)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps done and values of a logged figure."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] + 1 for line in lines], [line[key] for line in lines]

    def keys(self, prefix: str) -> list[str]:
        """Names of logged figures that begin with ``prefix``, in the order in which they came up."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(prefix)))

    def weighted(self, key: str) -> float | None:
        """Mean of a figure of log lines over the time they cover; None where no line has it."""
        pairs = [
            (line[key], seconds) for line, seconds in zip(self.metrics, self.line_seconds(), strict=True) if key in line
        ]
        total = sum(seconds for _, seconds in pairs)
        return sum(value * seconds for value, seconds in pairs) / total if total > 0 else None

    def line_seconds(self) -> list[float]:
        """Time that each logged line covers: its steps times its mean duration of a step."""
        before, seconds = -1.0, []
        for line in self.metrics:
            seconds.append(max(0.0, line["step"] - before) * line.get("step_s", 0.0))
            before = line["step"]
        return seconds


def read_run(folder: str | Path, name: str | None = None) -> RunLog:
    """Read the folder of a run; ``name``: what it is called in the report (default: the folder's name).

    Raises ConfigError for a folder that holds neither ``metrics.jsonl`` nor ``run.json``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: is no folder; want that of a run, as 'ftengine train seg STORE --out RUN' makes it."
        )
    if not any((folder / file).is_file() for file in ("metrics.jsonl", "run.json")):
        raise ConfigError(
            f"{folder}: holds neither metrics.jsonl nor run.json, so it is not the folder of a training run. Give the folder that was --out of "
            "'ftengine train'."
        )
    notes: list[str] = []
    metrics = _lines(folder / "metrics.jsonl", notes)
    validations = _lines(folder / "validation.jsonl", notes)
    document = _document(folder / "run.json", notes)
    result = _document(folder / RESULT, notes) if (folder / RESULT).exists() else None
    run = RunLog(
        name=name or folder.resolve().name,
        folder=folder,
        metrics=metrics,
        validations=validations,
        document=document,
        result=result or None,
        config_yaml=_text(folder / "config.yaml", notes),
        pictures=_latest_pictures(folder / "pictures"),
    )
    return RunLog(**{**run.__dict__, "notes": (*_state(run), *notes)})


def read_runs(folders: Sequence[Path]) -> list[RunLog]:
    """Read runs, named by ``distinct_names``."""
    return [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, without the extension of a file; more of the paths where that does not tell them apart."""
    resolved = [path.resolve() for path in paths]
    parts = [(path if path.is_dir() else path.with_suffix("")).parts for path in resolved]
    depth = 1
    while depth < max(map(len, parts), default=0) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, or nothing where there is something else."""
    return value if isinstance(value, Mapping) else {}


def figure(value: Any) -> float | None:
    """A JSON number that is finite, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _state(run: RunLog) -> list[str]:
    wanted = "" if run.steps_wanted is None else f" of {run.steps_wanted:,}"
    if not run.metrics:
        return ["No step has been logged yet: there is nothing to draw."]
    if run.result is None:
        return [
            (
                f"Unfinished: {run.steps_done:,}{wanted} steps are logged and there is no result.json. The run is still going on, was killed, or is of an "
                "older version. What follows is what its log says so far."
            )
        ]
    if run.result.get("interrupted"):
        return [f"Interrupted after {run.steps_done:,}{wanted} steps, its state is saved; --resume goes on."]
    return []


def _lines(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The lines of a log that have a step; what cannot be read is counted in a note."""
    if not path.is_file():
        if path.name == "metrics.jsonl":
            notes.append("metrics.jsonl is not there: nothing was logged, or it was moved.")
        return []
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    lines, broken = [], []
    for number, text in enumerate(texts, start=1):
        try:
            values = mapping(json.loads(text))
        except (ValueError, RecursionError):
            values = {}
        finite = {str(key): x for key, value in values.items() if (x := figure(value)) is not None}
        if "step" in finite:
            lines.append(finite)
        else:
            broken.append(number)
    if broken == [len(texts)]:
        notes.append(
            f"The last line of {path.name} is cut off, as of a run that is just writing it or was killed; it is left out."
        )
    elif broken:
        notes.append(
            f"{len(broken)} of {len(texts)} lines of {path.name} cannot be read (the first: line {broken[0]}) and are left out."
        )
    return lines


def _document(path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return {}


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return ""


def _latest_pictures(folder: Path) -> list[Path]:
    """The pictures of the latest step that has some."""
    steps = sorted((f for f in folder.iterdir() if f.is_dir()), reverse=True) if folder.is_dir() else []
    for step in steps:
        found = sorted(step.glob("*.png"))
        if found:
            return found[:_MAX_PICTURES]
    return []
