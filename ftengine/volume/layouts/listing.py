"""What the layouts that come with a list share: paths that stay inside a folder, and ``dataset.json``."""

import json
import os
from pathlib import Path
from typing import Any, cast

from ftengine.errors import ConfigError
from ftengine.volume.cases import EXTENSIONS
from ftengine.volume.values import shown

DATASET_JSON = "dataset.json"
MAX_LIST_BYTES = 64 << 20  # a list of 161,310 cases has about 20 MB
_MAX_PATH_CHARACTERS, _MAX_PART_BYTES = 4000, 255  # beyond it no file system answers
_MAX_SHOWN = 80


class PathError(ValueError):
    """Why a path of a list cannot be used; the caller says where it stands."""


def path_inside(root: Path, text: object, *, any_absolute: bool = False) -> Path:
    """The path ``text`` of a list, relative to the folder of the list; not whether it exists.

    any_absolute: an absolute path may lie outside ``root``. Raises PathError for what is no path, an absolute path outside ``root``
    and a ``..`` that leaves it. Links are not followed: a link inside the folder is the user's own.
    """
    if not isinstance(text, str) or not text.strip():
        raise PathError(f"{_short(text)} is not a path")
    if not text.isprintable():
        raise PathError(f"{_short(text)} holds a NUL or other unprintable characters")
    if len(text) > _MAX_PATH_CHARACTERS or any(len(os.fsencode(part)) > _MAX_PART_BYTES for part in text.split("/")):
        raise PathError(f"{_short(text)} is too long for a path")
    base = os.path.abspath(root)
    target = os.path.normpath(os.path.join(base, text))
    if os.path.isabs(text) and any_absolute:
        return Path(target)
    relative = os.path.relpath(target, base)
    if relative == os.pardir or relative.startswith(os.pardir + os.sep):
        raise PathError(f"{_short(text)} leads out of {shown(root)}")
    if relative == os.curdir:
        raise PathError(f"{_short(text)} is the folder itself")
    return root / relative


def below(root: Path, path: Path) -> tuple[str, ...]:
    """The parts of ``path`` below ``root``; of a path outside it only the last."""
    relative = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    return (path.name,) if relative.startswith(os.pardir) else Path(relative).parts


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in name order, hidden files left out; [] where there is none; ConfigError where it cannot be listed."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{shown(folder)}: cannot be listed ({error.strerror}). Check its permissions.") from error


def read_dataset_json(file: Path) -> dict[str, Any]:
    """A ``dataset.json`` as a dictionary; ConfigError for what is no JSON object."""
    where = shown(file)
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise ConfigError(
                f"{where}: {file.stat().st_size:,} bytes; want a list of at most {MAX_LIST_BYTES:,}. Check the file."
            )
        document = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}). Check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        twice = f" ({error})" if isinstance(error, _TwiceError) else ""
        raise ConfigError(
            f"{where}: not valid JSON{line or twice}; want the data set's description. Repair it, or name the layout with --layout folder."
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{where}: holds no JSON object; want the data set's description. Repair it, or name the layout with --layout folder."
        )
    return cast("dict[str, Any]", document)


def label_names(document: dict[str, Any], file: Path) -> dict[int, str]:
    """The ``labels`` of a ``dataset.json``: value in the files -> name, from either form; {} where it has none.

    A value of several names (regions of nnU-Net, lists of values) has the name "". Raises ConfigError for anything else.
    """
    labels = document.get("labels")
    if labels is None:
        return {}
    if not isinstance(labels, dict):
        raise ConfigError(
            f'{shown(file)}: labels is not a table; want {{"liver": 1}} or {{"1": "liver"}}. Repair the file.'
        )
    names: dict[int, str] = {}
    for key, entry in labels.items():
        values, name = _entry(key, entry)
        if not values:
            raise ConfigError(
                f'{shown(file)}: labels has the entry {_short(key)}: {_short(entry)}; want {{"liver": 1}} or {{"1": "liver"}}. Repair the file.'
            )
        for value in values:
            names[value] = name if value not in names and len(values) == 1 else ""
    return names


def only_ct(channels: object, file: Path, key: str) -> None:
    """ConfigError unless a table of channels (or modalities) names one, a CT; a missing table passes."""
    if channels is None:
        return
    names = list(channels.values()) if isinstance(channels, dict) else channels if isinstance(channels, list) else []
    if len(names) != 1 or not isinstance(names[0], str):
        raise ConfigError(
            f"{shown(file)}: {key} names {len(names)} channels; want one, the CT. Other channels cannot be used: make a data set of the CT alone."
        )
    words = "".join(c if c.isalnum() else " " for c in names[0].lower()).split()
    if not {"ct", "cect", "ncct", "nonorm", "zscore"} & set(words):
        raise ConfigError(
            f"{shown(file)}: {key} says that channel 0 is {_short(names[0])}; want CT. Correct it where it is a CT all the same."
        )


def image_extension(document: dict[str, Any], file: Path) -> tuple[str, ...]:
    """The extensions that images have: ``file_ending`` of a ``dataset.json``, else all of ours; ConfigError for one we cannot read."""
    ending = document.get("file_ending")
    if ending is None:
        return EXTENSIONS
    if ending not in EXTENSIONS:
        raise ConfigError(
            f"{shown(file)}: file_ending is {_short(ending)}; want one of {', '.join(EXTENSIONS)}. Convert the files."
        )
    return (str(ending),)


def count_notes(document: dict[str, Any], file: Path, num_training: int) -> list[str]:
    """A note where ``numTraining`` of a ``dataset.json`` is another number than was found."""
    said = document.get("numTraining")
    if not isinstance(said, int) or said == num_training:
        return []
    return [f"{shown(file)} says numTraining {_short(said)}; found {num_training} training cases"]


class _TwiceError(ValueError):
    """A key stands twice in one JSON object."""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _TwiceError(f"the key {_short(key)} stands twice")
        table[key] = value
    return table


def _entry(key: str, entry: object) -> tuple[list[int], str]:
    """The values and the name that one entry of ``labels`` gives; no values for what is neither form."""
    if isinstance(entry, str) and _whole(key) is not None:
        return [cast("int", _whole(key))], entry
    given = entry if isinstance(entry, list) else [entry]
    values = [_whole(v) for v in given]
    return ([], "") if not values or None in values else ([cast("int", v) for v in values], key)


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)) > 19:
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 4]} ..."
