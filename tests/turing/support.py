"""What tests of the reader study share: a store with real tumours and healthy organs, and studies of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftengine.config import Config
from ftengine.store.reader import Store
from ftengine.turing.build import Built, ReaderName, StudyOptions, build_study
from ftengine.turing.cases import CaseDrawer, CaseOptions
from ftengine.turing.study import StudyFolder
from tests.support import small_config

SHAPE = (20, 24, 28)
TWO_READERS = (ReaderName("Ada", "Junior"), ReaderName("Ben", "Senior"))


def study_config() -> Config:
    """Fixed contrast, small tumours: no network has to be trained."""
    return small_config(
        synthesis__sizes={"small": {"radius_mm": (5.0, 8.0), "warp_sigma_mm": (0.75, 1.5)}},
        synthesis__size_weights={"small": 1.0},
    )


def drawer_of(store: Store, options: CaseOptions, *, seed: int = 0, **networks: Any) -> CaseDrawer:
    return CaseDrawer(study_config(), store, store, options, seed=seed, **networks)


def make_study(
    store: Store,
    folder: Path,
    *,
    per_type: int = 4,
    readers: Sequence[ReaderName] = TWO_READERS,
    seed: int = 0,
    repeats: int = 0,
    training_cases: int = 0,
    case_options: CaseOptions | None = None,
    name: str = "study",
) -> tuple[Built, StudyFolder]:
    """A study of liver tumours in ``folder``, its key beside it."""
    cut = case_options or CaseOptions(SHAPE)
    options = StudyOptions(per_type, {"liver": "liver"}, readers, seed, repeats, training_cases)
    built = build_study(
        drawer_of(store, cut, seed=seed), study_config(), cut, options, folder / name, folder / f"{name}.key"
    )
    return built, StudyFolder.open(built.out)


def answer_of(folder: StudyFolder, reader: int, number: int, **changes: Any) -> dict[str, Any]:
    """What the page would send for the ``number``-th showing of the ``reader``-th reader."""
    person = folder.study.readers[reader]
    base = {
        "reader": person.id,
        "item": person.showings[number].item,
        "answer_id": f"{reader:016x}{number:016x}",
        "synthetic": number % 2 == 0,
        "confidence": 1 + number % 5,
        "comment": f"comment {number}",
        "click_zyx": [1, 2, 3],
        "visit": f"{number:032x}",
        "seconds": 1.5 + number,
    }
    return base | changes
