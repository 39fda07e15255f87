"""Medical Segmentation Decathlon: ``dataset.json`` with ``training: [{image, label}]`` and ``test: [image]``.

=======  ==========================================================================================
input    the folder of one task, or its dataset.json
does     takes images and labels as listed, the label names from dataset.json; what lies in the folder unlisted is passed over
output   one ``Found`` a listed image, named by its path below the folder without imagesTr or imagesTs; split train or test
raises   ConfigError for lists that cannot be read, paths that leave the folder, other modalities than CT, labels that neither names
         nor the user map
=======  ==========================================================================================

A listed file that is missing fails its case when it is read; the others go on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftengine.errors import ConfigError
from ftengine.volume.cases import Found, Walk, image_stem
from ftengine.volume.label_maps import map_by_name
from ftengine.volume.layouts.listing import (
    DATASET_JSON,
    PathError,
    below,
    count_notes,
    entries,
    label_names,
    only_ct,
    path_inside,
    read_dataset_json,
)
from ftengine.volume.values import shown

_IMAGE_FOLDERS = ("imagesTr", "imagesTs")


def find_msd(root: Path, walk: Walk, *, region_labels: Mapping[str, int] | None, label_map: Mapping[int, int]) -> None:
    """Add the cases of one task to ``walk``. region_labels, label_map: as ``label_maps.map_by_name``."""
    file = root / DATASET_JSON
    document = read_dataset_json(file)
    only_ct(document.get("modality"), file, "modality")
    mapping = map_by_name(label_names(document, file), region_labels, label_map, shown(file))
    settled = tuple(sorted(mapping.items()))
    listed: set[Path] = set()
    for key, split in (("training", "train"), ("test", "test")):
        for image, label in _entries(root, file, document, key):
            if image in listed:
                raise ConfigError(
                    f"{shown(file)}: {shown(image)} is listed twice; want each image once. Repair the list."
                )
            listed.add(image)
            relative = below(root, image)
            if len(relative) > 1 and relative[0] in _IMAGE_FOLDERS:
                relative = relative[1:]
            walk.images.append(Found(image, relative, is_listed=True, label=label, split=split, label_map=settled))
    walk.notes += count_notes(document, file, len(document.get("training", [])))
    for name in _IMAGE_FOLDERS:
        for path in entries(root / name):
            if path not in listed and image_stem(path.name) is not None:
                walk.ignored.append((path, f"not in the lists of {DATASET_JSON}"))


def _entries(root: Path, file: Path, document: dict[str, Any], key: str) -> list[tuple[Path, Path | None]]:
    """Image and label of each entry of a list; an entry may be a path alone."""
    entries = document.get(key, [])
    if not isinstance(entries, list):
        raise ConfigError(f"{shown(file)}: {key} is not a list. Repair the file.")
    found: list[tuple[Path, Path | None]] = []
    for number, entry in enumerate(entries):
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        try:
            found.append((path_inside(root, image), None if label is None else path_inside(root, label)))
        except PathError as error:
            raise ConfigError(f"{shown(file)}: {key}[{number}]: {error}. Repair the list.") from error
    return found
