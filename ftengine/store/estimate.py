"""What a conversion would do: cases, sizes, disk and time, from headers and a measured sample; writes nothing that stays."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ftengine.config import RegionConfig
from ftengine.errors import CaseError
from ftengine.store.case import CaseOutcome, ConvertOptions, Task, convert_case, failed, hidden
from ftengine.store.convert import stored_shape
from ftengine.store.writer import create_store
from ftengine.volume.discover import Source
from ftengine.volume.readers import probe

_SAMPLE = 3


@dataclass(frozen=True)
class Estimate:
    """From ``sampled`` converted cases: bytes of the whole store and seconds of one worker; None without a usable sample."""

    sampled: int
    store_bytes: int | None
    seconds_of_one_worker: float | None


def plan_case(source: Source, region: RegionConfig, options: ConvertOptions) -> CaseOutcome:
    """The outcome that headers promise: ``planned`` with the stored shape and uncompressed bytes, or ``failed``."""
    try:
        if source.refusal is not None:
            raise source.refusal
        info = probe(source.image, series_files=source.series_files, options=options.reading)
    except CaseError as error:
        return hidden(failed(source, error), source, options.pseudonyms)
    shape = stored_shape(info, region)
    voxel_bytes = 2 if source.label is None and source.organ_label is None else 3
    outcome = CaseOutcome(source.case, "planned", shape_zyx=shape, stored_bytes=int(np.prod(shape)) * voxel_bytes)
    return hidden(outcome, source, options.pseudonyms)


def estimate(
    sources: Sequence[Source],
    planned: Sequence[CaseOutcome],
    region: RegionConfig,
    options: ConvertOptions,
    *,
    on_sample: Callable[[str], None] = lambda _case: None,
) -> Estimate:
    """Convert up to three cases around the median size into a temporary store, and scale what they took to all planned ones."""
    if options.pseudonyms is not None:
        sources = [replace(s, case=options.pseudonyms.case(s.case)) for s in sources]
    sizes = {o.case: o.stored_bytes for o in planned if o.status == "planned"}
    by_size = sorted((s for s in sources if s.case in sizes), key=lambda s: (sizes[s.case], s.case))
    middle = max(0, len(by_size) // 2 - _SAMPLE // 2)
    raw = stored = 0
    seconds = 0.0
    sampled = 0
    with tempfile.TemporaryDirectory(prefix="ftengine-") as folder:
        location = create_store(Path(folder) / "sample.zarr", region)
        for source in by_size[middle : middle + _SAMPLE]:
            on_sample(source.case)
            outcome = convert_case(Task(source, str(location), region, options))
            if outcome.status != "converted":
                continue
            sampled += 1
            raw += sizes[source.case]
            stored += outcome.stored_bytes
            seconds += outcome.seconds
    if not raw:
        return Estimate(0, None, None)
    scale = sum(sizes.values()) / raw
    return Estimate(sampled, round(stored * scale), seconds * scale)
