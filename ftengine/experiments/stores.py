"""The stores of a plan: where they lie, which of their volumes a task has, and the light stores that trainings read.

A training reads one store, in which each of its volumes stands once: the task's annotated volumes with their folds, and the unlabelled
ones in no fold, so that they are never held out. It is a subset (``store.subset``): rows, and the way to the voxels.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from ftengine.assemble import check_region
from ftengine.config import Config
from ftengine.datasets.registry import Registry, load_registry, plain_name
from ftengine.datasets.subsets import get_subset
from ftengine.errors import ConfigError, StoreError
from ftengine.experiments.folder import only_one
from ftengine.experiments.plan import Phantoms, Plan, StoreNeed, Task, Unlabelled, Volumes
from ftengine.files import write_text_whole
from ftengine.store.case import ConvertOptions
from ftengine.store.convert import convert_cases
from ftengine.store.folds import NO_FOLD, assign_folds
from ftengine.store.location import locate
from ftengine.store.reader import Store, open_store
from ftengine.store.subset import write_subset
from ftengine.volume.discover import discover
from ftengine.volume.phantom import LABELS, TumorSpec, write_phantom_dataset

PATHS = "stores.yaml"  # in the experiment's folder: what was given for each store
_SUBSETS = "stores"
# what makes a row's voxels and labels
_CONTENT = (
    "case",
    "dataset",
    "annotation",
    "source_sha256",
    "label_sha256",
    "organ_label_sha256",
    "label_provenance",
    "conversion",
)


@dataclass(frozen=True)
class TrainingRows:
    """Rows of a store that a training reads, and the fold of each. key: a digest of what they hold, whatever the store's place."""

    store: str
    rows: NDArray[np.int64]
    folds: NDArray[np.int8]
    key: str


def read_paths(file: Path) -> dict[str, str]:
    """Store name -> path, from YAML; paths are relative to the file. Raises ConfigError."""
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); want YAML like 'liver: /data/liver.zarr'."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise ConfigError(f"{file}: want a mapping of names to paths, like 'liver: /data/liver.zarr'.")
    return {str(name): path if "://" in path else str(file.parent / path) for name, path in given.items()}


def parse_stores(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` of the command line. Raises ConfigError."""
    paths = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or not name or not path:
            raise ConfigError(f"--store {text}: want NAME=PATH, e.g. --store liver=/data/liver.zarr")
        paths[name] = path
    return paths


def find_stores(plan: Plan, tasks: Sequence[str], folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Where the stores lie that these tasks need: given, else of an earlier call in this folder, else of the plan. Drawn ones are in the folder.

    Raises ConfigError naming every store that is missing, the tasks that need it, and where its data sets come from.
    """
    unknown = sorted(set(given) - set(plan.stores))
    if unknown:
        raise ConfigError(f"--store {unknown[0]}: the plan has the stores {', '.join(plan.stores)}.")
    known, users = known_stores(plan, folder, given), _users(plan, tasks)
    missing = [_missing(plan, name, plan.stores[name], users[name]) for name in users if name not in known]
    if missing:
        raise ConfigError("\n".join(missing))
    return {name: known[name] for name in users}


def known_stores(plan: Plan, folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The path of each store that has one."""
    before = read_paths(folder / PATHS) if (folder / PATHS).is_file() else {}
    known = {}
    for name, need in plan.stores.items():
        path = given.get(name)
        if path is None:
            path = str(phantom_store(folder, name)) if need.phantoms is not None else before.get(name) or need.path
        if path is not None:
            known[name] = path if "://" in path else str(Path(path).resolve())
    return known


def tasks_with_stores(plan: Plan, known: Mapping[str, str]) -> list[str]:
    """The tasks all of whose stores have a path."""
    return [name for name in plan.tasks if all(store in known for store in _users(plan, [name]))]


def keep_paths(folder: Path, paths: Mapping[str, str]) -> None:
    """Write down where stores lie, so that the next call need not be told."""
    file = folder / PATHS
    before = read_paths(file) if file.is_file() else {}
    write_text_whole(file, yaml.safe_dump({**before, **paths}, sort_keys=True))


def open_stores(plan: Plan, paths: Mapping[str, str]) -> dict[str, Store]:
    """The stores by name. Raises ConfigError where one was converted for another region, StoreError where one cannot be read."""
    stores = {}
    for name, path in paths.items():
        store = open_store(path)
        check_region(Config.preset(plan.stores[name].preset), store)
        stores[name] = store
    return stores


def phantom_store(folder: Path, name: str) -> Path:
    """Where a store that is drawn lies."""
    return folder / _SUBSETS / f"{name}.zarr"


def draw_phantoms(plan: Plan, folder: Path, paths: Mapping[str, str], scratch: Path | None = None) -> dict[str, str]:
    """The paths, once the phantoms that the experiment draws itself are there. scratch: where to draw what is not, in place of ``folder``.

    What another plan has drawn in the same place is drawn anew. Raises ConfigError where another process runs the experiment.
    """
    missing = [
        name
        for name, path in paths.items()
        if path == str(phantom_store(folder, name)) and not _is_drawn(plan.stores[name], Path(path))
    ]
    if not missing:
        return dict(paths)
    root = folder if scratch is None else scratch
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root):
        for name in missing:
            _draw_anew(plan.stores[name], phantom_store(root, name))
    return {**paths, **{name: str(phantom_store(root, name)) for name in missing}}


def _is_drawn(need: StoreNeed, place: Path) -> bool:
    """Whether a store is whole and as the plan wants it; one that the experiment does not draw is."""
    file = _drawn_file(place)
    return need.phantoms is None or (file.is_file() and file.read_text(encoding="utf-8") == _digest_of_phantoms(need))


def _drawn_file(place: Path) -> Path:
    """Beside a drawn store: a digest of what was drawn; written last."""
    return place.with_suffix(".drawn")


def _digest_of_phantoms(need: StoreNeed) -> str:
    return hashlib.sha256(json.dumps(need.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _draw_anew(need: StoreNeed, place: Path) -> None:
    """Draw a store, in place of what is there, unless another process has just done so."""
    if need.phantoms is None or _is_drawn(need, place):
        return
    _drawn_file(place).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    _draw(need, need.phantoms, place)
    write_text_whole(_drawn_file(place), _digest_of_phantoms(need))


def _draw(need: StoreNeed, phantoms: Phantoms, place: Path) -> None:
    region = Config.preset(need.preset).region
    family = "chest" if "lung" in region.labels else "abdomen"
    label_map = tuple((value, region.labels.get(name, 0)) for name, value in LABELS[family].items())
    scratch = place.with_suffix(".phantoms")
    shutil.rmtree(scratch, ignore_errors=True)
    for name, drawn in phantoms.sets.items():
        write_phantom_dataset(
            scratch / name,
            region=family,
            num_volumes=drawn.num_volumes,
            seed=phantoms.seed,
            num_with_tumors=drawn.num_ill,
            annotate_tumors=drawn.annotation == "tumor",
            tumors=TumorSpec(
                diameter_mm=phantoms.diameter_mm,
                organs=tuple(region.organs),
                contrast_factor=phantoms.contrast_factor,
            ),
            first_case=drawn.first_case,
            scanners=drawn.scanners,
            shape_zyx=phantoms.shape_zyx,
            spacing_mm_zyx=phantoms.spacing_mm_zyx,
        )
        options = ConvertOptions(annotation=drawn.annotation, split=drawn.split, label_map=label_map)
        report = convert_cases(discover([scratch / name], dataset=name), place, region, options=options)
        if report.exit_code:
            raise ConfigError(
                f"{place}: phantoms did not convert: {[o.reason for o in report.outcomes if o.reason]}. Run again."
            )
    shutil.rmtree(scratch)


def rows_of(store: Store, volumes: Volumes, where: str) -> NDArray[np.int64]:
    """Rows with annotated tumours. Raises ConfigError where a data set is not in the store or has none."""
    table = store.select(["dataset", "annotation", "split"])
    names = np.array(table.column("dataset").to_pylist(), dtype=str)
    used = np.array(table.column("annotation").to_pylist(), dtype=str) == "tumor"
    if volumes.split is not None:
        used &= np.array(table.column("split").to_pylist(), dtype=str) == volumes.split
    registry, own = _registry(), set(names.tolist())
    chosen = np.zeros(len(names), dtype=bool)
    for dataset in volumes.datasets:
        here = used & np.isin(names, _own_names(own, dataset, registry))
        if not here.any():
            split = "" if volumes.split is None else f" in split {volumes.split!r}"
            raise ConfigError(
                f"{where}: {store.location} holds no volume of {dataset} with annotated tumours{split} (data sets there: "
                f"{', '.join(sorted(own)) or 'none'}). {source_of(dataset)}"
            )
        chosen |= here
    return np.flatnonzero(chosen)


def unlabelled_rows(store: Store, task: Task, unlabelled: Unlabelled, where: str) -> NDArray[np.int64]:
    """Rows of the unlabelled volumes of a task. Raises ConfigError where a data set asked for by name is not there, or nothing is left."""
    table = store.select(["dataset", "annotation"])
    names = np.array(table.column("dataset").to_pylist(), dtype=str)
    registry, own = _registry(), set(names.tolist())
    wanted = {name for scale in unlabelled.scales_of(store.region) for name in get_subset(scale).volumes}
    taken = {name for name in own if (entry := registry.find(name)) is not None and entry.name in wanted}
    for dataset in unlabelled.datasets:
        found = _own_names(own, dataset, registry)
        if not found:
            raise ConfigError(
                f"{where}: {store.location} holds no volume of {dataset} (data sets there: {', '.join(sorted(own))}). {source_of(dataset)}"
            )
        taken |= set(found)
    taken -= {name for dataset in task.datasets for name in _own_names(own, dataset, registry)}
    used = np.isin(names, sorted(taken)) & np.isin(table.column("annotation").to_pylist(), unlabelled.annotations)
    if not used.any():
        what = ", ".join((*unlabelled.scales_of(store.region), *unlabelled.datasets)) or f"none for the {store.region}"
        raise ConfigError(
            f"{where}: {store.location} holds no unlabelled volume ({what}; annotation {' or '.join(unlabelled.annotations)}). "
            "Convert some with organ labels ('ftengine organs' makes them), or leave the method out with --method."
        )
    return np.flatnonzero(used)


def training_rows(
    plan: Plan, task_name: str, store: Store, annotated: NDArray[np.int64], unlabelled: NDArray[np.int64] | None
) -> TrainingRows:
    """What a training of a task reads: its annotated rows in their folds, then the unlabelled ones in none."""
    task = plan.tasks[task_name]
    folds = folds_of(plan, store, annotated, f"tasks.{task_name}")
    rows = annotated
    if unlabelled is not None:
        rows = np.concatenate([annotated, unlabelled])
        folds = np.concatenate([folds, np.full(len(unlabelled), NO_FOLD, dtype=np.int8)])
    order = np.argsort(rows, kind="stable")
    rows, folds = rows[order], folds[order]
    return TrainingRows(task.store, rows, folds, digest_of(store, rows, folds.tolist()))


def folds_of(plan: Plan, store: Store, rows: NDArray[np.int64], where: str) -> NDArray[np.int8]:
    """The fold of each annotated row, -1 for all where the plan has no folds. Raises ConfigError for an empty fold."""
    if plan.folds is None:
        return np.full(len(rows), NO_FOLD, dtype=np.int8)
    if plan.folds.dealt == "store":
        folds: NDArray[np.int8] = store.column("fold").to_numpy()[rows].astype(np.int8)
    else:
        table = store.select(["case", "dataset", "annotation"]).take(pa.array(rows))
        folds = assign_folds(
            *(table.column(n).to_pylist() for n in ("case", "dataset", "annotation")),
            num_folds=plan.folds.number,
            seed=plan.folds.seed,
        )
    empty = sorted(set(range(plan.folds.number)) - set(folds.tolist()))
    if empty:
        raise ConfigError(
            f"{where}: {len(rows)} annotated volumes leave fold {empty[0]} of {plan.folds.number} empty. Lower folds.number"
            f"{', or deal the folds here (folds.dealt: here)' if plan.folds.dealt == 'store' else ''}."
        )
    return folds


def digest_of(store: Store, rows: NDArray[np.int64], more: Sequence[Any] = ()) -> str:
    """A digest of what rows hold: names, files, labels, how they were converted; the place of the store does not count."""
    table = store.select(list(_CONTENT)).take(pa.array(rows))
    columns = {name: table.column(name).to_pylist() for name in _CONTENT}
    return hashlib.sha256(json.dumps([columns, list(more)], sort_keys=True).encode()).hexdigest()


def subset_path(folder: Path, key: str) -> Path:
    """Where the light store of a training lies."""
    return folder / _SUBSETS / f"{key[:16]}.zarr"


def make_subset(folder: Path, store: Store, chosen: TrainingRows) -> None:
    """Write the light store of a training, once; it is written anew where its store has moved."""
    path = subset_path(folder, chosen.key)
    place = locate(path)
    if path.exists():
        if _leads_to(path, store):
            return
        shutil.rmtree(path)
    table = store.index.take(pa.array(chosen.rows))
    table = table.set_column(table.column_names.index("fold"), "fold", pa.array(chosen.folds, pa.int8()))
    write_subset(store, place, table)


def _leads_to(path: Path, store: Store) -> bool:
    """Whether a subset is whole and its voxels are those of the store."""
    try:
        place = locate(path)
        return open_store(path).volumes.seen_from(place) == store.volumes.seen_from(place)
    except StoreError:
        return False


def overlap_notes(plan: Plan, tasks: Sequence[str]) -> list[str]:
    """What the registry says of targets that share volumes with what a task is trained on."""
    registry = _registry()
    pairs = (
        (f"{name} to {target}", trained, scored)
        for name in tasks
        for target in plan.tasks[name].targets
        for trained in plan.tasks[name].datasets
        for scored in plan.targets[target].datasets
    )
    return [f"{which}: {text}" for which, a, b in pairs if (text := _overlap(registry, a, b))]


def source_of(dataset: str) -> str:
    """Where a data set comes from, a sentence."""
    entry = _registry().find(dataset)
    if entry is None:
        return f"{dataset} is not in the registry ('ftengine datasets list')."
    link = f": {entry.link}" if entry.link else ""
    licence = f" ({entry.licence})" if entry.licence else ""
    return f"{entry.title} is published{link}{licence}; 'ftengine datasets show {entry.name}' says more."


def _users(plan: Plan, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Store -> tasks that need it, to train or to score."""
    users: dict[str, list[str]] = {}
    for name in tasks:
        task = plan.tasks[name]
        for store in dict.fromkeys((task.store, *(plan.targets[t].store for t in task.targets))):
            users.setdefault(store, []).append(name)
    return users


def _missing(plan: Plan, name: str, need: StoreNeed, users: Sequence[str]) -> str:
    datasets = [d for u in users for d in plan.tasks[u].datasets if plan.tasks[u].store == name]
    datasets += [
        d
        for u in users
        for t in plan.tasks[u].targets
        if plan.targets[t].store == name
        for d in plan.targets[t].datasets
    ]
    lines = [f"  {d}: {source_of(d)}" for d in dict.fromkeys(datasets)]
    trained = [u for u in users if plan.tasks[u].store == name]
    methods = [m for m in plan.methods.values() if m.tasks is None or set(m.tasks) & set(trained)]
    scales = {s for m in methods if m.unlabelled is not None for s in m.unlabelled.scales_of(need.preset)}
    if trained and scales:
        lines.append(
            f"  for methods that paint, unlabelled volumes of the scale {', '.join(sorted(scales))} (Table A11)"
        )
    sources = "\n".join(lines)
    return (
        f"store {name!r}: no path is known; the tasks {', '.join(users)} need it: a store of the region {need.preset} "
        f"('ftengine convert ... --region {need.preset}'). Give --store {name}=PATH, or run other tasks with --task. It holds at least\n{sources}"
    )


@cache
def _registry() -> Registry:
    """The shipped registry, read once."""
    return load_registry()


def _own_names(own: set[str], dataset: str, registry: Registry) -> list[str]:
    """The store's own names for a data set."""
    entry = registry.find(dataset)
    return sorted(
        name
        for name in own
        if plain_name(name) == plain_name(dataset) or (entry is not None and registry.find(name) is entry)
    )


def _overlap(registry: Registry, one: str, other: str) -> str | None:
    first, second = registry.find(one), registry.find(other)
    if first is None or second is None:
        return None
    return registry.overlaps(first.name).get(second.name)
