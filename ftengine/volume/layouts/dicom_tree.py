"""A tree of DICOM studies: each axial CT series is a case, however its files are spread over folders or mixed with others.

=======  ==========================================================================================
input    the folder above the studies
does     reads headers only; groups by SeriesInstanceUID (files without one: by folder), then by size, orientation and pixel spacing;
         takes stacks of axial slices; passes over scouts, derived and secondary images, stubs and what is no CT, each with the reason
output   one ``Found`` a stack, named by the deepest folder that holds all its files, never by a tag
raises   ConfigError for a folder that cannot be listed
=======  ==========================================================================================

A CT slice that is damaged makes the series fail when it is read, if it belongs, or may belong, to it: a lost slice is never skipped over.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.volume.cases import Found, Walk, image_stem, is_label_name, real_path
from ftengine.volume.dicom import SliceHeader, is_axial, looks_like_dicom, may_be_dicom, read_slice_header, stacked
from ftengine.volume.discover import folders
from ftengine.volume.layouts.listing import entries
from ftengine.volume.values import MIN_AXIS_VOXELS

SCOUT = "a scout (ImageType LOCALIZER)"
SECONDARY = "derived after the scan (ImageType SECONDARY); --layout folder takes it"
NOT_AXIAL = "a coronal or sagittal slice"
STUB = f"of a series of fewer than {MIN_AXIS_VOXELS} slices"

Place = tuple[str, ...]  # a folder's path below the tree


@dataclass
class _Series:
    """The files of one SeriesInstanceUID, or of one folder where they have none."""

    slices: list[SliceHeader] = field(default_factory=list)
    broken: list[SliceHeader] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Stack:
    """What will be one case: its files, and those that make it fail."""

    place: Place
    files: tuple[Path, ...]
    is_volume: bool
    notes: tuple[str, ...]


def find_dicom(root: Path, walk: Walk, *, skip: Collection[Path] = ()) -> None:
    """Add the CT series below ``root`` to ``walk``. skip: real folders to leave out, such as those of labels."""
    places: dict[Path, Place] = {}
    all_series: dict[str | Place, _Series] = defaultdict(_Series)
    homeless: dict[Place, list[SliceHeader]] = defaultdict(list)  # damaged, of a series that nobody knows
    for folder, place in folders(root, set(skip) - {real_path(root)}):
        places[folder] = place
        try:
            inside = [path for path in entries(folder) if not path.is_dir()]
        except ConfigError:
            walk.images.append(Found(folder, place, is_folder=True))  # reading it says why it cannot be listed
            continue
        has_dicom = any(looks_like_dicom(path) for path in inside)  # elsewhere, what cannot be opened is no lost slice
        for path in inside:
            if not (has_dicom and may_be_dicom(path)):
                walk.ignored.append((path, _not_dicom(path)))
                continue
            header = read_slice_header(path)
            unwanted = header.other or _unwanted(header)
            if unwanted:
                walk.ignored.append((path, unwanted))
            if not header.other and not unwanted and header.problem and not header.series:
                homeless[place].append(header)
            elif not header.other:
                series = all_series[header.series or place]
                if unwanted:
                    series.left_out[unwanted] += 1
                else:
                    (series.broken if header.problem else series.slices).append(header)

    _settle(homeless, all_series, places)
    stacks = [stack for series in all_series.values() for stack in _stacks(series, places, walk)]
    walk.images += _named(root, stacks, walk)


def _not_dicom(path: Path) -> str:
    stem = image_stem(path.name)
    if stem is None:
        return "not DICOM"
    return "a label by its name" if is_label_name(stem) else "an image that is not DICOM; --layout folder takes it"


def _unwanted(header: SliceHeader) -> str:
    """Why an image that claims to be CT is no slice of a volume, by its ImageType; '' where it may be one."""
    if "LOCALIZER" in header.image_type:
        return SCOUT
    return SECONDARY if header.image_type[1:2] == ("SECONDARY",) else ""


def _settle(
    homeless: dict[Place, list[SliceHeader]], all_series: dict[str | Place, _Series], places: dict[Path, Place]
) -> None:
    """Damaged files of an unknown series go to every series that has a file in their folder, else they are a series of their own."""
    if not homeless:
        return
    by_place: dict[Place, set[str | Place]] = defaultdict(set)
    for key, series in all_series.items():
        for header in (*series.slices, *series.broken):
            by_place[places[header.path.parent]].add(key)
    for place, headers in homeless.items():
        for key in by_place.get(place) or {place}:
            all_series[key].broken += headers


def _stacks(series: _Series, places: dict[Path, Place], walk: Walk) -> list[_Stack]:
    """The cases of one series; what of it is no volume is passed over."""
    volumes: list[tuple[SliceHeader, ...]] = []
    stubs: list[SliceHeader] = []
    for stack in stacked(series.slices):
        reason = "" if is_axial(stack[0]) else NOT_AXIAL
        if not reason and len(stack) >= MIN_AXIS_VOXELS:
            volumes.append(stack)
        elif not reason and series.broken:
            stubs += stack  # with its damaged slices it may have been a volume
        else:
            _pass_over(stack, reason or STUB, series, walk)
    if volumes and stubs:
        _pass_over(stubs, STUB, series, walk)
    if not volumes and series.broken:
        volumes, is_volume = [tuple(stubs)], False
    else:
        is_volume = True
    notes = tuple(
        f"{count:,} files of the series left out: {reason}" for reason, count in sorted(series.left_out.items())
    )
    return [
        _Stack(_common(files, places), tuple(files), is_volume, notes)
        for files in (sorted({h.path for h in (*stack, *series.broken)}) for stack in volumes)
    ]


def _pass_over(headers: Sequence[SliceHeader], reason: str, series: _Series, walk: Walk) -> None:
    walk.ignored += [(header.path, reason) for header in headers]
    series.left_out[reason] += len(headers)


def _common(files: Sequence[Path], places: dict[Path, Place]) -> Place:
    """The deepest folder that holds all files."""
    here = [places[file.parent] for file in files]
    first, last = min(here), max(here)  # what these two share, all between them share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _named(root: Path, stacks: Sequence[_Stack], walk: Walk) -> list[Found]:
    """Stacks as cases; several of one folder, or one above the folders of others, are numbered."""
    by_place: dict[Place, list[_Stack]] = defaultdict(list)
    for stack in sorted(stacks, key=lambda s: s.files):
        by_place[stack.place].append(stack)
    found: list[Found] = []
    above = {place[:length] for place in by_place for length in range(len(place))}
    for place, here in by_place.items():
        whole = [stack for stack in here if stack.is_volume]
        for stack in here if whole else ():
            if not stack.is_volume:
                walk.ignored += [(path, "a damaged CT file of a series without a whole stack") for path in stack.files]
        usable = whole or here[:1]
        if not whole:  # nothing here can be read: reading all of it says why
            files = tuple(sorted({path for stack in here for path in stack.files}))
            usable = [_Stack(place, files, is_volume=False, notes=here[0].notes)]
        is_numbered = len(usable) > 1 or (place in above and place != ())
        found += [
            Found(
                root.joinpath(*place),
                place or (Path(os.path.abspath(root)).name,),
                is_folder=True,
                series_files=stack.files,
                series=number * is_numbered,
                notes=stack.notes,
            )
            for number, stack in enumerate(usable, start=1)
        ]
    return found
