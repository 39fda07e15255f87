"""A plan cut into units: trainings and evaluations, each named by a digest of all that decides its result.

So a unit that two methods share is one unit, and a plan that changes redoes what changed and no more. Not in a digest: places of stores and
folders, titles, the device, how often a run logs or saves, and keys at their defaults, so that a key that a later version adds with a
default renames nothing.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.experiments.brought import digest_of_labels
from ftengine.experiments.plan import Choice, Generator, Method, Plan, Task, Unlabelled, Volumes
from ftengine.experiments.stores import TrainingRows, digest_of, folds_of, rows_of, training_rows, unlabelled_rows
from ftengine.store.reader import Store
from ftengine.training.resume import deciding_keys

Kind = Literal["segmenter", "generator", "student", "calibration", "evaluation", "predictions"]
# a run's seed is 100 times the experiment's and repeat's, plus this: no two kinds of run see the same sequence of patches
_SEED_OF_KIND: Mapping[str, int] = {"segmenter": 1, "generator": 3, "student": 4, "calibration": 5}
_PAINTING = ("synthesis.", "qc.", "generator.", "generator_training.")  # keys that a plain segmenter has no use for
_SCORING = ("inference.", "evaluation.")  # keys of an evaluation; a training does not use them
_DIGITS = 16


@dataclass(frozen=True, eq=False)
class Unit:
    """One training or evaluation. key: kind and digest. spec: what its worker is told, plain values. needs: keys of units before it."""

    kind: Kind
    key: str
    title: str
    spec: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Plain values, for ``unit.json``."""
        return {"kind": self.kind, "key": self.key, "title": self.title, "spec": self.spec, "needs": list(self.needs)}


@dataclass(frozen=True)
class Score:
    """Where a figure comes from: an evaluation, and its place in the table. column: task, or task/target."""

    method: str
    column: str
    task: str
    fold: int | None
    repeat: int
    unit: str


@dataclass
class Work:
    """A plan cut up: units by key, in the order in which they are done; the rows that trainings read; where figures come from."""

    units: dict[str, Unit] = field(default_factory=dict)
    rows: dict[str, TrainingRows] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)

    def add(self, unit: Unit) -> Unit:
        """Keep a unit; one of the same key is there already."""
        return self.units.setdefault(unit.key, unit)


def cut(plan: Plan, choice: Choice, stores: Mapping[str, Store], *, leave_out: bool = False) -> Work:
    """All units of the chosen tasks, methods and folds, pairs first: repeat by repeat, fold by fold, task by task, then the methods.

    leave_out: what a store does not hold leaves out the task or method that needs it. Otherwise raises ConfigError there, and where a
    configuration key does not exist or does not fit.
    """
    cutter = _Cutter(plan, stores)
    for repeat in range(plan.repeats):
        for fold in choice.folds:
            for task in choice.tasks:
                for name in choice.methods:
                    try:
                        cutter.add(name, task, fold, repeat)
                    except ConfigError:
                        if not leave_out:
                            raise
    return cutter.work


class _Cutter:
    def __init__(self, plan: Plan, stores: Mapping[str, Store]) -> None:
        self.plan, self.stores, self.work = plan, stores, Work()
        self._known: dict[str, Any] = {}

    def add(self, name: str, task: str, fold: int | None, repeat: int) -> None:
        """What a method, ours or another, has to do for one task, fold and repeat."""
        if name in self.plan.methods and name in self.plan.methods_of(task):
            self._add_method(name, _Place(task, fold, repeat, self.plan))
        elif name in self.plan.external and repeat == 0:
            self._add_predictions(name, _Place(task, fold, repeat, self.plan))

    def _add_method(self, name: str, place: "_Place") -> None:
        """Its trainings, and the evaluations of its model."""
        method = self.plan.methods[name]
        trained = self._trained(name, method, place)
        for target in self._targets(place):
            self._evaluation(name, place, trained, target)

    def _add_predictions(self, name: str, place: "_Place") -> None:
        """The score of label files that the user brings."""
        other = self.plan.external[name]
        if (
            other.predictions is None
            or other.truth is None
            or (other.tasks is not None and place.task not in other.tasks)
        ):
            return
        spec: dict[str, Any] = {
            "predictions": _filled(other.predictions, place),
            "truth": _filled(other.truth, place),
            "preset": self.plan.stores[place.spec.store].preset,
            "keys": {k: v for k, v in self._keys(place, {}).items() if k.startswith("evaluation.")},
        }
        contents = {
            role: self._once(
                f"{role} {spec[role]}", partial(digest_of_labels, Path(spec[role]), is_truth=role == "truth")
            )
            for role in ("predictions", "truth")
        }
        unit = _unit("predictions", f"{name}, {place}", spec, {**spec, **contents})
        self.work.add(unit)
        self.work.scores.append(Score(name, place.task, place.task, place.fold, 0, unit.key))

    def _trained(self, name: str, method: Method, place: "_Place") -> Unit:
        if method.paints == "nothing" and method.init == "scratch":
            return self._segmenter(name, method, place)
        segmenter = None
        if method.needs_segmenter:
            s_name = self.plan.segmenter_of(method)
            segmenter = self._segmenter(s_name, self.plan.methods[s_name], place)
        generator = None
        if method.generator is not None and segmenter is not None:
            generator = self._generator(name, method.generator, segmenter, place)
        student = self._student(name, method, segmenter, generator, place)
        if method.calibrate is not None and segmenter is not None:
            self._calibration(name, method, segmenter, generator, place)
        return student

    def _segmenter(self, name: str, method: Method, place: "_Place") -> Unit:
        settings = self._config("segmenter", method.preset, method.set, place, paints=None)
        return self._training("segmenter", f"S of {name}, {place}", settings, self._rows(place, None), place)

    def _generator(self, name: str, generator: Generator, segmenter: Unit, place: "_Place") -> Unit:
        settings = self._config("generator", generator.preset, generator.set, place, paints="freetumor")
        rows = self._rows(place, generator.unlabelled)
        return self._training("generator", f"G of {name}, {place}", settings, rows, place, {"baseline": segmenter})

    def _student(
        self, name: str, method: Method, segmenter: Unit | None, generator: Unit | None, place: "_Place"
    ) -> Unit:
        settings = self._config("student", method.preset, method.set, place, paints=method.paints)
        parents = {
            "generator": generator,
            "judge": segmenter if method.judge else None,
            "init": segmenter if method.init == "segmenter" else None,
        }
        rows = self._rows(place, method.unlabelled)
        given = {role: unit for role, unit in parents.items() if unit is not None}
        return self._training("student", f"{name}, {place}", settings, rows, place, given)

    def _calibration(self, name: str, method: Method, judge: Unit, generator: Unit | None, place: "_Place") -> None:
        settings = self._config("calibration", method.preset, method.set, place, paints=method.paints)
        rows = self._rows(place, method.unlabelled)
        given = {"judge": judge} | ({} if generator is None else {"generator": generator})
        title = f"judge of {name}, {place}"
        self._training("calibration", title, settings, rows, place, given, num_painted=method.calibrate)

    def _training(
        self,
        kind: Kind,
        title: str,
        settings: "_Settings",
        rows: TrainingRows,
        place: "_Place",
        parents: Mapping[str, Unit] | None = None,
        **more: int | None,
    ) -> Unit:
        """parents: by role. more: what else the unit is told."""
        parents = parents or {}
        spec = {
            "config": settings.config,
            "store": rows.key,
            "fold": place.fold,
            "processes": 1 if kind == "calibration" else self.plan.processes,
            **more,
            **{role: unit.key for role, unit in parents.items()},
        }
        identity = {**spec, "config": settings.decides}
        self.work.rows[rows.key] = rows
        unit = _unit(kind, title, spec, identity, tuple(unit.key for unit in parents.values()))
        return self.work.add(unit)

    def _evaluation(self, name: str, place: "_Place", trained: Unit, target: "_Target") -> None:
        keys = self._keys(place, self.plan.methods[name].set)
        given = {key: value for key, value in keys.items() if key.startswith(_SCORING)}
        spec = {"checkpoint": trained.key, "store": target.store, "cases": target.cases, "keys": given}
        identity = {"checkpoint": trained.key, "cases": target.digest, "keys": given}
        unit = _unit("evaluation", f"{trained.title}, scored on {target.title}", spec, identity, (trained.key,))
        self.work.add(unit)
        self.work.scores.append(Score(name, target.column, place.task, place.fold, place.repeat, unit.key))

    def _config(
        self, kind: Kind, preset: str | None, keys: Mapping[str, Any], place: "_Place", *, paints: str | None
    ) -> "_Settings":
        """The configuration of a stage of a method; the repeat alone decides its seed, and the fold nothing."""
        name = f"settings {kind} {preset} {keys} {place.task} {paints}"
        found: _Settings = self._once(name, lambda: self._settings(kind, preset, keys, place, paints))
        return found.with_seed(100 * (self.plan.seed + place.repeat) + _SEED_OF_KIND[kind])

    def _settings(
        self, kind: Kind, preset: str | None, keys: Mapping[str, Any], place: "_Place", paints: str | None
    ) -> "_Settings":
        region = Config.preset(place.preset).region
        base = Config.preset(preset or place.preset).model_copy(update={"region": region})
        given = self._keys(place, keys)
        if paints in {None, "nothing"}:
            given = {key: value for key, value in given.items() if not key.startswith(_PAINTING)}
        else:
            given["synthesis.synthesizer"] = paints
        try:
            config = base.with_overrides(given)
        except ConfigError as error:
            raise ConfigError(f"plan, {kind} of {place}: {error}") from error
        return _Settings(config.model_dump(mode="json"), _decides(config, kind))

    def _keys(self, place: "_Place", keys: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.plan.set, **place.spec.set, **keys}

    def _rows(self, place: "_Place", unlabelled: Unlabelled | None) -> TrainingRows:
        def find() -> TrainingRows:
            store, where = self.stores[place.spec.store], f"tasks.{place.task}"
            more = None if unlabelled is None else unlabelled_rows(store, place.spec, unlabelled, where)
            return training_rows(self.plan, place.task, store, self._annotated(place.task), more)

        return self._once(f"rows {place.task} {unlabelled}", find)

    def _annotated(self, task: str) -> NDArray[np.int64]:
        spec = self.plan.tasks[task]
        return self._once(f"annotated {task}", lambda: rows_of(self.stores[spec.store], spec, f"tasks.{task}"))

    def _targets(self, place: "_Place") -> Iterator["_Target"]:
        if place.fold is not None:
            yield self._once(f"own {place.task} {place.fold}", lambda: self._held_out(place))
        elif place.spec.test_split is not None:
            own = place.spec.model_copy(update={"split": place.spec.test_split, "test_split": None})
            yield self._once(f"own {place.task}", partial(self._scored, place.task, place.task, own))
        for name in place.spec.targets:
            column, target = f"{place.task}/{name}", self.plan.targets[name]
            yield self._once(f"target {column}", partial(self._scored, column, name, target))

    def _held_out(self, place: "_Place") -> "_Target":
        store, rows = self.stores[place.spec.store], self._annotated(place.task)
        folds = folds_of(self.plan, store, rows, f"tasks.{place.task}")
        return _target(place.task, f"fold {place.fold}", place.spec.store, store, rows[folds == place.fold])

    def _scored(self, column: str, name: str, spec: Volumes) -> "_Target":
        store = self.stores[spec.store]
        return _target(column, name, spec.store, store, rows_of(store, spec, f"targets.{name}"))

    def _once(self, name: str, find: Any) -> Any:
        if name not in self._known:
            self._known[name] = find()
        return self._known[name]


@dataclass(frozen=True)
class _Settings:
    """A configuration as plain values, and those of its keys that decide a unit's result and are not at their defaults."""

    config: dict[str, Any]
    decides: dict[str, Any]

    def with_seed(self, seed: int) -> "_Settings":
        """The same with this seed."""
        return _Settings({**self.config, "seed": seed}, {**self.decides, "seed": seed})


@dataclass(frozen=True)
class _Place:
    """A task, the fold that is held out, and the repeat."""

    task: str
    fold: int | None
    repeat: int
    plan: Plan

    @property
    def spec(self) -> Task:
        return self.plan.tasks[self.task]

    @cached_property
    def preset(self) -> str:
        return self.spec.preset or self.plan.stores[self.spec.store].preset

    def __str__(self) -> str:
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.task}{fold}" + (f", repeat {self.repeat}" if self.plan.repeats > 1 else "")


@dataclass(frozen=True)
class _Target:
    column: str
    title: str
    store: str
    cases: list[str]
    digest: str


def _target(column: str, title: str, store_name: str, store: Store, rows: NDArray[np.int64]) -> _Target:
    cases: list[str] = store.column("case").take(pa.array(rows)).to_pylist()
    return _Target(column, title, store_name, cases, digest_of(store, rows))


def _decides(config: Config, kind: Kind) -> dict[str, Any]:
    """Keys of a configuration that decide a unit's result and are not at their defaults."""
    keys = deciding_keys(config, "generator" if kind == "generator" else "segmenter")
    plain = deciding_keys(Config(region=config.region), "generator" if kind == "generator" else "segmenter")
    decides = {key: value for key, value in keys.items() if value != plain.get(key) or key.startswith("region.")}
    if kind == "segmenter":
        decides = {key: value for key, value in decides.items() if not key.startswith(_PAINTING)}
    return decides


def _unit(
    kind: Kind, title: str, spec: Mapping[str, Any], identity: Mapping[str, Any], needs: Sequence[str] = ()
) -> Unit:
    digest = hashlib.sha256(json.dumps([kind, identity], sort_keys=True).encode()).hexdigest()
    return Unit(kind, f"{kind}-{digest[:_DIGITS]}", title, spec, tuple(needs))


def _filled(pattern: str, place: _Place) -> str:
    fold = "" if place.fold is None else str(place.fold)
    return pattern.replace("{task}", place.task).replace("{fold}", fold)
