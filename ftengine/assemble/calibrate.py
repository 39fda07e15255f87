"""The judge asked about real and about painted tumours."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from ftengine.assemble.build import (
    build_bank,
    build_synthesis_stage,
    check_region,
    load_painters,
    painted_batches,
    resolve_device,
    selection,
)
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.quality.calibrate import (
    Calibration,
    JudgedTumor,
    ball_diameter_mm,
    calibration_file,
    find_real_tumors,
    judge_real_tumors,
    judged,
    write_calibration,
)
from ftengine.quality.contrast import contrast_hu
from ftengine.quality.judge import SegmenterJudge
from ftengine.store.reader import Store
from ftengine.synthesis.shape import size_class_of
from ftengine.training.checkpoint import load_checkpoint
from ftengine.training.run import ignore_warning
from ftengine.training.weight_files import sha256_of
from ftengine.types import Batch


def calibrate_judge(
    config: Config,
    store: Store,
    *,
    judge_path: str | Path,
    out: str | Path,
    generator_path: str | Path | None = None,
    split: str | None = None,
    fold: int | None = None,
    num_painted: int = 200,
    warn: Callable[[str], None] = ignore_warning,
) -> Calibration:
    """``ftengine qc calibrate``: P of a judge on the real tumours of a split or fold, and on painted ones of the same store.

    Tumours are painted on organ-labelled volumes where the store has any, else on free patches of the chosen ones; copy-paste takes its
    tumours from the chosen ones. ``qc.threshold`` decides
    nothing: every P is kept. Writes ``calibration.json`` and ``calibration.png`` into ``out``, and the former beside the judge, where
    ``train_segmentation`` finds it. Raises ConfigError where no volume is left or none holds a tumour.
    """
    from ftengine.pictures.calibration import draw_calibration  # matplotlib, which training does not need
    from ftengine.store.folds import cases_of_kind

    check_region(config, store)
    every = config.with_overrides({"qc.threshold": None, "qc.retries": 0})
    generator, judge = load_painters(every, generator_path, judge_path)
    assert judge is not None  # noqa: S101 - a path was given
    cases = cases_of_kind(store, "tumor", split, fold)
    real, num_small, num_cut = _judge_real(every, store, judge, cases)
    if not real:
        raise ConfigError(
            f"{store.location}: no labelled tumour in {len(cases)} tumour-annotated volumes{selection(split, fold)}; want real tumours that the "
            "judge was not trained on. Choose another --split or --fold."
        )
    painted = _judge_painted(every, store, generator, judge, split, fold, num_painted)
    notes = [] if len(painted) >= num_painted else [f"Only {len(painted)} of {num_painted} tumours could be painted."]
    calibration = Calibration(
        judge_sha256=sha256_of(judge_path),
        generator_sha256="" if generator_path is None else sha256_of(generator_path),
        store=str(store.location),
        split=split or "",
        fold=fold,
        held_out=_is_held_out(load_checkpoint(judge_path, "segmenter").get("identity"), split, fold),
        threshold=config.qc.threshold,
        sizes=tuple(sorted(config.synthesis.sizes, key=lambda name: sum(config.synthesis.sizes[name].radius_mm))),
        tumors=(*real, *painted),
        num_left_out=num_small,
        num_cut=num_cut,
        released=config.synthesis.variant == "released",
        notes=tuple(notes),
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_calibration(calibration, out / "calibration.json")
    (out / "calibration.png").write_bytes(draw_calibration(calibration))
    try:
        write_calibration(calibration, calibration_file(judge_path))
    except OSError as error:
        warn(
            f"{calibration_file(judge_path)}: cannot be written ({error.strerror}); 'train seg --judge' will not find it"
        )
    return calibration


def _judge_real(
    config: Config, store: Store, judge: SegmenterJudge, cases: list[str]
) -> tuple[list[JudgedTumor], int, int]:
    """The judged tumours of some volumes, how many components were too small, and how many larger than the patch."""
    result: list[JudgedTumor] = []
    num_small = num_cut = 0
    for case in cases:
        volume = store.read_volume(case)
        tumors, small = find_real_tumors(volume.image, volume.label, config.region, store.spacing_mm_zyx)
        num_small += small
        num_cut += sum(t.is_cut for t in tumors)
        result += judge_real_tumors(
            tumors,
            judge,
            lambda radius_mm: size_class_of(radius_mm, config.synthesis.sizes),
            batch_size=config.training.batch_size,
            device=resolve_device(config.device),
        )
    return result, num_small, num_cut


def _judge_painted(
    config: Config,
    store: Store,
    generator: nn.Module | None,
    judge: SegmenterJudge,
    split: str | None,
    fold: int | None,
    num_wanted: int,
) -> list[JudgedTumor]:
    """Painted tumours, at most ``num_wanted``; batches without an eligible patch are passed over, up to ten times as many as needed."""
    chosen = config.with_overrides({"loader.annotated_fraction": 0.0, "loader.positive_fraction": 1.0})
    bank = build_bank(chosen, store, split=split, fold=fold)
    stage = build_synthesis_stage(chosen, generator, judge, with_gate=False, bank=bank)
    result: list[JudgedTumor] = []
    if not num_wanted:
        return result
    num_batches = 10 * math.ceil(num_wanted / config.training.batch_size)
    for before, after in painted_batches(chosen, store, stage, split, fold, num_batches):
        result += _painted_tumors(chosen, before, after)
        if len(result) >= num_wanted:
            break
    return result[:num_wanted]


def _painted_tumors(config: Config, before: Batch, after: Batch) -> Iterator[JudgedTumor]:
    """The tumours of a painted batch, all of which went through."""
    region = config.region
    low, high = region.window_hu
    for row, record in enumerate(after.records):
        if record.painted is None or math.isnan(record.painted.proportion) or not record.painted.num_voxels:
            continue
        values = region.organs[record.painted.organ]
        label = after.label[row, 0].cpu().numpy()
        mask = (label == values.tumor) & (before.label[row, 0].cpu().numpy() != values.tumor)
        hu = after.image[row, 0].cpu().numpy() * (high - low) + low
        yield judged(
            "painted",
            record.painted.organ,
            ball_diameter_mm(record.painted.num_voxels, region.spacing_mm_zyx),
            contrast_hu(hu, mask, label == values.organ, region.spacing_mm_zyx),
            record.painted.proportion,
            lambda radius_mm: size_class_of(radius_mm, config.synthesis.sizes),
        )


def _is_held_out(identity: dict[str, str] | None, split: str | None, fold: int | None) -> bool | None:
    """Whether a run with this identity left out the volumes of a split or fold; None where it does not say."""
    if identity is None or (split is None and fold is None):
        return None if identity is None or any(identity.get(k) for k in ("--split", "--fold")) else False
    if fold is not None and identity.get("--fold") == str(fold):
        return True
    if split is not None and identity.get("--split"):
        return identity["--split"] != split
    return None if any(identity.get(k) for k in ("--split", "--fold")) else False
