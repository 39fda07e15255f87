"""Pseudo organ labels for the volumes of a store: which of them, one after another, committed one by one.

=======  ==========================================================================================
input    a store, a ``Labeler`` for it, which volumes
does     reads a volume, labels it, puts tumours that are known on top, writes label and row
output   ``LabelReport``
raises   ConfigError for a selection without a volume; StoreError where the store cannot be written: what is committed stays
=======  ==========================================================================================
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ftengine.errors import CaseError, ConfigError, FailureCode, FtengineError, StoreError
from ftengine.organs.labeler import Labeler
from ftengine.store import index
from ftengine.store.case import unwritable
from ftengine.store.convert import ROWS_PER_COMPACTION
from ftengine.store.location import Location, locate
from ftengine.store.reader import Store, open_store
from ftengine.store.relabel import replace_label

Tool = Literal["checkpoint", "lungmask", "totalsegmentator"]
Status = Literal["labelled", "skipped", "failed", "planned"]


@dataclass(frozen=True)
class Selection:
    """Which volumes are labelled: all criteria together.

    Volumes without a label always. under_tumors: also those whose label holds no organ: its tumours stay, the organs go under them.
    overwrite: also those with organs in their label, from a file or from another tool; tumours stay here, too.
    """

    cases: tuple[str, ...] = ()  # none: all
    split: str | None = None
    dataset: str | None = None
    under_tumors: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class LabelOutcome:
    """What became of one volume. reason, advice, code: why it failed; reason also why it was skipped."""

    case: str
    status: Status
    reason: str = ""
    advice: str = ""
    code: str = ""
    class_voxels: dict[str, int] = field(default_factory=dict)  # of the label as it is now, by class name
    seconds: float = 0.0


@dataclass
class LabelReport:
    """All outcomes of one run, ordered by case."""

    store: str
    provenance: str
    outcomes: list[LabelOutcome] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, status: Status) -> int:
        """Number of volumes with a status."""
        return sum(o.status == status for o in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some failed, 4 all failed."""
        return 0 if not self.count("failed") else 4 if self.count("failed") == len(self.outcomes) else 1

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        statuses: tuple[Status, ...] = ("labelled", "skipped", "failed", "planned")
        counts: dict[str, int] = {status: self.count(status) for status in statuses}
        volumes = [asdict(o) for o in self.outcomes]
        return {
            "store": self.store,
            "provenance": self.provenance,
            "seconds": self.seconds,
            **counts,
            "volumes": volumes,
        }


def open_labeler(tool: str, weights: Path, store: Store, device: torch.device) -> Labeler:
    """The tool of a name, with its weights, for the volumes of a store. Raises ConfigError where one of them does not fit."""
    if tool == "checkpoint":
        from ftengine.organs.with_checkpoint import CheckpointLabeler

        return CheckpointLabeler(weights, store, device)
    if tool == "lungmask":
        from ftengine.organs.with_lungmask import LungmaskLabeler

        return LungmaskLabeler(weights, store, device)
    if tool == "totalsegmentator":
        from ftengine.organs.with_totalsegmentator import TotalSegmentatorLabeler

        return TotalSegmentatorLabeler(weights, store, device)
    raise ConfigError(f"--with {tool}: want checkpoint, lungmask or totalsegmentator.")


def selected_cases(store: Store, selection: Selection) -> list[str]:
    """The cases that a selection names, labelled or not.

    Raises ConfigError where it names none and for a subset of another store, StoreError for an unknown case.
    """
    if store.volumes is not store.location:
        raise ConfigError(
            f"{store.location}: is a subset of {store.volumes} and holds no volumes of its own; label that store and make the subset again."
        )
    for case in selection.cases:
        store.row_number(case)
    columns = (store.column(name).to_pylist() for name in ("case", "split", "dataset"))
    wanted = set(selection.cases)
    cases = [
        case
        for case, split, dataset in zip(*columns, strict=True)
        if (not wanted or case in wanted) and selection.split in (None, split) and selection.dataset in (None, dataset)
    ]
    if not cases:
        named = [f"--{n} {v}" for n, v in (("split", selection.split), ("dataset", selection.dataset)) if v is not None]
        raise ConfigError(
            f"{store.location}: no volume fits {' and '.join(named) or 'the selection'}. 'ftengine store info' lists them."
        )
    return cases


def label_store(
    place: str | Path | Location,
    labeler: Labeler,
    selection: Selection,
    *,
    dry_run: bool = False,
    on_start: Callable[[str], None] = lambda _case: None,
    on_outcome: Callable[[LabelOutcome], None] = lambda _outcome: None,
) -> LabelReport:
    """Label the selected volumes; one that has a label of the same provenance, or one that ``selection`` keeps, is skipped.

    A volume that cannot be labelled is reported with the reason and the rest goes on. Killed or interrupted anywhere, every volume of the
    store has its old label or its new one, and the same call goes on to the same result. dry_run: predicts and writes nothing.
    ``on_start`` is called for each volume that is being labelled, ``on_outcome`` for every one.
    """
    started = time.perf_counter()
    location = locate(place)
    report = LabelReport(str(location), labeler.provenance)

    def note(outcome: LabelOutcome) -> None:
        report.outcomes.append(outcome)
        on_outcome(outcome)

    if dry_run:
        store = open_store(location)
        for case in selected_cases(store, selection):
            reason = _why_kept(store, case, labeler, selection)
            note(LabelOutcome(case, "skipped", reason) if reason else LabelOutcome(case, "planned"))
    else:
        try:
            with location.only_writer():
                location.clear_scratch()
                index.compact_index(location)
                try:
                    _label_all(open_store(location), labeler, selection, on_start, note)
                finally:
                    index.compact_index(location)
        except OSError as error:
            raise unwritable(location, error) from error
    report.seconds = time.perf_counter() - started
    return report


def _label_all(
    store: Store,
    labeler: Labeler,
    selection: Selection,
    on_start: Callable[[str], None],
    note: Callable[[LabelOutcome], None],
) -> None:
    num_rows = 0
    for case in selected_cases(store, selection):
        reason = _why_kept(store, case, labeler, selection)
        if reason:
            note(LabelOutcome(case, "skipped", reason))
            continue
        on_start(case)
        started = time.perf_counter()
        try:
            outcome = _label(store, case, labeler)
        except CaseError as error:
            outcome = LabelOutcome(case, "failed", error.reason, error.advice, error.code.value)
        note(replace(outcome, seconds=time.perf_counter() - started))
        if outcome.status == "labelled":
            num_rows += 1
            if num_rows % ROWS_PER_COMPACTION == 0:
                index.compact_index(store.location)


def _why_kept(store: Store, case: str, labeler: Labeler, selection: Selection) -> str:
    """Why a volume keeps the label it has; "" for one that is to be labelled."""
    if not store.has_label(case):
        return ""
    row = store.row_number(case)
    made_by = store.column("label_provenance")[row].as_py()
    if made_by == labeler.provenance:
        return "already labelled by this tool with these weights"
    class_voxels = store.column("class_voxels")[row].as_py()
    if not any(class_voxels[organ["organ"]] for organ in store.organs.values()):
        return (
            "" if selection.under_tumors or selection.overwrite else "its label holds no organ (--under-tumors adds it)"
        )
    if selection.overwrite:
        return ""
    return f"has organs from {'another tool or other weights' if made_by else 'its label file'} (--overwrite replaces them)"


def _label(store: Store, case: str, labeler: Labeler) -> LabelOutcome:
    """Label and commit one volume."""
    try:
        patch = store.read_volume(case)
    except StoreError as error:
        advice = "Then label it; 'ftengine store verify' says what else is damaged."
        raise CaseError(str(error), advice, code=FailureCode.UNREADABLE) from error
    try:
        label = labeler(patch.image, store.spacing_mm_zyx)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CaseError(
            f"{case}: out of memory while its organs were looked for ({patch.image.shape} voxels).",
            "Use --device cpu or a machine with more memory.",
            code=FailureCode.OUT_OF_MEMORY,
        ) from error
    except FtengineError:
        raise
    except Exception as error:  # other people's code: one odd volume must not end the run
        raise CaseError(
            f"{case}: an unexpected {type(error).__name__} in the tool ({' '.join(str(error).split())[:160]}).",
            "Leave the volume out with --case, or use another tool.",
            code=FailureCode.INTERNAL,
        ) from error
    organs = [organ["organ"] for organ in store.organs.values()]
    if label.shape != patch.image.shape or label.dtype != np.uint8 or not np.isin(label, [0, *organs]).all():
        raise CaseError(
            f"{case}: the tool gave {label.dtype} {label.shape} with other values than {organs}; want uint8 {patch.image.shape}.",
            "Please report it with the tool's version.",
            code=FailureCode.INTERNAL,
        )
    if not label.any():
        raise CaseError(
            f"{case}: none of {', '.join(store.organs)} was found; a label without an organ would teach that there is none.",
            "Look at the CT: leave it out, or use another tool.",
            code=FailureCode.NO_ORGAN,
        )
    tumors = np.isin(patch.label, store.tumor_values)  # a volume without a label reads as 0
    label[tumors] = patch.label[tumors]
    had = store.row(case)["annotation"]
    row = replace_label(
        store,
        case,
        patch.image,
        label,
        annotation="tumor" if had == "tumor" else "organ",
        label_provenance=labeler.provenance,
    )
    counts: Sequence[int] = row["class_voxels"]
    return LabelOutcome(
        case, "labelled", class_voxels={name: counts[value] for name, value in store.labels.items() if value}
    )
