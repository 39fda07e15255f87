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
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftengine.errors import CaseError, ConfigError
from ftengine.volume.dicom import looks_like_dicom, sort_out
from ftengine.volume.itk import data_files
from ftengine.volume.readers import SUPPORTED
from ftengine.volume.values import shown

NO_LABEL = Path("-")  # in place of a label: take none, even where one lies beside the image
EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
IMAGE_SUFFIXES = ("_ct", "_image", "_0000")
LABEL_SUFFIXES = ("_label", "_seg", "_mask")
_LABEL_WORD = re.compile(r"(^|_)(label|seg|mask)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One case: where its image and label lie.

    case: ``<dataset>/<name>``, unique. image: a file or a DICOM folder. series_files: the slices to read of that folder, else empty.
    organ_label: a second label file with the organs, under the tumours of ``label``. label_map, organ_label_map: value in the file ->
    value in the region, pairs; values that they do not name stay. split: as the source says, "" where it says nothing.
    notes: what of the folder was left out.
    """

    case: str
    dataset: str
    image: Path
    label: Path | None = None
    series_files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    organ_label: Path | None = None
    label_map: tuple[tuple[int, int], ...] = ()
    organ_label_map: tuple[tuple[int, int], ...] = ()
    split: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides what the image is: the slices, or the file and its detached voxels."""
        return self.series_files or data_files(self.image)

    @property
    def label_files(self) -> tuple[Path, ...]:
        """Every file that decides what the label is, none without a label."""
        return () if self.label is None else data_files(self.label)

    @property
    def organ_label_files(self) -> tuple[Path, ...]:
        """Every file that decides what the organ label is, none without one."""
        return () if self.organ_label is None else data_files(self.organ_label)


@dataclass(frozen=True)
class Discovery:
    """The cases found, sorted by name, and what was passed over with the reason."""

    sources: tuple[Source, ...]
    ignored: tuple[tuple[Path, str], ...]


@dataclass
class _Found:
    """An image before it is named and paired."""

    path: Path
    relative: tuple[str, ...]  # the parts of the case's name, extension and suffix still on
    is_folder: bool = False
    series_files: tuple[Path, ...] = ()
    series: int = 0  # 1, 2, ... where a folder holds several
    notes: tuple[str, ...] = ()


@dataclass
class _Walk:
    images: list[_Found] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)


def parse_source(text: str) -> tuple[Path, Path | None]:
    """A SRC of the command line: ``PATH``, ``IMAGE=LABEL``, or ``IMAGE=-`` for an image whose neighbouring label is not to be used.

    A path that exists with its ``=`` is a path. Else the text is split where both sides exist, or at its first ``=``, so that the
    missing side is named later. Raises ConfigError where one side of the ``=`` is empty.
    """
    if "=" not in text or _exists(Path(text)):
        return Path(text), None
    if text.endswith("=-"):
        return Path(text[:-2]), NO_LABEL
    splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "="]
    image, label = next(((a, b) for a, b in splits if a and b and _exists(Path(a)) and _exists(Path(b))), splits[0])
    if not image or not label:
        raise ConfigError(f"source {text!r}: want PATH or IMAGE=LABEL with a path on both sides of the '='.")
    return Path(image), Path(label)


def discover(
    sources: Sequence[Path], *, labels: Path | None = None, dataset: str, pairs: Mapping[Path, Path] | None = None
) -> list[Source]:
    """The cases of ``discover_all``, sorted by name."""
    return list(discover_all(sources, labels=labels, dataset=dataset, pairs=pairs).sources)


def discover_all(
    sources: Sequence[Path], *, labels: Path | None = None, dataset: str, pairs: Mapping[Path, Path] | None = None
) -> Discovery:
    """Find the cases of a plain layout.

    sources: image files, folders (searched through; links to folders are followed once) and folders of DICOM slices. A case is named
    ``<dataset>/<path of the image below its source>`` without extension and without a trailing ``_ct``, ``_image`` or ``_0000``; a DICOM
    folder by its path, and ``/series_1``, ``/series_2`` ... behind it where it holds several series.

    Labels, first rule that applies: ``pairs`` (image -> label, or ``NO_LABEL``); ``labels`` (a folder with the same relative paths; the name of the image,
    with or without its suffix, or with ``_label``, ``_seg`` or ``_mask``, in any supported format); beside the image, NAME_label, NAME_seg
    or NAME_mask for an image NAME, NAME_ct, NAME_image or NAME_0000. Names are never guessed beyond that.

    Raises ConfigError for a source that is missing, two images with one name, two possible labels, a label for a folder of several
    series, pairs or labels that fit no image; CaseError where no source holds a CT.
    """
    _check_part(dataset, f"dataset name {dataset!r}")
    if "/" in dataset:
        raise ConfigError(f"dataset name {dataset!r} holds a '/'; want one plain name.")
    if labels is not None and not labels.is_dir():
        raise ConfigError(f"labels folder {shown(labels)}: not a folder; want one with the images' relative paths.")
    walk = _Walk()
    skip = None if labels is None else labels.resolve()
    stated = {image.resolve(): label for image, label in (pairs or {}).items()}
    for source in sources:
        _search(source, walk, skip, stated)
    if not walk.images:
        named = ", ".join(shown(s) for s in sources) or "no source"
        passed = (
            f" ({len(walk.ignored)} paths passed over, such as {shown(walk.ignored[0][0])}: {walk.ignored[0][1]})"
            if walk.ignored
            else ""
        )
        raise CaseError(f"{named}: no CT found{passed}; want {SUPPORTED}. Check the path.")

    for paired in stated.values():
        if paired != NO_LABEL and not paired.is_file():
            raise ConfigError(
                f"label {shown(paired)}: no such file; want the LABEL of IMAGE=LABEL to exist. Check the path."
            )
    found: dict[str, Source] = {}
    used_pairs: set[Path] = set()
    taken: set[tuple[Path, int]] = set()
    for image in walk.images:
        real = image.path.resolve()
        if (real, image.series) in taken:
            continue  # named twice, or named and found in a folder
        taken.add((real, image.series))
        case = _case_name(image, dataset)
        pair = stated.get(real)
        if pair is not None:
            used_pairs.add(real)
        label = pair or (_beside(image) if labels is None else _in_folder(image, labels))
        label = None if label == NO_LABEL else label
        if label is not None and image.series:
            raise ConfigError(
                f"label {shown(label)} for {shown(image.path)}, which holds several series; want one series a label. Move each series to its own folder."
            )
        if case in found:
            raise ConfigError(
                f"two images are named {case!r}: {shown(found[case].image)} and {shown(image.path)}. Rename one, or convert them as two datasets."
            )
        found[case] = Source(case, dataset, image.path, label, image.series_files, image.notes)
    _refuse_nested(found)
    if unused := sorted(set(stated) - used_pairs):
        raise ConfigError(
            f"{shown(unused[0])}: paired with a label but not among the sources. Give it as a source too."
        )
    if labels is not None and not any(s.label for s in found.values()):
        raise ConfigError(
            f"labels folder {shown(labels)}: no file fits any of {len(found)} images by its relative path. Check the names on both sides."
        )
    return Discovery(tuple(found[name] for name in sorted(found)), tuple(sorted(walk.ignored)))


def image_stem(file_name: str) -> str | None:
    """The name without a supported extension; None for other files."""
    lower = file_name.lower()
    extension = next((e for e in EXTENSIONS if lower.endswith(e) and len(lower) > len(e)), None)
    return None if extension is None else file_name[: -len(extension)]


def is_label_name(stem: str) -> bool:
    """Whether a name (without extension) says label: ``x_seg``, ``mask``, ``x_label_abdomen``."""
    return _LABEL_WORD.search(stem) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _search(source: Path, walk: _Walk, skip: Path | None, stated: Collection[Path]) -> None:
    """Add the images of one source. A file that says label is passed over here too: ``ftengine convert folder/*`` names them all."""
    if not _exists(source):
        raise ConfigError(f"{shown(source)}: no such file or folder; want {SUPPORTED}. Check the path.")
    if source.is_dir():
        for folder, relative in _folders(source, None if skip == source.resolve() else skip):
            _search_folder(folder, relative, source, walk, stated)
        return
    stem = image_stem(source.name)
    if stem is not None:
        _add_file(source, (), stem, walk, stated)
    elif looks_like_dicom(source):
        walk.images.append(_Found(source, (source.stem,), is_folder=True, series_files=(source,)))
    else:
        walk.ignored.append((source, "not an image by its name"))


def _add_file(path: Path, relative: tuple[str, ...], stem: str, walk: _Walk, stated: Collection[Path]) -> None:
    if is_label_name(stem) and path.resolve() not in stated:
        walk.ignored.append((path, "a label by its name"))
    else:
        walk.images.append(_Found(path, (*relative, path.name)))


def _folders(root: Path, skip: Path | None) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """``root`` and all folders below, parents first, in name order, each real folder once (links may loop), hidden ones and ``skip`` left out."""
    seen: set[Path] = set()
    waiting: list[tuple[Path, tuple[str, ...]]] = [(root, ())]
    while waiting:
        folder, relative = waiting.pop()
        real = folder.resolve()
        if real in seen or real == skip:
            continue
        seen.add(real)
        yield folder, relative
        try:
            below = [
                Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
            ]
        except OSError as error:
            raise ConfigError(
                f"{shown(folder)}: cannot be listed ({error.strerror}). Check its permissions."
            ) from error
        # real folders before links, so that a case is named by where it lies
        waiting += [
            (path, (*relative, path.name))
            for path in sorted(below, key=lambda p: (p.is_symlink(), p.name), reverse=True)
        ]


def _search_folder(folder: Path, relative: tuple[str, ...], root: Path, walk: _Walk, stated: Collection[Path]) -> None:
    others = []
    for path in sorted(folder.iterdir()):
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
            _Found(
                folder,
                place,
                is_folder=True,
                series_files=chosen,
                series=number * numbered,
                notes=tuple(files.notes(stack)),
            )
        )


def _case_name(image: _Found, dataset: str) -> str:
    parts = list(image.relative)
    if not image.is_folder:
        parts[-1] = image_stem(parts[-1]) or parts[-1]
    parts[-1] = _without_suffix(parts[-1])
    for part in parts:
        _check_part(part, shown(image.path))
    name = "/".join((dataset, *parts, *((f"series_{image.series}",) if image.series else ())))
    return unicodedata.normalize("NFC", name)  # macOS writes the same name decomposed


def _check_part(part: str, where: str) -> None:
    """ConfigError for a name that could leave its folder or break a listing."""
    if not part or part.startswith(".") or "\\" in part or not part.isprintable():
        raise ConfigError(
            f"{where}: cannot be a case name (empty, with a leading dot, a backslash or unprintable characters). Rename it."
        )


def _without_suffix(stem: str) -> str:
    suffix = next((s for s in IMAGE_SUFFIXES if stem.endswith(s) and len(stem) > len(s)), "")
    return stem.removesuffix(suffix)


def _refuse_nested(found: Mapping[str, Source]) -> None:
    """A store keeps a case in a folder of its name: no case may lie inside another's."""
    for case, source in found.items():
        parts = case.split("/")
        for length in range(2, len(parts)):
            outer = found.get("/".join(parts[:length]))
            if outer is not None:
                raise ConfigError(
                    f"case {case!r} ({shown(source.image)}) would lie inside case {outer.case!r} ({shown(outer.image)}). Rename one of the two."
                )


def _names(image: _Found) -> list[str]:
    """NAME in both readings of an image's file name, as it is and without its suffix."""
    last = image.relative[-1]
    stem = last if image.is_folder else image_stem(last) or last
    return list(dict.fromkeys((stem, _without_suffix(stem))))


def _beside(image: _Found) -> Path | None:
    """The label beside an image (or beside a DICOM folder)."""
    # "." has no parent by name
    folder = Path(os.path.abspath(image.path)).parent if image.path.is_dir() else image.path.parent
    candidates = [
        folder / f"{name}{suffix}{e}" for name in _names(image) for suffix in LABEL_SUFFIXES for e in EXTENSIONS
    ]
    return _only(candidates, image)


def _in_folder(image: _Found, labels: Path) -> Path | None:
    """The label of the same relative path in a folder of labels."""
    folder = labels.joinpath(*image.relative[:-1])
    names = _names(image)
    plain = [folder / f"{name}{suffix}{e}" for name in names for suffix in ("", *IMAGE_SUFFIXES) for e in EXTENSIONS]
    return _only(plain, image) or _only(
        [folder / f"{name}{s}{e}" for name in names for s in LABEL_SUFFIXES for e in EXTENSIONS], image
    )


def _only(candidates: Sequence[Path], image: _Found) -> Path | None:
    """The one candidate that exists; ConfigError for several."""
    there = [path for path in dict.fromkeys(candidates) if path.is_file() and not path.samefile(image.path)]
    if len(there) > 1:
        raise ConfigError(
            f"{shown(image.path)}: several labels fit by name, {shown(there[0])} and {shown(there[1])}; want one. State it as IMAGE=LABEL or move the others away."
        )
    return there[0] if there else None
