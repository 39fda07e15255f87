"""Which layout a source has, and its cases: the one way from what a user names to a list of cases.

=======  ==========================================================================================
input    files and folders as the command line names them; a layout, or ``auto``
does     looks at names and lists (never at voxels), lets each layout add what it finds, names and pairs everything together
output   ``Discovery``; under ``auto`` its notes say what was chosen and why
raises   ConfigError where a folder may be several things, options do not fit the layout, or a list is wrong; CaseError without a CT
=======  ==========================================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from ftengine.errors import ConfigError
from ftengine.volume.cases import Discovery, Walk, assemble, check_dataset, image_stem, is_label_name, label_folders
from ftengine.volume.dicom_headers import looks_like_dicom
from ftengine.volume.discover import exists, folders, search
from ftengine.volume.layouts import manifest, nnunet
from ftengine.volume.layouts.dicom_tree import find_dicom
from ftengine.volume.layouts.listing import DATASET_JSON, PathError, entries, path_inside, read_dataset_json
from ftengine.volume.layouts.manifest import find_manifest
from ftengine.volume.layouts.msd import find_msd
from ftengine.volume.layouts.nnunet import find_nnunet
from ftengine.volume.readers import SUPPORTED
from ftengine.volume.values import shown

Layout = Literal["folder", "nnunet", "msd", "dicom", "csv"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_BY_NAME = ("folder", "dicom")  # where labels are paired by name, so that a folder of labels can be given
_NAME_IT = "Name the layout with --layout {}."


@dataclass(frozen=True)
class Choice:
    """The layout of one source and what spoke for it."""

    layout: Layout
    because: str


def find_cases(
    sources: Sequence[Path],
    *,
    layout: str = "auto",
    dataset: str,
    labels: Path | None = None,
    organ_labels: Path | None = None,
    pairs: Mapping[Path, Path] | None = None,
    region_labels: Mapping[str, int] | None = None,
    label_map: Mapping[int, int] | None = None,
    organ_label_map: Mapping[int, int] | None = None,
    absolute_paths: bool = False,
    skip: frozenset[Path] = frozenset(),
) -> Discovery:
    """Find the cases of ``sources``, each a file or folder of the layout (``auto``: each is looked at on its own).

    labels, organ_labels, pairs: as ``discover.discover_all``; ``labels`` and ``pairs`` not where a list states the labels. region_labels:
    label names of the region -> values, by which the names in a ``dataset.json`` are checked and mapped; None takes its values as they
    are. label_map, organ_label_map: value in the files -> value in the region, stated by the user; both end in ``Source``.
    absolute_paths: a manifest may name files outside its folder. skip: real paths of folders that are not searched, such as that of results.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: want auto, {', '.join(LAYOUTS)}.")
    for source in sources:
        if not exists(source):
            raise ConfigError(f"{shown(source)}: no such file or folder; want {SUPPORTED}. Check the path.")
    check_dataset(dataset)
    without = skip | label_folders(labels, organ_labels)
    walk = Walk()
    stated = dict(pairs or {})
    for source in sources:
        if layout == "auto":
            choice = Choice("folder", "paired with a label") if source in stated else choose(source, skip)
            walk.notes.append(f"{shown(source)}: layout {choice.layout} ({choice.because})")
        else:
            choice = Choice(next(known for known in LAYOUTS if known == layout), "")
        if source in stated and choice.layout not in _BY_NAME:
            raise ConfigError(
                f"{shown(source)}: paired with a label, but its layout is {choice.layout}, which names its own labels; want IMAGE=LABEL only with "
                f"{' or '.join(_BY_NAME)}."
            )
        if labels is not None and choice.layout not in _BY_NAME:
            raise ConfigError(
                f"--labels {shown(labels)}: {shown(source)} has the layout {choice.layout}, which names its own labels; want --labels only with "
                f"{' or '.join(_BY_NAME)}."
            )
        if organ_labels is not None and choice.layout == "csv":
            raise ConfigError(
                f"--organ-labels {shown(organ_labels)}: {shown(source)} is a manifest; name organ labels in its column organ_label."
            )
        _find(
            source,
            choice.layout,
            walk,
            without,
            stated,
            dataset,
            region_labels,
            label_map or {},
            absolute_paths=absolute_paths,
        )
    found = assemble(walk, sources, dataset=dataset, labels=labels, organ_labels=organ_labels, pairs=pairs)
    maps = tuple(sorted((label_map or {}).items())), tuple(sorted((organ_label_map or {}).items()))
    mapped = (replace(s, label_map=s.label_map or maps[0], organ_label_map=maps[1]) for s in found.sources)
    return replace(found, sources=tuple(mapped))


def _find(
    source: Path,
    layout: Layout,
    walk: Walk,
    skip: frozenset[Path],
    stated: Mapping[Path, Path],
    dataset: str,
    region_labels: Mapping[str, int] | None,
    label_map: Mapping[int, int],
    *,
    absolute_paths: bool,
) -> None:
    """Let one layout add what it finds in one source."""
    if layout == "folder" or (layout == "dicom" and not source.is_dir()):
        search([source], walk, skip=skip, stated=stated)
    elif layout == "dicom":
        find_dicom(source, walk, skip=skip)
    elif layout == "csv":
        find_manifest(_manifest(source), walk, dataset=dataset, absolute_paths=absolute_paths)
    else:
        root = source.parent if source.name == DATASET_JSON else source
        if not root.is_dir():
            raise ConfigError(f"{shown(source)}: not a folder; want that of a data set with its {DATASET_JSON}.")
        find = find_msd if layout == "msd" else find_nnunet
        find(root, walk, region_labels=region_labels, label_map=label_map)


def _manifest(source: Path) -> Path:
    if not source.is_dir():
        return source
    files = _manifests(source)
    if len(files) != 1:
        named = f", such as {files[0].name} and {files[1].name}" if files else ""
        raise ConfigError(
            f"{shown(source)}: {len(files)} CSV or TSV files with a column image{named}; want one. Give the file itself as the source."
        )
    return files[0]


def _manifests(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if manifest.is_manifest(path)]


def choose(source: Path, skip: frozenset[Path] = frozenset()) -> Choice:
    """The layout of a file or folder, by what is there outside of ``skip``; ConfigError where it may be several."""
    if not source.is_dir():
        if source.name.lower().endswith(manifest.EXTENSIONS):
            return Choice("csv", "a manifest by its name")
        return (source.name == DATASET_JSON and _by_list(source.parent)) or Choice("folder", "a single file")
    fits = [choice for choice in (_by_list(source), _by_manifest(source)) if choice is not None]
    if len(fits) > 1:
        raise ConfigError(
            f"{shown(source)}: may have the layout {' or '.join(f'{c.layout} ({c.because})' for c in fits)}. "
            + _NAME_IT.format(" or ".join(c.layout for c in fits))
        )
    return fits[0] if fits else _by_content(source, skip)


def _by_list(folder: Path) -> Choice | None:
    """What ``dataset.json`` and the folders' names say."""
    file = folder / DATASET_JSON
    document = read_dataset_json(file) if file.is_file() else {}
    training = document.get("training")
    if isinstance(training, list) and not _is_nnunet_list(folder, training):
        return Choice("msd", f"{DATASET_JSON} with a training list")
    if (folder / nnunet.TRAIN_IMAGES).is_dir() or isinstance(document.get("dataset"), dict):
        return Choice("nnunet", f"{nnunet.TRAIN_IMAGES} or {DATASET_JSON} with a table of cases")
    return None


def _is_nnunet_list(folder: Path, training: list[object]) -> bool:
    """Whether a training list is that of nnU-Net v1, whose paths leave the channel out: CASE.nii.gz for a file CASE_0000.nii.gz."""
    for entry in training:
        listed = entry.get("image") if isinstance(entry, dict) else entry
        try:
            path = path_inside(folder, listed)
        except PathError:
            continue  # the layout will refuse it with its place in the list
        if path.is_file():
            return False
        stem = image_stem(path.name)
        if stem is not None and path.with_name(f"{stem}{nnunet.CT_CHANNEL}{path.name[len(stem) :]}").is_file():
            return True
    return False


def _by_manifest(folder: Path) -> Choice | None:
    files = _manifests(folder)
    if len(files) > 1:
        raise ConfigError(
            f"{shown(folder)}: holds {len(files)} manifests, such as {files[0].name} and {files[1].name}; want one. Give the file itself as "
            "the source, or name the layout with --layout folder."
        )
    return Choice("csv", f"{files[0].name} has a column image") if files else None


def _by_content(root: Path, skip: frozenset[Path]) -> Choice:
    """``dicom`` where the images below ``root`` are DICOM alone, else ``folder``; ConfigError for a folder of data sets."""
    others: list[Path] = []
    has_images = False
    for folder, relative in folders(root, skip):
        if relative and relative[-1] == nnunet.TRAIN_IMAGES:
            raise ConfigError(
                f"{shown(root)}: holds a data set of its own in {shown(folder.parent)}, whose labels would be taken for images. Give each data set as a "
                "source, or name the layout with --layout folder."
            )
        try:
            inside = entries(folder)
        except ConfigError:
            continue  # below the root, the layout makes it a case that fails
        for path in inside:
            stem = image_stem(path.name)
            if stem is None:
                others.append(path)
            elif not has_images and not is_label_name(stem):
                has_images = not path.is_dir()
    if not has_images and any(looks_like_dicom(path) for path in others if not path.is_dir()):
        return Choice("dicom", "nothing but DICOM")
    return Choice("folder", "images by their names" if has_images else "neither a list nor DICOM")
