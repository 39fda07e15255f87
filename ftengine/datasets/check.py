"""A folder against the registry: which entry it is, how many of its volumes are there, what lacks a label. Headers only.

=======  ==========================================================================================
input    a folder, an entry (or none: the one that fits is looked for)
does     finds the cases by name, picks those that the entry means, pairs labels by its patterns, reads the images' headers
output   ``FolderCheck``
raises   ConfigError and CaseError of the discovery: nothing found, two cases of one name
=======  ==========================================================================================
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftengine.config import RegionConfig
from ftengine.datasets.registry import DatasetEntry, Registry, plain_name, values_of
from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.volume.cases import check_dataset
from ftengine.volume.discover import EXTENSIONS, Source, discover_all, image_stem
from ftengine.volume.readers import probe

_ANY = "data"  # the data set of cases before their entry is known
_SHORTEST_NAME = 4  # shorter names (and parts of words) say nothing about a folder


@dataclass(frozen=True)
class Fit:
    """An entry that a folder may be, and what speaks for it."""

    name: str
    reasons: tuple[str, ...]
    score: int


@dataclass(frozen=True)
class FolderCheck:
    """What a folder holds of a data set.

    dataset: the entry it was compared with, None where none fits or several do. without_label, without_organs, unreadable: cases, the
    last with the reason. problems: what differs from the registry, one sentence each; none: the folder is as expected.
    """

    folder: str
    dataset: str | None
    fits: tuple[Fit, ...]
    expected: int | None
    found: int
    without_label: tuple[str, ...]
    without_organs: tuple[str, ...]
    unreadable: dict[str, str]
    ignored: dict[str, int]
    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 as expected, 1 not."""
        return 1 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "folder": self.folder,
            "dataset": self.dataset,
            "fits": [{"name": fit.name, "reasons": list(fit.reasons)} for fit in self.fits],
            "expected": self.expected,
            "found": self.found,
            "without_label": list(self.without_label),
            "without_organ_labels": list(self.without_organs),
            "unreadable": self.unreadable,
            "ignored": self.ignored,
            "problems": list(self.problems),
        }


def find_dataset(
    folder: Path,
    entry: DatasetEntry,
    *,
    labels: Path | None = None,
    region: RegionConfig | None = None,
    dataset: str | None = None,
) -> list[Source]:
    """The cases of a data set in its folder, named and paired as the entry says, sorted by name.

    labels: a folder of label files with the images' relative paths, instead of the entry's pattern. region: give its label values to each
    case's ``label_map``. dataset: the name in the store, instead of the entry's. Raises as ``discover_all`` does; CaseError where the folder holds CT but none that the entry means.
    """
    sources = _cases_of(entry, _discover(folder, labels)[0], folder, labels)
    if dataset is not None:
        check_dataset(dataset)
        sources = [replace(s, case=f"{dataset}{s.case.removeprefix(entry.name)}", dataset=dataset) for s in sources]
    if not sources:
        raise CaseError(
            f"{folder}: holds no volume of {entry.name}{_meant(entry)}.", "Check the path.", code=FailureCode.NO_CT
        )
    if region is not None and entry.label_map is not None:
        values = values_of(entry.label_map, region)
        sources = [replace(s, label_map=values) for s in sources]
    return sources


def check_folder(
    folder: Path,
    registry: Registry,
    *,
    dataset: str | None = None,
    labels: Path | None = None,
    on_start: Callable[[int], None] = lambda _total: None,
    on_case: Callable[[str], None] = lambda _case: None,
) -> FolderCheck:
    """Compare a folder with an entry, or with the one that fits it best; reads names and headers, no voxel.

    on_start is called with the number of images whose headers will be read, on_case after each.
    """
    sources, ignored = _discover(folder, labels)
    fits: tuple[Fit, ...] = () if dataset is not None else _fits(folder, registry, sources, labels)
    entry = registry.get(dataset) if dataset is not None else None
    problems = []
    if dataset is None:
        best = [fit for fit in fits if fit.score == max(f.score for f in fits)]
        if len(best) == 1:
            entry = registry.get(best[0].name)
        elif best:
            problems.append(f"fits {', '.join(f.name for f in best)} alike; name one with --dataset")
        else:
            problems.append("fits no entry of the registry; name one with --dataset, or add yours with --registry")
    chosen = sources if entry is None else _cases_of(entry, sources, folder, labels)
    on_start(len(chosen))
    unreadable = {}
    for source in chosen:
        try:
            probe(source.image, series_files=source.series_files)
        except CaseError as error:
            unreadable[source.case] = str(error)
        on_case(source.case)
    without_label = tuple(s.case for s in chosen if s.label is None)
    without_organs = () if entry is None else _without_organs(entry, chosen, folder)
    expected = None if entry is None else entry.volumes
    if entry is not None and not chosen:
        problems.append(f"no volume of {entry.name} found{_meant(entry)}")
    if expected is not None and chosen and len(chosen) != expected:
        problems.append(f"{len(chosen)} volumes found, {expected} expected")
    if entry is not None and entry.tumor is not None and without_label:
        problems.append(f"{len(without_label)} volumes without a tumour label, such as {without_label[0]}")
    if without_organs:
        problems.append(f"{len(without_organs)} volumes without all organ labels, such as {without_organs[0]}")
    if unreadable:
        problems.append(f"{len(unreadable)} images whose headers cannot be read, such as {next(iter(unreadable))}")
    return FolderCheck(
        str(folder),
        None if entry is None else entry.name,
        fits,
        expected,
        len(chosen),
        without_label,
        without_organs,
        unreadable,
        ignored,
        tuple(problems),
    )


def _discover(folder: Path, labels: Path | None) -> tuple[tuple[Source, ...], dict[str, int]]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; want the folder of a downloaded data set.")
    found = discover_all([folder], labels=labels, dataset=_ANY)
    return found.sources, dict(sorted(Counter(reason for _, reason in found.ignored).items()))


def _cases_of(entry: DatasetEntry, sources: Sequence[Source], folder: Path, labels: Path | None) -> list[Source]:
    """The sources that an entry means, renamed and paired by its patterns."""
    cases = []
    for source in sources:
        if not _is_meant(entry, source, folder):
            continue
        label = source.label
        if labels is None and entry.image is not None and entry.label is not None:
            label = _partner(source, folder, entry.image, entry.label)
        case = f"{entry.name}{source.case.removeprefix(_ANY)}"
        cases.append(replace(source, case=case, dataset=entry.name, label=label))
    return cases


def _is_meant(entry: DatasetEntry, source: Source, folder: Path) -> bool:
    if entry.layout == "dicom":
        return bool(source.series_files)
    if entry.image is not None:
        return not source.series_files and _match(source, folder, entry.image) is not None
    if entry.layout == "nnunet":
        return (image_stem(source.image.name) or "").endswith("_0000")
    if entry.layout == "msd":
        return source.image.parent.name.startswith("images")
    return True


def _meant(entry: DatasetEntry) -> str:
    """What an entry wants to see, for messages."""
    if entry.image is not None:
        return f" (want files named {entry.image}, in any image format)"
    wanted = {
        "dicom": " (want DICOM series)",
        "nnunet": " (want images that end in _0000)",
        "msd": " (want images in imagesTr)",
    }
    return wanted.get(entry.layout or "", "")


def _match(source: Source, folder: Path, pattern: str) -> tuple[Path, str] | None:
    """Where a pattern begins and what its ``{id}`` is, for an image below ``folder`` at any depth."""
    relative = source.image.relative_to(folder)
    stem = image_stem(relative.name)
    if stem is None:
        return None
    before, after = (re.escape(part) for part in pattern.split("{id}"))
    found = re.fullmatch(rf"(?P<top>(?:.*/)?){before}(?P<id>[^/]+){after}", relative.with_name(stem).as_posix())
    return None if found is None else (folder / found["top"], found["id"])


def _partner(source: Source, folder: Path, image: str, other: str) -> Path | None:
    """The file that belongs to an image by two patterns, in any format; None where it is not there."""
    found = _match(source, folder, image)
    if found is None:
        return None
    top, name = found
    stem = other.replace("{id}", name)
    return next((file for e in EXTENSIONS if (file := top / f"{stem}{e}").is_file()), None)


def _without_organs(entry: DatasetEntry, cases: Sequence[Source], folder: Path) -> tuple[str, ...]:
    if entry.image is None:
        return ()
    image = entry.image
    return tuple(s.case for s in cases if any(_partner(s, folder, image, o.file) is None for o in entry.organ_labels))


def _fits(folder: Path, registry: Registry, sources: Sequence[Source], labels: Path | None) -> tuple[Fit, ...]:
    """Entries that a folder may be, best first: the name counts most, then the number of volumes, then the file names.

    File names alone decide nothing: all tasks of the Decathlon have the same.
    """
    parts = [plain_name(part) for part in folder.resolve().parts[-2:]]
    fits = []
    for entry in registry.entries.values():
        cases = _cases_of(entry, sources, folder, labels)
        reasons, score = [], 0
        if any(name in part for name in entry.names if len(name) >= _SHORTEST_NAME for part in parts):
            reasons.append("the folder's name")
            score += 3
        if entry.volumes is not None and len(cases) == entry.volumes:
            reasons.append(f"the number of volumes, {entry.volumes}")
            score += 2
        if score and cases and entry.image is not None:
            reasons.append(f"files named {entry.image}")
            score += 1
        if score and (cases or score >= 3):
            fits.append(Fit(entry.name, tuple(reasons), score))
    return tuple(sorted(fits, key=lambda fit: (-fit.score, fit.name)))
