"""The phantoms as files, the store made of them, and what is known of the test set's tumours.

One store holds everything; which data sets a run draws from is said by ``loader.dataset_weights``. Patients: every set has case numbers of
its own, but the oracle's are those of the unlabelled set, ill.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftengine.bench.experiments.few_labels.protocol import Phantoms, Protocol
from ftengine.bench.experiments.few_labels.scores import TrueTumor
from ftengine.errors import StoreError

STORE, TRUTH = "store.zarr", "truth.json"
UNLABELLED, ORACLE, TEST = "unlabelled", "oracle", "test"
ORGAN, TUMOR = "liver", "liver_tumor"
_ONLY_LIVER = ((3, 0), (4, 0), (5, 0), (6, 0))  # a specialist: other organs become background
# test: of 5000, 5100 ... the first whose tumours come near the shares of their kinds (42 hypodense, 7 hyperdense, 7 with a rim); nothing else was
# looked at, and 5000 has two hyperdense ones, of which no share could be taken
_FIRST_CASE = {UNLABELLED: 1000, ORACLE: 1000, TEST: 5900}
_FIRST_LABELLED_CASE, _CASES_A_SEED = 10_000, 100


@dataclass(frozen=True)
class Truth:
    """A test volume: its scanner and its tumours."""

    scanner: int
    tumors: tuple[TrueTumor, ...]


def labelled(seed: int) -> str:
    """The data set of the annotated volumes of a seed."""
    return f"labelled-{seed}"


def weights(seed: int, phantoms: Phantoms, *, with_oracle: bool) -> dict[str, float]:
    """``loader.dataset_weights`` of a run: the seed's own annotated volumes, with the oracle's where asked."""
    others = {labelled(other): 0.0 for other in range(phantoms.num_seeds) if other != seed}
    return others | ({} if with_oracle else {ORACLE: 0.0})


def make_data(folder: Path, protocol: Protocol) -> None:
    """Draw and convert all sets into ``folder/store.zarr``, and write ``folder/truth.json``; what is there already is kept."""
    # a machine that only trains on a store that was made elsewhere need not have what drawing and converting want
    from ftengine.volume.phantom import SCANNERS

    phantoms, every = protocol.phantoms, range(len(SCANNERS))
    for seed in range(phantoms.num_seeds):
        first = _FIRST_LABELLED_CASE + _CASES_A_SEED * seed
        _convert(folder, protocol, labelled(seed), first, phantoms.num_labelled, phantoms.seen_scanners, split="train")
    for name, num, num_ill in (
        (UNLABELLED, phantoms.num_unlabelled, 0),
        (ORACLE, phantoms.num_unlabelled, phantoms.num_unlabelled),
    ):
        _convert(folder, protocol, name, _FIRST_CASE[name], num, every, split="train", num_ill=num_ill)
    num = phantoms.num_test + phantoms.num_test_healthy
    _convert(folder, protocol, TEST, _FIRST_CASE[TEST], num, every, split="test", num_ill=phantoms.num_test)
    _write_truth(folder, protocol, every)
    shutil.rmtree(folder / "phantoms", ignore_errors=True)


def read_truth(folder: Path) -> dict[str, Truth]:
    """What is known of the test volumes, by case of the store. Raises StoreError where the data have not been made."""
    file = folder / TRUTH
    if not file.is_file():
        raise StoreError(f"{file}: is missing; make the data of the experiment first ('ftengine bench few-labels').")
    document: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {
        case: Truth(known["scanner"], tuple(TrueTumor(tuple(t["center_zyx"]), t["kind"]) for t in known["tumors"]))
        for case, known in document.items()
    }


def _drawing(protocol: Protocol) -> dict[str, Any]:
    from ftengine.volume.phantom import TumorSpec

    phantoms = protocol.phantoms
    return {
        "region": "abdomen",
        "seed": phantoms.seed,
        "shape_zyx": phantoms.shape_zyx,
        "spacing_mm_zyx": protocol.spacing_mm_zyx,
        "tumors": TumorSpec(phantoms.num_tumors, phantoms.diameter_mm, (ORGAN,), phantoms.contrast_factor),
    }


def _convert(
    folder: Path,
    protocol: Protocol,
    name: str,
    first_case: int,
    num: int,
    scanners: Sequence[int],
    *,
    split: str,
    num_ill: int | None = None,
) -> None:
    from ftengine.store.case import ConvertOptions
    from ftengine.store.convert import convert_cases
    from ftengine.volume.discover import discover
    from ftengine.volume.phantom import write_phantom_dataset

    place = folder / "phantoms" / name
    write_phantom_dataset(
        place,
        num_volumes=num,
        num_with_tumors=num_ill,
        first_case=first_case,
        scanners=scanners,
        **_drawing(protocol),
    )
    options = ConvertOptions(annotation="organ" if name == UNLABELLED else "tumor", split=split, label_map=_ONLY_LIVER)
    region = protocol.config({}).region
    report = convert_cases(discover([place], dataset=name), folder / STORE, region, options=options)
    if report.exit_code:
        raise StoreError(
            f"{folder / STORE}: phantoms did not convert: {[o.reason for o in report.outcomes if o.reason]}. Remove the folder and start anew."
        )


def _write_truth(folder: Path, protocol: Protocol, scanners: Sequence[int]) -> None:
    from ftengine.store.reader import open_store
    from ftengine.volume.phantom import make_phantom

    store = open_store(folder / STORE)
    drawing = _drawing(protocol)
    spec = drawing.pop("tumors")
    document = {}
    for case in (c for c in store.cases if c.startswith(f"{TEST}/")):
        number = int(case.rsplit("_", maxsplit=1)[1])
        k = number - _FIRST_CASE[TEST]
        scanner = scanners[k % len(scanners)]
        is_ill = k < protocol.phantoms.num_test
        drawn = make_phantom(case=number, scanner=scanner, tumors=spec if is_ill else None, **drawing)
        origin_zyx = drawn.grid.matrix[2::-1, 3].tolist()
        tumors = [
            {
                "center_zyx": [
                    (c - o) / s for c, o, s in zip(t.center_mm_zyx, origin_zyx, protocol.spacing_mm_zyx, strict=True)
                ],
                "kind": t.kind,
            }
            for t in drawn.tumors
        ]
        document[case] = {"scanner": scanner, "tumors": tumors}
    (folder / TRUTH).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
