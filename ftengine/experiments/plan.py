"""A plan: which stores, tasks, folds and methods an experiment has. A YAML file, validated as a whole; docs/experiments.md has an example.

============  ==================================================================================================================
store         where volumes lie, and the preset whose grid and labels they have; the path is given when the plan is run
task          what a model learns: the tumours of some data sets of one store
target        other volumes of a store, on which models of a task are only scored (out of domain)
method        how a model is trained: nothing painted (baseline), or a synthesiser with or without generator, judge, unlabelled volumes
external      a method that we do not train: said so, or scored by predictions that the user brings
============  ==================================================================================================================
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ftengine.config import Config, preset_names
from ftengine.datasets.subsets import get_subset
from ftengine.errors import ConfigError
from ftengine.store.folds import MAX_FOLDS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Keys = dict[str, Any]  # dotted configuration keys
Measure = Literal[
    "dice",
    "surface_dice",
    "hd95_mm",
    "sensitivity",
    "specificity",
    "f1",
    "lesion_sensitivity",
    "small_sensitivity",
]
Painter = Literal["nothing", "freetumor", "constant", "copy-paste", "syntumor"]
_PACKAGE = "ftengine.experiments"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhantomSet(_Model):
    """Phantoms of one data set: ``num_ill`` of ``num_volumes`` hold tumours. annotation: what is known of them."""

    num_volumes: int = Field(ge=1)
    num_ill: int = Field(ge=0)
    annotation: Literal["tumor", "organ"] = "tumor"
    split: str = ""
    first_case: int = Field(ge=0)
    scanners: tuple[int, ...] | None = None


class Phantoms(_Model):
    """A store that the experiment draws itself; data sets by name. diameter_mm, contrast_factor: of the tumours."""

    sets: dict[Name, PhantomSet] = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    shape_zyx: tuple[int, int, int]
    spacing_mm_zyx: tuple[float, float, float]
    diameter_mm: tuple[float, float] = (14.0, 36.0)
    contrast_factor: float = Field(default=1.0, gt=0)


class StoreNeed(_Model):
    """A store that the plan needs. preset: whose region it was converted for. phantoms: drawn, so that no path is needed."""

    preset: str
    path: str | None = None  # relative to the plan's file; --store NAME=PATH and --stores FILE go before it
    phantoms: Phantoms | None = None

    @model_validator(mode="after")
    def _preset_exists(self) -> Self:
        _check_preset("preset", self.preset)
        if self.path is not None and self.phantoms is not None:
            raise ValueError("path and phantoms: a store is there or is drawn; give one of them")
        return self


class Volumes(_Model):
    """Volumes of a store: data sets by their names there or in the registry; of one split where it is named."""

    title: str = ""
    store: Name
    datasets: tuple[str, ...] = Field(min_length=1)
    split: str | None = None


class Task(Volumes):
    """What a model learns. Of these volumes those with annotated tumours are trained on and dealt into folds.

    tumors: classes that are scored (default: all of the region). test_split: scored in place of folds. targets: names of the plan's targets.
    preset: in place of the store's, for a region of the same grid and labels. set: configuration keys of all models of the task.
    """

    tumors: tuple[str, ...] = ()
    test_split: str | None = None
    targets: tuple[Name, ...] = ()
    preset: str | None = None
    set: Keys = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.preset is not None:
            _check_preset("preset", self.preset)
        if self.test_split is not None and self.split in {None, self.test_split}:
            raise ValueError(
                f"test_split={self.test_split!r} with split={self.split!r}: the test volumes would be trained on; give split another one"
            )
        return self


class Unlabelled(_Model):
    """Volumes whose tumours nobody annotated, on which tumours are painted. All of the task's store.

    scales: of Table A11; of each store those of its region count. datasets: more of them. annotations: kinds of rows that are taken; with
    ``tumor``, volumes of other data sets are trained on with their annotated tumours. The task's own data sets are never among them.
    """

    scales: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    annotations: tuple[Literal["organ", "tumor"], ...] = ("organ",)

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.scales and not self.datasets:
            raise ValueError("want scales or datasets")
        for scale in self.scales:
            _as_value_error(get_subset, scale)
        return self

    def scales_of(self, region: str) -> tuple[str, ...]:
        """The scales for a region: ``abdomen-liver`` and the other specialists count as the abdomen."""
        return tuple(s for s in self.scales if get_subset(s).region == region.split("-", maxsplit=1)[0])


class Generator(_Model):
    """How the generator of a method is trained. unlabelled: as the method's, but may differ. preset, set: of this stage alone."""

    unlabelled: Unlabelled | None = None
    preset: str | None = None
    set: Keys = {}

    @model_validator(mode="after")
    def _preset_exists(self) -> Self:
        if self.preset is not None:
            _check_preset("preset", self.preset)
        return self


class Method(_Model):
    """How a model is trained.

    paints: the synthesiser; ``nothing`` is a plain segmenter. judge: quality control by S. segmenter: the method whose model is S, which
    judges, which G must convince, and from which a model starts with ``init: segmenter`` (default: the plan's baseline). calibrate: also
    measure what S makes of the real tumours of the held-out fold, and of so many painted ones. tasks: where the method applies (default: everywhere). preset: configuration in place of
    the task's, except for the region. set: configuration keys of the model, not of S and G.
    """

    title: str = ""
    paints: Painter = "nothing"
    judge: bool = False
    segmenter: Name | None = None
    init: Literal["scratch", "segmenter"] = "scratch"
    unlabelled: Unlabelled | None = None
    generator: Generator | None = None
    calibrate: Annotated[int, Field(ge=1)] | None = None
    tasks: tuple[Name, ...] | None = None
    preset: str | None = None
    set: Keys = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.preset is not None:
            _check_preset("preset", self.preset)
        if (self.generator is None) == (self.paints == "freetumor"):
            raise ValueError(
                f"paints={self.paints!r} {'without' if self.generator is None else 'with'} generator: freetumor alone has one"
            )
        if self.paints == "nothing" and (self.judge or self.unlabelled is not None or self.calibrate):
            raise ValueError("paints='nothing' with judge, unlabelled or calibrate: they are for methods that paint")
        if self.calibrate and not self.judge:
            raise ValueError("calibrate without judge: it measures the judge")
        if "synthesis.synthesizer" in self.set:
            raise ValueError("set.synthesis.synthesizer: say it with paints")
        return self

    @property
    def needs_segmenter(self) -> bool:
        """Whether it cannot be trained without S."""
        return self.judge or self.generator is not None or self.init == "segmenter"


class External(_Model):
    """A method that we do not train. note: why; the paper's figures stand in the paper's table.

    predictions, truth: folders of label files that the user brings, with ``{task}`` and ``{fold}`` in them where they differ; scored as
    ``ftengine evaluate`` does. They are of the task's own volumes, held out by folds or ``test_split``; those of targets cannot be brought.
    """

    title: str = ""
    note: str
    predictions: str | None = None
    truth: str | None = None
    tasks: tuple[Name, ...] | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if (self.predictions is None) != (self.truth is None):
            raise ValueError("predictions and truth: want both or none")
        return self


class Folds(_Model):
    """dealt: ``here`` deals the annotated volumes of each task by ``seed`` (``store.folds``); ``store`` takes the store's own folds."""

    number: int = Field(default=5, ge=2, le=MAX_FOLDS)
    seed: int = Field(default=0, ge=0)
    dealt: Literal["here", "store"] = "here"


class Plan(_Model):
    """The whole plan.

    folds: None trains on all volumes of a task, once a repeat. repeats: times that everything is trained, with other seeds. measures: a table
    each. columns: table columns that pool several tasks, title -> tasks (default: one a task). baseline: the method that the others are tested
    against. processes: of one training, by torchrun. set: configuration keys of all trainings. paper: the paper's table whose figures stand beside.
    """

    title: str
    stores: dict[Name, StoreNeed] = Field(min_length=1)
    tasks: dict[Name, Task] = Field(min_length=1)
    targets: dict[Name, Volumes] = {}
    methods: dict[Name, Method] = Field(min_length=1)
    external: dict[Name, External] = {}
    baseline: Name
    folds: Folds | None = None
    repeats: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=10**6)
    measures: tuple[Measure, ...] = ("dice",)
    columns: dict[str, tuple[Name, ...]] = {}
    spread: Literal["range", "deviation"] = "range"
    processes: int = Field(default=1, ge=1)
    set: Keys = {}
    paper: str | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for where, name, known in self._mentions():
            if name not in known:
                raise ValueError(f"{where}={name!r}: {_no_such(name, known)}")
        for name, method in self.methods.items():
            self._check_segmenter(name, method)
        for name, task in self.tasks.items():
            labels = Config.preset(self.stores[task.store].preset).region.labels
            for tumor in task.tumors:
                if tumor not in labels:
                    raise ValueError(f"tasks.{name}.tumors={tumor!r}: {_no_such(tumor, labels)}")
            if self.folds is None and task.test_split is None and not task.targets:
                raise ValueError(f"tasks.{name}: nothing to score its models on; give folds, test_split or targets")
        for name, method in self.methods.items():
            if method.calibrate and self.folds is None:
                raise ValueError(f"methods.{name}.calibrate without folds: there are no held-out tumours to judge")
        for name, other in self.external.items():
            self._check_predictions(name, other)
        titles = [title for _, title in self.rows()]
        if len(set(titles)) != len(titles):
            raise ValueError(f"methods, external: two of them have one title ({', '.join(sorted(titles))})")
        if self.paper is not None:
            from ftengine.experiments.figures import paper_tables

            if self.paper not in paper_tables():
                raise ValueError(f"paper={self.paper!r}: {_no_such(self.paper, paper_tables())}")
        return self

    def rows(self) -> list[tuple[str, str]]:
        """(name, title) of all methods of ours and others."""
        ours = [(name, method.title or name) for name, method in self.methods.items()]
        return ours + [(name, other.title or name) for name, other in self.external.items()]

    def segmenter_of(self, method: Method) -> str:
        """The name of the method whose model is S."""
        return method.segmenter or self.baseline

    def methods_of(self, task: str) -> list[str]:
        """The methods of ours that apply to a task."""
        return [name for name, m in self.methods.items() if m.tasks is None or task in m.tasks]

    def _mentions(self) -> Iterator[tuple[str, str, Iterable[str]]]:
        yield "baseline", self.baseline, self.methods
        for name, task in self.tasks.items():
            yield f"tasks.{name}.store", task.store, self.stores
            yield from ((f"tasks.{name}.targets", target, self.targets) for target in task.targets)
        for name, target in self.targets.items():
            yield f"targets.{name}.store", target.store, self.stores
        for name, method in self.methods.items():
            yield from ((f"methods.{name}.tasks", task, self.tasks) for task in method.tasks or ())
            if method.segmenter is not None:
                yield f"methods.{name}.segmenter", method.segmenter, self.methods
        for name, other in self.external.items():
            yield from ((f"external.{name}.tasks", task, self.tasks) for task in other.tasks or ())
        for title, tasks in self.columns.items():
            yield from ((f"columns.{title}", task, self.tasks) for task in tasks)

    def _check_segmenter(self, name: str, method: Method) -> None:
        if not method.needs_segmenter:
            return
        s = self.methods[self.segmenter_of(method)]
        if s.paints != "nothing" or s.init != "scratch":
            raise ValueError(
                f"methods.{name}: its S is {self.segmenter_of(method)!r}, which paints or starts from an S itself; want one with paints: nothing"
            )
        if s.tasks is not None and not set(method.tasks or self.tasks) <= set(s.tasks):
            raise ValueError(f"methods.{name}: its S {self.segmenter_of(method)!r} is not trained for all of its tasks")

    def _check_predictions(self, name: str, other: External) -> None:
        """Predictions are those of a task's own volumes: without folds and test_split none of them is scored."""
        for task in (other.tasks or self.tasks) if other.predictions is not None and self.folds is None else ():
            if self.tasks[task].test_split is None:
                raise ValueError(
                    f"external.{name}.predictions: without folds tasks.{task} is scored on its targets alone, and predictions on targets "
                    "cannot be brought; leave predictions and truth out, give folds or test_split, or name other tasks"
                )


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files(_PACKAGE).joinpath("plans").iterdir()
        if p.name.endswith(".yaml")
    )


def shipped_plan(name: str) -> str:
    """The YAML of a shipped plan."""
    return resources.files(_PACKAGE).joinpath("plans", f"{name}.yaml").read_text(encoding="utf-8")


def load_plan(plan: str | Path) -> Plan:
    """A plan from its file, or a shipped one by name. Raises ConfigError naming file and field, one line a problem."""
    path = Path(plan)
    if str(plan) in plan_names():
        return parse_plan(shipped_plan(str(plan)), where=f"plan {plan}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{plan}: cannot be read ({error.strerror}); want a YAML file, or a shipped plan: {', '.join(plan_names())}."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{plan}: is not UTF-8 text; want a plan in YAML.") from error
    return _beside(parse_plan(text, where=str(plan)), path.parent)


def parse_plan(text: str, *, where: str) -> Plan:
    """A plan from YAML. Raises ConfigError, also for a configuration key that does not exist or has a wrong value."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: want a mapping with title, stores, tasks, methods and baseline.")
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(error))) from error
    return plan


def _beside(plan: Plan, folder: Path) -> Plan:
    """Paths of stores, and of what others predicted, are relative to the plan's file."""
    stores = {
        name: need
        if need.path is None or "://" in need.path
        else need.model_copy(update={"path": str(folder / need.path)})
        for name, need in plan.stores.items()
    }
    external = {
        name: other.model_copy(
            update={
                role: str(folder.absolute() / Path(path).expanduser())
                for role, path in (("predictions", other.predictions), ("truth", other.truth))
                if path is not None
            }
        )
        for name, other in plan.external.items()
    }
    return plan.model_copy(update={"stores": stores, "external": external})


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            yield f"{key}: there is no such key here"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            yield f"{key}: {text}" if key else text


def _check_preset(key: str, name: str) -> None:
    if name not in preset_names():
        raise ValueError(f"{key}={name!r}: {_no_such(name, preset_names())}")


def _as_value_error(check: Any, value: str) -> None:
    try:
        check(value)
    except ConfigError as error:
        raise ValueError(str(error).replace("--subset ", "scale ")) from error


def _no_such(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"there is no such name here{f', did you mean {near[0]}?' if near else ''}; want one of {', '.join(names) or '(none)'}"


@dataclass(frozen=True)
class Choice:
    """What of a plan is asked for. methods: ours and external ones."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    folds: tuple[int | None, ...]


def choose(plan: Plan, *, tasks: Sequence[str] = (), methods: Sequence[str] = (), folds: Sequence[int] = ()) -> Choice:
    """Tasks, methods and folds by name; nothing named means all. Raises ConfigError for one that the plan does not have."""
    every = (*plan.methods, *plan.external)
    for option, names, known in (("--task", tasks, plan.tasks), ("--method", methods, every)):
        for name in names:
            if name not in known:
                raise ConfigError(f"{option} {name}: {_no_such(name, known)}.")
    for fold in folds:
        if fold not in fold_numbers(plan):
            there = "no folds" if plan.folds is None else f"folds 0 to {plan.folds.number - 1}"
            raise ConfigError(f"--fold {fold}: the plan has {there}.")
    return Choice(tuple(tasks) or tuple(plan.tasks), tuple(methods) or every, tuple(folds) or fold_numbers(plan))


def fold_numbers(plan: Plan) -> tuple[int | None, ...]:
    """The folds to hold out; None alone where the plan has none."""
    return (None,) if plan.folds is None else tuple(range(plan.folds.number))
