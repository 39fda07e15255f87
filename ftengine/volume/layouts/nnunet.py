"""nnU-Net raw data sets, v1 and v2: ``imagesTr/CASE_0000.EXT``, ``labelsTr/CASE.EXT``, ``imagesTs``, ``dataset.json``.

=======  ==========================================================================================
input    the folder of one data set, or its dataset.json
does     takes the images by name (of channel 0000, the CT), the training labels by case, the label names from dataset.json;
         with ``dataset`` in dataset.json (v2), images and labels as listed there
output   one ``Found`` a case, named by the case alone; split train or test
raises   ConfigError for other channels, paths that leave the folder, labels that neither names nor the user map
=======  ==========================================================================================

A label that should be there and is not fails its case when it is read: an annotated case must not turn into an unlabelled one in silence.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftengine.errors import ConfigError
from ftengine.volume.cases import Found, Walk, image_stem
from ftengine.volume.label_maps import map_by_name
from ftengine.volume.layouts.listing import (
    DATASET_JSON,
    PathError,
    count_notes,
    entries,
    image_extension,
    label_names,
    only_ct,
    path_inside,
    read_dataset_json,
)
from ftengine.volume.values import shown

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES = "imagesTr", "labelsTr", "imagesTs"
_CHANNEL = re.compile(r"_(\d{4})$")
CT_CHANNEL = "_0000"
Cases = dict[str, tuple[Path, Path | None]]  # case -> image, label


def find_nnunet(
    root: Path, walk: Walk, *, region_labels: Mapping[str, int] | None, label_map: Mapping[int, int]
) -> None:
    """Add the cases of one data set to ``walk``. region_labels, label_map: as ``label_maps.map_by_name``."""
    file = root / DATASET_JSON
    document = read_dataset_json(file) if file.is_file() else {}
    for key in ("channel_names", "modality"):
        only_ct(document.get(key), file, key)
    extensions = image_extension(document, file)
    mapping = map_by_name(label_names(document, file), region_labels, label_map, shown(file))
    settled = tuple(sorted(mapping.items()))

    cases = _listed_cases(root, file, document)
    if cases is None:
        cases = _training_cases(root, file, document, extensions, walk)
    walk.notes += count_notes(document, file, len(cases))
    for split, found in (("train", cases), ("test", _cases_of_folder(root, TEST_IMAGES, extensions, walk))):
        walk.images += [
            Found(image, (case,), name=case, is_listed=True, label=label, split=split, label_map=settled)
            for case, (image, label) in found.items()
        ]


def _training_cases(root: Path, file: Path, document: dict[str, Any], extensions: tuple[str, ...], walk: Walk) -> Cases:
    """The images of ``imagesTr`` with their labels, and those that dataset.json lists besides."""
    images = _cases_of_folder(root, TRAIN_IMAGES, extensions, walk)
    if images and not (root / TRAIN_LABELS).is_dir():
        raise ConfigError(
            f"{shown(root)}: {TRAIN_IMAGES} without {TRAIN_LABELS}; want both. For images without labels name the layout with "
            f"--layout folder and give {shown(root / TRAIN_IMAGES)}."
        )
    cases: Cases = {}
    for case, (image, _) in images.items():
        cases[case] = (image, _label(root / TRAIN_LABELS, case, image, extensions))
    _add_lost(root, file, document, extensions, cases)
    _pass_over_lone_labels(root / TRAIN_LABELS, cases, walk)
    return cases


def _cases_of_folder(root: Path, name: str, extensions: tuple[str, ...], walk: Walk) -> Cases:
    """The images of channel 0000 of ``imagesTr`` or ``imagesTs`` without labels; {} where there is no such folder."""
    folder = root / name
    cases: Cases = {}
    others: list[Path] = []
    for path in entries(folder):
        if path.is_dir():
            continue
        stem = _stem(path.name, extensions)
        channel = None if stem is None else _CHANNEL.search(stem)
        if stem is None or channel is None:
            walk.ignored.append((path, "not an image" if stem is None else "an image without the channel _0000"))
        elif channel.group() != CT_CHANNEL:
            others.append(path)
        elif (case := stem.removesuffix(CT_CHANNEL)) in cases:
            raise ConfigError(
                f"two images of case {case!r}: {shown(cases[case][0])} and {shown(path)}. Take one away, or say file_ending in {DATASET_JSON}."
            )
        else:
            cases[case] = (path, None)
    if others:
        raise ConfigError(
            f"{shown(folder)}: {len(others)} images of other channels than {CT_CHANNEL}, such as {others[0].name}; want one channel, the CT. "
            "Other channels cannot be used: make a data set of the CT alone."
        )
    return cases


def _stem(name: str, extensions: tuple[str, ...]) -> str | None:
    return image_stem(name) if name.lower().endswith(extensions) else None


def _label(folder: Path, case: str, image: Path, extensions: tuple[str, ...]) -> Path:
    """The label of a training case, there or not; of any extension, the image's first."""
    own = image.name[len(image_stem(image.name) or "") :]
    candidates = [folder / f"{case}{extension}" for extension in dict.fromkeys((own, *extensions))]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _pass_over_lone_labels(folder: Path, cases: Cases, walk: Walk) -> None:
    used = {label for _, label in cases.values()}
    walk.ignored += [
        (path, "a label without its image")
        for path in entries(folder)
        if path not in used and image_stem(path.name) is not None
    ]


def _add_lost(root: Path, file: Path, document: dict[str, Any], extensions: tuple[str, ...], cases: Cases) -> None:
    """Training cases that dataset.json lists (v1) and whose image is not in the folder: reading them will name what is missing."""
    training = document.get("training")
    for number, entry in enumerate(training if isinstance(training, list) else []):
        listed = entry.get("image") if isinstance(entry, dict) else entry
        try:
            path = path_inside(root, listed)
        except PathError as error:
            raise ConfigError(f"{shown(file)}: training[{number}]: {error}. Repair the list.") from error
        stem = image_stem(path.name) or path.name
        case = stem.removesuffix(CT_CHANNEL)
        if case not in cases:
            extension = path.name[len(stem) :] or extensions[0]
            cases[case] = (
                root / TRAIN_IMAGES / f"{case}{CT_CHANNEL}{extension}",
                root / TRAIN_LABELS / f"{case}{extension}",
            )


def _listed_cases(root: Path, file: Path, document: dict[str, Any]) -> Cases | None:
    """The ``dataset`` table of v2 (case -> images, label); None where there is none."""
    table = document.get("dataset")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError(f"{shown(file)}: dataset is not a table of cases. Repair the file.")
    cases: Cases = {}
    for case, entry in table.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or len(images) != 1:
            count = len(images) if isinstance(images, list) else 0
            raise ConfigError(
                f"{shown(file)}: dataset[{case!r}] lists {count} images; want one, the CT. Other channels cannot be used."
            )
        try:
            cases[case] = (path_inside(root, images[0]), path_inside(root, entry.get("label")))
        except PathError as error:
            raise ConfigError(f"{shown(file)}: dataset[{case!r}]: {error}. Repair the file.") from error
    return cases
