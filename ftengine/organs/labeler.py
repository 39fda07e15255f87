"""What makes pseudo organ labels: the protocol that every tool fulfils, and the table from its classes to ours.

=======  ==========================================================================================
input    a volume on the store's grid: int16 HU [z, y, x], RAS+, and its spacing (z, y, x) in millimetre
does     finds the organs of the store's region
output   uint8 [z, y, x], 0 or the value of an organ's healthy tissue in the store
raises   ConfigError when it is made: a package that is missing, weights that do not fit, another region
=======  ==========================================================================================
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from ftengine.errors import ConfigError
from ftengine.files import sha256_of_files
from ftengine.geometry import FloatZYX
from ftengine.store.reader import Store


class Labeler(Protocol):
    """One tool with its weights, ready to label volumes of one store."""

    @property
    def provenance(self) -> str:
        """JSON for the index: tool, version, SHA-256 of the weights, map of classes, settings. Equal text, equal labels."""
        ...

    def __call__(self, image_hu: NDArray[np.int16], spacing_mm_zyx: FloatZYX) -> NDArray[np.uint8]:
        """The organs of a volume as in the module's table."""
        ...


def class_values(tool: str, store: Store) -> dict[str, int]:
    """Class of a tool (its name, or its number as text) -> the value of that organ in the store.

    Raises ConfigError where the tool does not know every organ of the store: the missing one would be background to training.
    """
    text = resources.files("ftengine.organs").joinpath("classes.yaml").read_text(encoding="utf-8")
    table: dict[str, str] = {str(name): organ for name, organ in yaml.safe_load(text)[tool].items()}
    unknown = sorted(store.organs.keys() - set(table.values()))
    if unknown:
        raise ConfigError(
            f"--with {tool}: finds {', '.join(sorted(set(table.values())))}; {store.location} (region {store.region}) also needs "
            f"{', '.join(unknown)}. Use another tool or a checkpoint of this region."
        )
    return {name: store.organs[organ]["organ"] for name, organ in table.items() if organ in store.organs}


def describe(
    tool: str, version: str, weights_sha256: str, label_map: Mapping[str, int], settings: Mapping[str, Any]
) -> str:
    """The provenance of a labeler: JSON with its keys in order, nothing of this machine or this day in it."""
    document = {
        "tool": tool,
        "version": version,
        "weights_sha256": weights_sha256,
        "label_map": dict(label_map),
        "settings": dict(settings),
    }
    return json.dumps(document, sort_keys=True)


def weights_hash(top: Path, files: Iterable[Path] | None = None) -> str:
    """SHA-256 of a weights file, or of ``files`` below a folder with their relative names."""
    if files is None:
        return sha256_of_files(top)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(top).as_posix()}\0{weights_hash(file)}\0".encode())
    return digest.hexdigest()


def missing_package(tool: str, extra: str, error: Exception) -> ConfigError:
    """What to install for a tool whose package is missing or cannot be loaded."""
    why = " ".join(str(error).split())[:160]
    return ConfigError(
        f"--with {tool}: its package is not installed or cannot be loaded ({why}). Install ftengine[{extra}], or use --with checkpoint."
    )
