"""``--resume``: what may differ between the parts of a run, what is refused, and what is written down of it.

Everything that decides the losses is compared with what the run began with: the configuration, the files and options of the command
line, and the data. Each difference has a name, and ``--allow NAME`` permits it. Keys that only decide how fast a run goes, how often it
logs or saves, and those of the other training stage, may always change.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftengine import __version__
from ftengine.config import Config, LoaderConfig
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.training.checkpoint import SECTION, Kind, config_inside

STORE, PROCESSES = "store", "processes"  # names of what differs but has no key
_FREE_KEYS = (
    "device",
    "tracking",
    "inference",
    "evaluation",
    *(f"loader.{name}" for name in LoaderConfig.SPEED_ONLY),
    "training.validate_every",
    "training.validate_unit",
    "generator_training.pictures_every",
    "generator_training.num_pictures",
    *(f"{part}.{name}" for part in SECTION.values() for name in ("log_every", "checkpoint_every", "keep_checkpoints")),
)


@dataclass(frozen=True)
class Change:
    """One difference: a configuration key, an option of the command line without its dashes, ``store`` or ``processes``."""

    name: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.name}: was {self.was}, is {self.now}"


def check_changes(
    path: Path,
    document: Mapping[str, Any],
    *,
    kind: Kind,
    config: Config,
    loader: Loader,
    identity: Mapping[str, str],
    allow: Collection[str] = (),
) -> tuple[Change, ...]:
    """All differences between the run in ``document`` and the one that would go on; ConfigError listing those not allowed.

    path: of the checkpoint. identity: options and files that decide the result, by option. allow: names, or prefixes of keys
    (``augment``), or ``all``. Called before anything of the run is changed.
    """
    saved = config_inside(path, document)
    changes = [
        *_config_changes(saved, config, kind),
        *_identity_changes(document["identity"], identity),
    ]
    changes += _data_changes(document["loader"]["plan"], loader.plan.fingerprint(), changes)
    refused = [change for change in changes if not _is_allowed(change.name, allow)]
    if refused:
        permit = " ".join(f"--allow {change.name}" for change in refused)
        raise ConfigError(
            f"{path.parent}: --resume would go on with another run than the one that began ({'; '.join(map(str, refused))}). Give what it began "
            f"with, start a new run with another --out, or permit the change: {permit}"
        )
    return tuple(changes)


def loader_state(document: Mapping[str, Any], loader: Loader, changes: Collection[Change]) -> dict[str, Any]:
    """Where the loader goes on. After permitted changes, behind as many patches of the epoch as the run has seen of it.

    With another batch size or number of processes that is rounded down to a whole step.
    """
    state: dict[str, Any] = dict(document["loader"])
    if not changes:
        return state
    old, mine = state["plan"], loader.plan.fingerprint()
    patches = state["step"] * old["batch_size"] * old["world_size"]
    step = min(patches // (mine["batch_size"] * mine["world_size"]), mine["batches_per_epoch"] - 1)
    return {**state, "plan": mine, "step": step}


def resume_notes(document: Mapping[str, Any], changes: Iterable[Change]) -> list[str]:
    """What a user should know of a run that goes on: permitted changes, and another torch, one sentence each."""
    notes = [f"the run goes on with a permitted change: {change}" for change in changes]
    before = document.get("torch_version", "")
    if before and before != torch.__version__:
        notes.append(
            f"the run began with torch {before} and goes on with torch {torch.__version__}: losses may differ in their last digits"
        )
    return notes


def run_details(
    folder: Path, identity: Mapping[str, str], document: Mapping[str, Any] | None, changes: Iterable[Change]
) -> dict[str, Any]:
    """What ``run.json`` holds beside the configuration: options and SHA-256 of the files given, and each time the run was resumed."""
    file = folder / "run.json"
    before: dict[str, Any] = {}
    resumed = []
    if document is not None:
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            resumed = list(before.get("resumed", []))
        resumed.append(
            {
                "step": document["step"],
                "checkpoint_sha256": document["sha256"],
                "ftengine": __version__,
                "torch": str(torch.__version__),
                "changes": [str(change) for change in changes],
            }
        )
    given = {**before.get("given", {}), **{option: value for option, value in identity.items() if value}}
    return {"given": given, "resumed": resumed, **({"init": before["init"]} if "init" in before else {})}


def deciding_keys(config: Config, kind: Kind) -> dict[str, Any]:
    """The keys of a configuration that decide the losses of a stage: plain values by dotted key."""
    others = tuple(f"{section}." for other, section in SECTION.items() if other != kind)
    return {
        key: value
        for key, value in _flat(config.model_dump(mode="json")).items()
        if not key.startswith(others) and not _is_allowed(key, _FREE_KEYS)
    }


def _config_changes(saved: Config, config: Config, kind: Kind) -> list[Change]:
    was, now = deciding_keys(saved, kind), deciding_keys(config, kind)
    return [
        Change(key, _text(was.get(key)), _text(now.get(key)))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _identity_changes(saved: Mapping[str, str], given: Mapping[str, str]) -> list[Change]:
    return [
        Change(option.removeprefix("--"), _short(saved.get(option, "")), _short(value))
        for option, value in given.items()
        if not _same(saved.get(option, ""), value)
    ]


def _data_changes(was: Mapping[str, Any], now: Mapping[str, Any], known: Collection[Change]) -> list[Change]:
    """What the loader's fingerprint finds beyond the changes already known, which explain most of its entries."""
    changes = []
    if was.get("world_size") != now["world_size"]:
        changes.append(Change(PROCESSES, _text(was.get("world_size")), _text(now["world_size"])))
    volumes = (was.get("volumes") != now["volumes"]) and not known  # a split, a fold or a weight chooses volumes, too
    if was.get("cases") != now["cases"] or volumes:
        changes.append(
            Change(STORE, f"{was.get('volumes')} volumes to draw from", f"{now['volumes']} of other names or labels")
        )
    return changes


def _is_allowed(name: str, allow: Iterable[str]) -> bool:
    return any(given in {"all", name} or name.startswith(f"{given}.") for given in (a.lstrip("-") for a in allow))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _same(saved: str, given: str) -> bool:
    """Checkpoints of before hold the first digits of a SHA-256 only."""
    return saved == given or (saved.startswith("sha256:") and given.startswith(saved))


def _short(value: str) -> str:
    return value[:23] or "nothing"  # sha256: and 16 digits
