"""Is what lies in a store what was put there? Every chunk against its checksum, every row against its arrays, and against the sources.

=======  ==========================================================================================
input    an open ``Store``; for the deep check the sources as discovered again
does     reads every voxel; counts classes; compares with the row; converts the source anew and compares voxel by voxel
output   ``Finding`` for each volume: sound, or what is wrong and where
raises   nothing for a damaged volume; StoreError where the store itself cannot be opened (before this)
=======  ==========================================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, StoreError
from ftengine.geometry import IntZYX
from ftengine.store import index, layout
from ftengine.store.case import ConvertOptions, prepare
from ftengine.store.reader import Store
from ftengine.types import Patch
from ftengine.volume.discover import Source

Verdict = Literal["sound", "damaged", "differs", "no source"]
_MAX_LISTED = 5


@dataclass(frozen=True)
class Finding:
    """What the check of one volume came to; ``problem`` says where and what, "" for a sound one."""

    case: str
    verdict: Verdict
    problem: str = ""


def verify_store(
    store: Store,
    *,
    sources: Sequence[Source] | None = None,
    on_finding: Callable[[Finding], None] = lambda _finding: None,
) -> list[Finding]:
    """Check every volume; with ``sources`` also against the files it came from.

    A source is converted with the options that its row was made with.
    """
    by_case = None if sources is None else {source.case: source for source in sources}
    findings = []
    for case in store.cases:
        finding = _check(store, case)
        if finding.verdict == "sound" and by_case is not None:
            finding = _compare(store, case, by_case)
        findings.append(finding)
        on_finding(finding)
    return findings


def _check(store: Store, case: str) -> Finding:
    """Read a volume whole and hold it against its row."""
    try:
        patch = store.read_volume(case)
    except StoreError as error:
        damaged = _damaged_chunks(store, case)
        where = f" Damaged or missing inner chunks (index z, y, x): {damaged}." if damaged else ""
        return Finding(case, "damaged", f"{error}{where}")
    row = store.row(case)
    problems = [
        f"class_voxels of the row are {row['class_voxels']}, the label holds {counted}"
        for counted in [_class_voxels(patch, len(row["class_voxels"]))]
        if store.has_label(case) and counted != row["class_voxels"]
    ]
    percentiles = index.hu_percentiles(patch.image).astype(np.float32)
    if not np.array_equal(percentiles, np.array(row["hu_percentiles"], dtype=np.float32)):
        problems.append(f"hu_percentiles of the row are {row['hu_percentiles']}, the image has {percentiles.tolist()}")
    prefix = layout.volume_path(case)
    stored_bytes = sum(store.volumes.size_bytes(key) for key in store.volumes.keys(prefix, recursive=True))
    if stored_bytes != row["stored_bytes"]:
        problems.append(f"stored_bytes of the row is {row['stored_bytes']}, the files have {stored_bytes}")
    if problems:
        return Finding(
            case, "damaged", f"{store.volumes.child(prefix)}: {'; '.join(problems)}. Convert this case again."
        )
    return Finding(case, "sound")


def _class_voxels(patch: Patch, num_classes: int) -> list[int]:
    counts: list[int] = np.bincount(patch.label.ravel(), minlength=num_classes).tolist()
    return counts


def _damaged_chunks(store: Store, case: str) -> str:
    """The inner chunks of a volume that cannot be read, a few of them by name."""
    shape = store.shape_zyx(case)
    bad: list[IntZYX] = []
    for place in np.ndindex(layout.chunks_per_axis(shape)):
        z, y, x = (int(p) * layout.CHUNK for p in place)
        size = (min(layout.CHUNK, shape[0] - z), min(layout.CHUNK, shape[1] - y), min(layout.CHUNK, shape[2] - x))
        try:
            store.read(case, (z, y, x), size)
        except StoreError:
            bad.append((int(place[0]), int(place[1]), int(place[2])))
    listed = ", ".join(map(str, bad[:_MAX_LISTED]))
    return f"{listed} and {len(bad) - _MAX_LISTED} more" if len(bad) > _MAX_LISTED else listed


def _compare(store: Store, case: str, by_case: Mapping[str, Source]) -> Finding:
    """Convert the source again, in memory, and compare every voxel."""
    source = by_case.get(case)
    if source is None:
        return Finding(case, "no source", f"{case}: no source of this name among those given.")
    try:
        options = ConvertOptions.of_row(store.row(case)["conversion"])
        wanted = prepare(source, options, store.spacing_mm_zyx, store.labels.values())
    except (CaseError, OSError) as error:
        return Finding(case, "no source", f"{case}: its source cannot be read any more: {error}")
    patch = store.read_volume(case)
    pairs: list[tuple[str, NDArray[Any], NDArray[Any]]] = [("image", patch.image, wanted.image_hu)]
    if wanted.label is not None or store.has_label(case):
        label = wanted.label if wanted.label is not None else np.zeros_like(patch.label)
        have = patch.label
        if store.row(case)["label_provenance"]:  # organs of a pseudo label stand in no file; tumours do
            have, label = (np.where(np.isin(array, store.tumor_values), array, 0) for array in (have, label))
        pairs.append(("label", have, label))
    for name, have, want in pairs:
        if have.shape != want.shape:
            return Finding(case, "differs", f"{case}: {name} has shape {have.shape}, its source gives {want.shape}.")
        num_different = int(np.count_nonzero(have != want))
        if num_different:
            first = tuple(int(i) for i in np.argwhere(have != want)[0])
            return Finding(
                case,
                "differs",
                f"{case}: {num_different:,} voxels of the {name} differ from its source, the first at (z, y, x) {first}. "
                "Convert this case again.",
            )
    return Finding(case, "sound")
