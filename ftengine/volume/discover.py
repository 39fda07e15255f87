"""Which cases lie under a folder: names, labels beside them, and DICOM series, without reading voxels.

=======  ==========================================================================================
input    files, folders, DICOM folders; a folder of labels or explicit pairs
does     walks in a fixed order, sniffs DICOM, pairs labels by name, never by content
output   one ``Source`` a case, sorted by name, each name unique
raises   ConfigError for what the user must decide (two cases of one name, two labels for one image), CaseError where there is no CT
=======  ==========================================================================================

A name says whether a file is a label: the words ``label``, ``seg`` or ``mask`` in it, between underscores, make it one. Such a file is
never a case of its own; which one belongs to an image is decided by the rules of ``discover`` or stated by the user as IMAGE=LABEL.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.volume.cases import (
    EXTENSIONS,
    NO_LABEL,
    Discovery,
    Found,
    Source,
    Walk,
    assemble,
    image_stem,
    is_label_name,
    label_folders,
    real_path,
)
from ftengine.volume.dicom import looks_like_dicom, sort_out
from ftengine.volume.readers import SUPPORTED
from ftengine.volume.values import shown

__all__ = [
    "EXTENSIONS", "NO_LABEL", "Discovery", "Source", "discover", "discover_all", "exists", "folders", "image_stem", "is_label_name",
    "parse_source", "search",
]  # fmt: skip


def parse_source(text: str) -> tuple[Path, Path | None]:
    """A SRC of the command line: ``PATH``, ``IMAGE=LABEL``, or ``IMAGE=-`` for an image whose neighbouring label is not to be used.

    A path that exists with its ``=`` is a path. Else the text is split where both sides exist, or at its first ``=``, so that the
    missing side is named later. Raises ConfigError where one side of the ``=`` is empty.
    """
    if "=" not in text or exists(Path(text)):
        return Path(text), None
    if text.endswith("=-"):
        return Path(text[:-2]), NO_LABEL
    splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "="]
    image, label = next(((a, b) for a, b in splits if a and b and exists(Path(a)) and exists(Path(b))), splits[0])
    if not image or not label:
        raise ConfigError(f"source {text!r}: want PATH or IMAGE=LABEL with a path on both sides of the '='.")
    return Path(image), Path(label)


def discover(
    sources: Sequence[Path], *, labels: Path | None = None, dataset: str, pairs: Mapping[Path, Path] | None = None
) -> list[Source]:
    """The cases of ``discover_all``, sorted by name."""
    return list(discover_all(sources, labels=labels, dataset=dataset, pairs=pairs).sources)


def discover_all(
    sources: Sequence[Path],
    *,
    labels: Path | None = None,
    organ_labels: Path | None = None,
    dataset: str,
    pairs: Mapping[Path, Path] | None = None,
) -> Discovery:
    """Find the cases of a plain layout.

    sources: image files, folders (searched through; links to folders are followed once) and folders of DICOM slices. A case is named
    ``<dataset>/<path of the image below its source>`` without extension and without a trailing ``_ct``, ``_image`` or ``_0000``; a DICOM
    folder by its path, and ``/series_1``, ``/series_2`` ... behind it where it holds several series.

    Labels, first rule that applies: ``pairs`` (image -> label, or ``NO_LABEL``); ``labels`` (a folder with the same relative paths; the name of the image,
    with or without its suffix, or with ``_label``, ``_seg`` or ``_mask``, in any supported format); beside the image, NAME_label, NAME_seg
    or NAME_mask for an image NAME, NAME_ct, NAME_image or NAME_0000. Names are never guessed beyond that. organ_labels: a folder as
    ``labels``, for a second label file under the first.

    Raises ConfigError for a source that is missing, two images with one name, two possible labels, a label for a folder of several
    series, pairs or labels that fit no image; CaseError where no source holds a CT.
    """
    walk = Walk()
    search(sources, walk, skip=label_folders(labels, organ_labels), stated=pairs or {})
    return assemble(walk, sources, dataset=dataset, labels=labels, organ_labels=organ_labels, pairs=pairs)


def search(sources: Sequence[Path], walk: Walk, *, skip: Collection[Path], stated: Mapping[Path, Path]) -> None:
    """Add the images of plain sources. skip: real folders to leave out, unless one is a source. stated: pairs, as in ``discover_all``."""
    real = {real_path(image): label for image, label in stated.items()}
    for source in sources:
        _search(source, walk, skip, real)


def exists(path: Path) -> bool:
    """Whether something is at ``path``; False too for what no path can be."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _search(source: Path, walk: Walk, skip: Collection[Path], stated: Collection[Path]) -> None:
    """Add the images of one source. A file that says label is passed over here too: ``ftengine convert folder/*`` names them all."""
    if not exists(source):
        raise ConfigError(f"{shown(source)}: no such file or folder; want {SUPPORTED}. Check the path.")
    if source.is_dir():
        for folder, relative in folders(source, set(skip) - {real_path(source)}):
            _search_folder(folder, relative, source, walk, stated)
        return
    stem = image_stem(source.name)
    if stem is not None:
        _add_file(source, (), stem, walk, stated)
    elif looks_like_dicom(source):
        walk.images.append(Found(source, (source.stem,), is_folder=True, series_files=(source,)))
    else:
        walk.ignored.append((source, "not an image by its name"))


def _add_file(path: Path, relative: tuple[str, ...], stem: str, walk: Walk, stated: Collection[Path]) -> None:
    if is_label_name(stem) and real_path(path) not in stated:
        walk.ignored.append((path, "a label by its name"))
    else:
        walk.images.append(Found(path, (*relative, path.name)))


def folders(root: Path, skip: Collection[Path]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """``root`` and all folders below, parents first, in name order, each real folder once (links may loop), hidden ones and ``skip`` left out."""
    seen: set[Path] = set()
    waiting: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while waiting:
        folder, relative = waiting.pop()
        real = real_path(folder)
        if real in seen or real in skip:
            continue
        seen.add(real)
        yield folder, relative
        try:
            with os.scandir(folder) as entries:
                below = [Path(entry.path) for entry in entries if _is_folder(entry) and not entry.name.startswith(".")]
        except OSError as error:
            if folder == root:
                raise ConfigError(
                    f"{shown(folder)}: cannot be listed ({error.strerror}). Check its permissions."
                ) from error
            continue  # the caller, which cannot list it either, makes it a case that fails
        # real folders before links, so that a case is named by where it lies
        waiting += [
            (path, (*relative, path.name))
            for path in sorted(below, key=lambda p: (p.is_symlink(), p.name), reverse=True)
        ]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _search_folder(folder: Path, relative: tuple[str, ...], root: Path, walk: Walk, stated: Collection[Path]) -> None:
    others = []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        walk.images.append(Found(folder, relative, is_folder=True))  # reading it says why it cannot be listed
        return
    for path in inside:
        # a link to a missing file stays: reading it names the case that is lost
        if path.name.startswith(".") or path.is_dir():
            continue
        stem = image_stem(path.name)
        if stem is None:
            others.append(path)
        else:
            _add_file(path, relative, stem, walk, stated)
    if not any(looks_like_dicom(path) for path in others):
        walk.ignored += [(path, "not an image") for path in others]
        return
    files = sort_out(others)
    usable = files.volumes or files.stacks[:1] or ((),)
    if not files.stacks and not files.broken:
        walk.ignored.append((folder, f"{files.num_other} DICOM files without a CT slice"))
        return
    place = relative or (Path(os.path.abspath(root)).name,)
    numbered = len(usable) > 1
    for number, stack in enumerate(usable, start=1):
        # without one whole stack, all files are handed on: reading them says what is wrong
        chosen = (
            files.with_broken(stack)
            if files.volumes
            else tuple(sorted({h.path for s in (*files.stacks, files.broken) for h in s}))
        )
        walk.images.append(
            Found(
                folder,
                place,
                is_folder=True,
                series_files=chosen,
                series=number * numbered,
                notes=tuple(files.notes(stack)),
            )
        )
