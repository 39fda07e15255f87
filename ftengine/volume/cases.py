"""What a case is: its name, its files, and which label belongs to which image; shared by every layout.

=======  ==========================================================================================
input    the images that a walk or a list found (``Found``), folders of labels, explicit pairs
does     names each case, pairs labels by name, never by content; two cases of one name, one inside another, two labels are refusals
output   ``Discovery``: one ``Source`` a case, sorted by name
raises   ConfigError for what the user must decide, CaseError where nothing was found
=======  ==========================================================================================
"""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ftengine.errors import CaseError, ConfigError, FailureCode
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
    notes: what of the folder was left out. refusal: why this case cannot be used before anything of it is read (its name or label is
    ambiguous); it is listed among the failed ones, and the rest goes on.
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
    refusal: CaseError | None = None

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
    """The cases found, sorted by name, what was passed over with the reason, and what else is worth saying of the sources."""

    sources: tuple[Source, ...]
    ignored: tuple[tuple[Path, str], ...]
    notes: tuple[str, ...] = ()


@dataclass
class Found:
    """An image before it is named and, unless its label is stated, paired."""

    path: Path
    relative: tuple[str, ...]  # the parts of the case's name, extension and suffix still on
    is_folder: bool = False
    series_files: tuple[Path, ...] = ()
    series: int = 0  # 1, 2, ... where a folder holds several
    notes: tuple[str, ...] = ()
    name: str = ""  # the case's name below the data set, where a list states it
    dataset: str = ""  # where a list states it
    is_listed: bool = False  # a list states the labels, none included: they are not looked for by name
    label: Path | None = None
    organ_label: Path | None = None
    split: str = ""
    label_map: tuple[tuple[int, int], ...] = ()


@dataclass
class Walk:
    """What a walk through the sources gathers."""

    images: list[Found] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def label_folders(labels: Path | None, organ_labels: Path | None) -> frozenset[Path]:
    """The folders of labels as real paths: they hold no cases. Raises ConfigError for what is no folder, or given for both."""
    for name, folder in (("labels", labels), ("organ labels", organ_labels)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{name} folder {shown(folder)}: not a folder; want one with the images' relative paths.")
    both = [real_path(folder) for folder in (labels, organ_labels) if folder is not None]
    if len(set(both)) < len(both):
        raise ConfigError(f"labels folder {shown(both[0])}: given for the organ labels too; want two folders.")
    return frozenset(both)


def assemble(
    walk: Walk,
    sources: Sequence[Path],
    *,
    dataset: str,
    labels: Path | None = None,
    organ_labels: Path | None = None,
    pairs: Mapping[Path, Path] | None = None,
) -> Discovery:
    """Name what a walk found and pair it with its labels; arguments and errors as ``discover_all``."""
    check_dataset(dataset)
    label_folders(labels, organ_labels)
    if not walk.images:
        named = ", ".join(shown(s) for s in sources) or "no source"
        passed = (
            f" ({len(walk.ignored)} paths passed over, such as {shown(walk.ignored[0][0])}: {walk.ignored[0][1]})"
            if walk.ignored
            else ""
        )
        raise CaseError(f"{named}: no CT found{passed}; want {SUPPORTED}.", "Check the path.", code=FailureCode.NO_CT)
    stated = {real_path(image): label for image, label in (pairs or {}).items()}
    for paired in stated.values():
        if paired != NO_LABEL and not paired.is_file():
            raise ConfigError(
                f"label {shown(paired)}: no such file; want the LABEL of IMAGE=LABEL to exist. Check the path."
            )
    found: dict[str, Source] = {}
    used_pairs: set[Path] = set()
    taken: set[tuple[Path, int | str]] = set()
    for image in walk.images:
        real = real_path(image.path)
        case = case_name(image, dataset)
        # of a list, two links to one file are two cases: a second reading of one scan, say
        key = (real, case if image.is_listed else image.series)
        if key in taken:
            continue  # named twice, or named and found in a folder
        taken.add(key)
        if case in found:
            found[case] = replace(found[case], refusal=_same_name(case, found[case].image, image.path))
            continue
        label = organ_label = refusal = None
        if real in stated and not image.is_listed:
            used_pairs.add(real)
        try:
            if image.is_listed:
                label = image.label
            elif real in stated:
                label = None if stated[real] == NO_LABEL else _of_one_series(stated[real], image)
            else:
                label = _beside(image) if labels is None else _in_folder(image, labels)
            organ_label = image.organ_label if organ_labels is None else _in_folder(image, organ_labels)
        except CaseError as error:
            refusal = error
        found[case] = Source(
            case,
            image.dataset or dataset,
            image.path,
            label,
            image.series_files,
            image.notes,
            organ_label,
            image.label_map,
            split=image.split,
            refusal=refusal,
        )
    _refuse_nested(found)
    if unused := sorted(set(stated) - used_pairs):
        raise ConfigError(
            f"{shown(unused[0])}: paired with a label but not among the sources. Give it as a source too."
        )
    for name, folder, used in (
        ("labels", labels, any(s.label for s in found.values())),
        ("organ labels", organ_labels, any(s.organ_label for s in found.values())),
    ):
        if folder is not None and not used:
            raise ConfigError(
                f"{name} folder {shown(folder)}: no file fits any of {len(found)} images by its relative path. Check the names on both sides."
            )
    return Discovery(tuple(found[name] for name in sorted(found)), tuple(sorted(walk.ignored)), tuple(walk.notes))


def image_stem(file_name: str) -> str | None:
    """The name without a supported extension; None for other files."""
    lower = file_name.lower()
    extension = next((e for e in EXTENSIONS if lower.endswith(e) and len(lower) > len(e)), None)
    return None if extension is None else file_name[: -len(extension)]


def is_label_name(stem: str) -> bool:
    """Whether a name (without extension) says label: ``x_seg``, ``mask``, ``x_label_abdomen``."""
    return _LABEL_WORD.search(stem) is not None


def real_path(path: Path) -> Path:
    """The path without links; unlike ``Path.resolve`` it does not raise where a link leads to itself."""
    return Path(os.path.realpath(path))


def case_name(image: Found, dataset: str) -> str:
    """``<dataset>/<name>`` of an image; ConfigError where a part of it cannot be a folder of a store."""
    if image.name:
        parts = image.name.split("/")
    else:
        parts = list(image.relative)
        if not image.is_folder:
            parts[-1] = image_stem(parts[-1]) or parts[-1]
        parts[-1] = _without_suffix(parts[-1])
    for part in parts:
        check_part(part, shown(image.path))
    name = "/".join((image.dataset or dataset, *parts, *((f"series_{image.series}",) if image.series else ())))
    return unicodedata.normalize("NFC", name)  # macOS writes the same name decomposed


def check_dataset(dataset: str) -> None:
    """ConfigError for a name of a data set that is no plain name."""
    check_part(dataset, f"dataset name {dataset!r}")
    if "/" in dataset:
        raise ConfigError(f"dataset name {dataset!r} holds a '/'; want one plain name.")


def check_part(part: str, where: str) -> None:
    """ConfigError for a name that could leave its folder or break a listing."""
    if not part or part.startswith(".") or "\\" in part or not part.isprintable():
        raise ConfigError(
            f"{where}: cannot be a case name (empty, with a leading dot, a backslash or unprintable characters). Rename it."
        )


def _without_suffix(stem: str) -> str:
    suffix = next((s for s in IMAGE_SUFFIXES if stem.endswith(s) and len(stem) > len(s)), "")
    return stem.removesuffix(suffix)


def _same_name(case: str, first: Path, second: Path) -> CaseError:
    return CaseError(
        f"two images are named {case!r}: {shown(first)} and {shown(second)}; want one.",
        "Rename one, or convert them as two datasets.",
        code=FailureCode.DUPLICATE_NAME,
    )


def _refuse_nested(found: dict[str, Source]) -> None:
    """A store keeps a case in a folder of its name: one that would lie inside another's is refused."""
    for case, source in found.items():
        parts = case.split("/")
        for length in range(2, len(parts)):
            outer = found.get("/".join(parts[:length]))
            if outer is not None:
                error = CaseError(
                    f"case {case!r} ({shown(source.image)}) would lie inside case {outer.case!r} ({shown(outer.image)}).",
                    "Rename one of the two.",
                    code=FailureCode.NESTED_NAMES,
                )
                found[case] = replace(source, refusal=error)


def _names(image: Found) -> list[str]:
    """NAME in both readings of an image's file name, as it is and without its suffix."""
    last = image.relative[-1]
    stem = last if image.is_folder else image_stem(last) or last
    return list(dict.fromkeys((stem, _without_suffix(stem))))


def _beside(image: Found) -> Path | None:
    """The label beside an image (or beside a DICOM folder)."""
    # "." has no parent by name
    folder = Path(os.path.abspath(image.path)).parent if image.path.is_dir() else image.path.parent
    candidates = [
        folder / f"{name}{suffix}{e}" for name in _names(image) for suffix in LABEL_SUFFIXES for e in EXTENSIONS
    ]
    label = _only(candidates, image)
    return None if label is None else _of_one_series(label, image)


def _in_folder(image: Found, labels: Path) -> Path | None:
    """The label of the same relative path in a folder of labels; of a folder of several series, that of its ``series_N``."""
    if image.series:
        own = labels.joinpath(*image.relative)
        label = _only([own / f"series_{image.series}{s}{e}" for s in ("", *LABEL_SUFFIXES) for e in EXTENSIONS], image)
        if label is not None:
            return label
    folder = labels.joinpath(*image.relative[:-1])
    names = _names(image)
    plain = [folder / f"{name}{suffix}{e}" for name in names for suffix in ("", *IMAGE_SUFFIXES) for e in EXTENSIONS]
    label = _only(plain, image) or _only(
        [folder / f"{name}{s}{e}" for name in names for s in LABEL_SUFFIXES for e in EXTENSIONS], image
    )
    return None if label is None else _of_one_series(label, image)


def _of_one_series(label: Path, image: Found) -> Path:
    if image.series:
        raise CaseError(
            f"label {shown(label)} for {shown(image.path)}, which holds several series; want one series a label.",
            "Move each series to its own folder.",
            code=FailureCode.AMBIGUOUS_LABEL,
        )
    return label


def _only(candidates: Sequence[Path], image: Found) -> Path | None:
    """The one candidate that exists; CaseError for several."""
    own = real_path(image.path)
    there = [path for path in dict.fromkeys(candidates) if path.is_file() and real_path(path) != own]
    if len(there) > 1:
        raise CaseError(
            f"{shown(image.path)}: several labels fit by name, {shown(there[0])} and {shown(there[1])}; want one.",
            "State it as IMAGE=LABEL or move the others away.",
            code=FailureCode.AMBIGUOUS_LABEL,
        )
    return there[0] if there else None
