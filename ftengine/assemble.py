"""The one place that knows all stages: wires store, plan, pipeline, synthesis, quality control and training together."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.evaluation.feature_networks import FeatureNetwork, load_features
from ftengine.evaluation.fid import (
    FeatureSet,
    FidResult,
    OnTumor,
    Quota,
    Sizes,
    collect_painted,
    collect_real,
    ordered_sizes,
    organ_result,
    settings_of,
    shares_of,
)
from ftengine.evaluation.replayed import ReplayedPatch, replayed_patches
from ftengine.evaluation.tumor_images import CropRule
from ftengine.evaluation.validator import build_validation
from ftengine.geometry import Box, FloatZYX, int_zyx
from ftengine.kernels import choose_center
from ftengine.loader.loader import Loader
from ftengine.loader.plan import Mix, Plan
from ftengine.loader.stages import Stage
from ftengine.quality.calibrate import (
    Calibration,
    JudgedTumor,
    ball_diameter_mm,
    calibration_file,
    find_real_tumors,
    judge_real_tumors,
    judge_warning,
    judged,
    write_calibration,
)
from ftengine.quality.contrast import contrast_hu
from ftengine.quality.gate import QualityGate
from ftengine.quality.judge import SegmenterJudge
from ftengine.rng import Purpose, patch_rng
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store, open_store
from ftengine.store.tumors import tumor_crops
from ftengine.synthesis.bank import TumorBank, cut_margin_vox, edge_reach_vox
from ftengine.synthesis.center import margin_vox
from ftengine.synthesis.engine import Address, Generator, Judge, Synthesizer
from ftengine.synthesis.inference import Inference
from ftengine.synthesis.shape import size_class_of
from ftengine.training.checkpoint import load_checkpoint, load_generator, load_segmenter
from ftengine.training.distributed import device_name_for, joined
from ftengine.training.estimate import Estimate, estimate
from ftengine.training.replay import Replay, Sources, read_replay, rebuild
from ftengine.training.run import Progress, TrainingResult, ignore_warning
from ftengine.training.segmentation import train_segmenter
from ftengine.training.synthesis import train_generator
from ftengine.training.trainer import Pictures
from ftengine.training.validation import Validation
from ftengine.training.weight_files import sha256_of
from ftengine.types import Batch


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: want auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: want auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices. 'ftengine doctor' shows why."
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class SynthesisStage:
    """A loader stage: paints eligible patches, judges them, counts verdicts at the gate.

    gate None: whoever takes the batches counts their verdicts, as training does.
    """

    name = "synthesis + qc"

    def __init__(self, synthesizer: Synthesizer, gate: QualityGate | None) -> None:
        self._synthesizer = synthesizer
        self.gate = gate

    def __call__(self, batch: Batch) -> Batch:
        """Paint a batch; raises RejectionError where almost nothing passes."""
        addresses = [Address(r.request.epoch, r.request.index) for r in batch.records]
        voxels = [r.label_voxels for r in batch.records]
        painting = self._synthesizer.paint(batch.image, batch.label, addresses, label_voxels=voxels)
        for record, painted in zip(batch.records, painting.records(), strict=True):
            record.painted = painted
            if painted is not None and self.gate is not None:
                self.gate.record(painted, record.request.dataset)
        return Batch(painting.image, painting.label, batch.records)


def build_loader(
    config: Config,
    store: Store,
    *,
    mix: Mix = "mixed",
    split: str | None = None,
    fold: int | None = None,
    held_out_fold: int | None = None,
    stages: tuple[Stage, ...] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """A loader of batches from ``store``: iterable of Batch, with ``state_dict`` and ``load_state_dict``.

    mix: "annotated" draws from tumour-annotated volumes only, "mixed" also from organ-labelled ones, ``loader.annotated_fraction`` of a
    batch from the former. split, fold: only rows of that split, of that fold; held_out_fold: all but that fold. stages: run on each batch, e.g. a
    ``SynthesisStage``. rank of world_size processes: whose part of each step's patches; no two ranks get the same.
    Raises ConfigError where store and configuration do not fit each other, before anything is read.
    """
    check_region(config, store)
    device = resolve_device(config.device)
    plan = Plan(
        config,
        store,
        mix=mix,
        split=split,
        fold=fold,
        held_out_fold=held_out_fold,
        rank=rank,
        world_size=world_size,
    )
    return Loader(store, plan, stages, device=device)


def check_region(config: Config, store: Store) -> None:
    """ConfigError where the configuration is for another region, spacing or label table than the store."""
    have = (store.region, store.spacing_mm_zyx, store.labels)
    want = (config.region.name, config.region.spacing_mm_zyx, config.region.labels)
    if have != want:
        raise ConfigError(
            f"{store.location}: holds region {have[0]} at {have[1]} mm with labels {have[2]}; the configuration is for {want[0]} at {want[1]} mm "
            f"with labels {want[2]}. Choose the preset or --config that the store was converted with."
        )


def config_for_store(store: Store) -> Config:
    """The preset of the store's region, spacing and labels; ConfigError where no preset fits (a --config is needed then)."""
    for name in (store.region, "demo"):
        try:
            config = Config.preset(name)
            check_region(config, store)
        except ConfigError:
            continue
        return config
    raise ConfigError(
        f"{store.location}: no preset has region {store.region} at {store.spacing_mm_zyx} mm with labels {store.labels}; give --config FILE."
    )


def build_bank(
    config: Config,
    store: Store,
    *,
    split: str | None = None,
    fold: int | None = None,
    held_out_fold: int | None = None,
) -> TumorBank | None:
    """The tumours that ``synthesizer: copy-paste`` pastes, None for the others. A function of the rows of the store and the configuration.

    split, fold, held_out_fold: as ``build_loader`` takes them; the tumours come from the annotated volumes that it would draw from, and no other
    volume is read. Each organ's volumes are visited in a random order, until ``synthesis.bank_mb`` is full. Raises ConfigError
    where no tumour is found.
    """
    if config.synthesis.synthesizer != "copy-paste":
        return None
    check_region(config, store)
    table = store.select(["split", "fold", "annotation", "dataset", "tumor_values"])
    used = rows_in(table, split=split, fold=fold, held_out_fold=held_out_fold)
    used &= np.array(table.column("annotation").to_pylist(), dtype=str) == "tumor"
    weights = config.loader.dataset_weights
    used &= np.array([weights.get(name, 1.0) > 0 for name in table.column("dataset").to_pylist()], dtype=bool)
    values = table.column("tumor_values").to_pylist()
    spacing = config.region.spacing_mm_zyx
    margin = cut_margin_vox(spacing, edge_reach_vox(config.synthesis.edge_sigma_mm, spacing))
    crops = {}
    for name, organ in config.region.organs.items():
        rows = np.array([row for row in np.flatnonzero(used) if organ.tumor in values[row]], dtype=np.int64)
        order = patch_rng(config.seed, Purpose.TUMOR_BANK, index=organ.tumor).permutation(rows).tolist()
        crops[name] = tumor_crops(store, order, organ.tumor, margin, num_threads=config.loader.reader_threads)
    bank = TumorBank.collect(crops, config.region, config.synthesis)
    if not len(bank):
        where = f" in split {split!r}" if split is not None else ""
        where += f" in fold {fold}" if fold is not None else ""
        where += f" outside fold {held_out_fold}" if held_out_fold is not None else ""
        raise ConfigError(
            f"{store.location}: no tumour to paste{where} ({int(used.sum())} annotated volumes to cut from, "
            f"synthesis.bank_least_mm3={config.synthesis.bank_least_mm3:g}, synthesis.bank_mb={config.synthesis.bank_mb}, paste="
            f"{config.synthesis.paste}). Convert volumes with labelled tumours, choose another --split or --fold, lower bank_least_mm3 or "
            "raise bank_mb; or set synthesis.synthesizer to one that needs no tumours."
        )
    return bank


def build_synthesis_stage(
    config: Config,
    generator: Generator | None,
    judge: Judge | None,
    *,
    with_gate: bool = True,
    bank: TumorBank | None = None,
) -> SynthesisStage:
    """The painting stage of a configuration; generator, judge and bank as ``Synthesizer`` takes them, ``with_gate`` as the stage does."""
    synthesizer = Synthesizer(
        config.region,
        config.synthesis,
        seed=config.seed,
        generator=generator,
        judge=judge,
        retries=config.qc.retries,
        bank=bank,
    )
    return SynthesisStage(synthesizer, QualityGate(config.qc) if with_gate else None)


def build_judge(config: Config, segmenter: nn.Module) -> SegmenterJudge:
    """Quality control with a frozen segmenter; the released variant counts any tumour class and wants P > T."""
    released = config.synthesis.variant == "released"
    return SegmenterJudge(segmenter, config.qc, config.region, any_tumor=released, strict=released)


def load_painters(
    config: Config, generator_path: str | Path | None, judge_path: str | Path | None
) -> tuple[nn.Module | None, SegmenterJudge | None]:
    """Generator and judge from their checkpoints, as ``load_networks`` gives them; None for a path that is not given."""
    generator, segmenter = load_networks(config, generator_path, judge_path)
    return generator, None if segmenter is None else build_judge(config, segmenter)


def load_networks(
    config: Config, generator_path: str | Path | None, segmenter_path: str | Path | None
) -> tuple[nn.Module | None, nn.Module | None]:
    """G and S from their checkpoints: in eval mode, frozen, on the configured device; None for a path that is not given.

    Both are evaluated as ``synthesis.precision``, ``channels_last``, ``compile`` and ``cuda_graphs`` say. Raises ConfigError where one was trained for
    another region than the configuration's.
    """
    device = resolve_device(config.device)
    networks: list[nn.Module | None] = []
    for path, load in ((generator_path, load_generator), (segmenter_path, load_segmenter)):
        if path is None:
            networks.append(None)
            continue
        network, trained = load(path)
        _same_region(config, trained, path)
        if load is load_generator:
            _check_blend(config, trained, path)
        frozen = network.to(device).requires_grad_(requires_grad=False)
        networks.append(Inference(frozen, config.synthesis, device))
    return networks[0], networks[1]


def build_synthesizer_of_any_size(
    config: Config,
    generator: Generator | None,
    segmenter: nn.Module | None,
    *,
    spacing_mm_zyx: FloatZYX | None = None,
    bank: TumorBank | None = None,
) -> Synthesizer:
    """A Synthesizer whose networks see patches of any size: padded by replication to a multiple of their stride, then cropped.

    generator, segmenter: G and S, on the device of the patches, S in eval mode; None as for ``Synthesizer``. spacing_mm_zyx: of the
    patches, where it is not the region's. bank: as for ``Synthesizer``.
    """
    return Synthesizer(
        config.region,
        config.synthesis,
        seed=config.seed,
        generator=None if generator is None else _AnySize(generator, 8),
        judge=None if segmenter is None else build_judge(config, _AnySize(segmenter, 32)),
        retries=config.qc.retries,
        spacing_mm_zyx=spacing_mm_zyx,
        bank=bank,
    )


def _require_tumors(config: Config, store: Store, loader: Loader, why: str) -> None:
    """ConfigError where no volume of the run holds a labelled tumour of any class; ``loader.absent_classes: allow`` permits it."""
    if loader.plan.labelled_tumors or config.loader.absent_classes == "allow":
        return
    names = {value: name for name, value in config.region.labels.items()}
    wanted = " or ".join(names[value] for value in config.region.tumor_values)
    raise ConfigError(
        f"{store.location}: none of the {loader.plan.num_volumes} volumes of this run holds a voxel of {wanted}: {why}. Convert labels with "
        "tumours (does --label-map keep them?), or set loader.absent_classes=allow."
    )


def _same_region(config: Config, trained: Config, path: str | Path) -> None:
    keys = ("name", "spacing_mm_zyx", "window_hu", "labels", "organs")
    for key in keys:
        have, want = getattr(trained.region, key), getattr(config.region, key)
        if have != want:
            raise ConfigError(
                f"{path}: was trained with region.{key}={have}; this run has {want}. Use the checkpoint of this region."
            )


def _check_blend(config: Config, trained: Config, path: str | Path) -> None:
    """Released generators are painted as the released code does: in the chest that is a sigmoid and a plus (reference 1.6)."""
    if trained.synthesis.variant == "released" != config.synthesis.variant:
        raise ConfigError(
            f"{path}: was trained for synthesis.variant=released; this run paints with {config.synthesis.variant}. "
            "Add --set synthesis.variant=released."
        )


def train_segmentation(
    config: Config,
    store_path: str | Path,
    out: str | Path,
    *,
    generator_path: str | Path | None = None,
    judge_path: str | Path | None = None,
    init: str | Path | None = None,
    split: str | None = None,
    held_out_fold: int | None = None,
    val_split: str | None = None,
    resume: bool = False,
    rehearsal: bool = False,
    allow: Collection[str] = (),
    on_step: Progress = lambda _step, _values: None,
    on_estimate: Callable[[Estimate], None] | None = None,
    warn: Callable[[str], None] = ignore_warning,
) -> TrainingResult:
    """``ftengine train seg``: a student with online synthesis and quality control; without anything to paint with, the baseline.

    ``synthesis.synthesizer: freetumor`` paints with ``generator_path``; the others paint without one.
    val_split: validate on the tumour-annotated volumes of this split, which ``split`` must leave out; without it, on those of the
    held-out fold where ``training.validate_every`` is set. rehearsal: what is validated on is checked, and nothing is validated. Under
    torchrun this is one of the processes of a run.
    """
    store = open_store(store_path)
    paints = generator_path is not None or not config.synthesis.needs_generator
    if judge_path is not None and not paints:
        raise ConfigError(
            "--judge without --synth: a judge needs painted tumours; give --synth G.pt too, or choose a synthesis.synthesizer that "
            "needs no generator."
        )
    with joined() as world:
        here = config.with_overrides({"device": device_name_for(config.device, world)})
        device = resolve_device(here.device)
        stage = gate = None
        if paints:
            bank = build_bank(here, store, split=split, held_out_fold=held_out_fold)
            painters = load_painters(here, generator_path, judge_path)
            stage = build_synthesis_stage(here, *painters, with_gate=False, bank=bank)
            gate = QualityGate(config.qc)
        told = judge_warning(judge_path, config.qc.threshold) if paints and judge_path is not None else None
        validation = _validation(config, store, split, val_split, held_out_fold, device)
        with build_loader(
            here,
            store,
            mix="mixed" if stage else "annotated",
            split=split,
            held_out_fold=held_out_fold,
            stages=(stage,) if stage else (),
            rank=world.rank,
            world_size=world.size,
        ) as loader:
            if stage is None:
                _require_tumors(config, store, loader, "the network would learn that there are none")
            if on_estimate is not None:
                on_estimate(estimate("segmenter", config, loader, device=device))
            return train_segmenter(
                config,
                loader,
                out,
                device=device,
                init=init,
                resume=resume,
                on_step=on_step,
                warn=warn,
                gate=gate,
                identity={
                    "--synth": _fingerprint(generator_path),
                    "--judge": _fingerprint(judge_path),
                    "--split": split or "",
                    "--fold": _text(held_out_fold),
                    "--val-split": val_split or "",
                    **({} if init is None else {"--init": _fingerprint(init)}),
                },
                allow=allow,
                sources=Sources(
                    _whole_store(store_path),
                    _whole(generator_path),
                    _whole(judge_path),
                    split or "",
                    held_out_fold,
                    generator_sha256="" if generator_path is None else sha256_of(generator_path),
                    judge_sha256="" if judge_path is None else sha256_of(judge_path),
                ),
                notes=() if told is None else (told,),
                validation=None if rehearsal else validation,
                world=world,
            )


def _validation(
    config: Config,
    store: Store,
    split: str | None,
    val_split: str | None,
    held_out_fold: int | None,
    device: torch.device,
) -> Validation | None:
    """What training validates on, if anything. Raises ConfigError where it would be trained on too, or holds no annotated volume."""
    if val_split is None and (held_out_fold is None or config.training.validate_every is None):
        if config.training.validate_every is not None:
            raise ConfigError(
                f"training.validate_every={config.training.validate_every}: no volumes to validate on; give --val-split NAME or --fold K."
            )
        return None
    if val_split is not None and split in {None, val_split}:
        raise ConfigError(
            f"--val-split {val_split}: training would see these volumes too (--split {split or 'not given: all'}). Give --split with the "
            "split to train on."
        )
    return build_validation(
        config, store, device=device, split=val_split, fold=None if val_split is not None else held_out_fold
    )


def train_synthesis(
    config: Config,
    store_path: str | Path,
    out: str | Path,
    *,
    baseline: str | Path,
    split: str | None = None,
    held_out_fold: int | None = None,
    val_split: str | None = None,
    resume: bool = False,
    rehearsal: bool = False,
    allow: Collection[str] = (),
    on_step: Progress = lambda _step, _values: None,
    on_estimate: Callable[[Estimate], None] | None = None,
    warn: Callable[[str], None] = ignore_warning,
) -> TrainingResult:
    """``ftengine train synth``: the generator against a frozen baseline segmenter.

    val_split: pictures show patches of this split (None: of ``split``). rehearsal: nothing is drawn. Under torchrun this is one of the
    processes of a run.
    """
    store = open_store(store_path)
    if val_split is not None:
        Plan(
            config, store, mix="mixed", split=val_split
        )  # refuses a split without volumes now, and not at the first picture
    segmenter, trained = load_segmenter(baseline)
    _same_region(config, trained, baseline)
    with joined() as world:
        device_name = device_name_for(config.device, world)
        here = config.with_overrides(
            {"device": device_name, "training.batch_size": config.generator_training.batch_size}
        )
        with build_loader(
            here,
            store,
            mix="mixed",
            split=split,
            held_out_fold=held_out_fold,
            rank=world.rank,
            world_size=world.size,
        ) as loader:
            _require_tumors(config, store, loader, "the classifier would never see a real one")
            if on_estimate is not None:
                device = resolve_device(device_name)
                on_estimate(estimate("generator", config, loader, device=device, segmenter=segmenter))
            return train_generator(
                config,
                loader,
                segmenter,
                out,
                device=resolve_device(device_name),
                resume=resume,
                on_step=on_step,
                warn=warn,
                identity={"--baseline": _fingerprint(baseline), "--split": split or "", "--fold": _text(held_out_fold)},
                allow=allow,
                sources=Sources(_whole_store(store_path)),
                pictures=None if rehearsal else _pictures(here, store, segmenter, val_split or split),
                world=world,
            )


def _pictures(config: Config, store: Store, segmenter: nn.Module, split: str | None) -> Pictures:
    """Draws what G paints on the same patches each time, before any verdict, as 'ftengine preview' does."""
    shown = config.with_overrides({"qc.retries": 0})

    def draw(generator: nn.Module, folder: Path) -> list[Path]:
        from ftengine.evaluation.preview import preview  # matplotlib, which runs without pictures do not need

        number = config.generator_training.num_pictures
        sheets = preview(
            shown,
            store,
            folder,
            num_sheets=number,
            generator=generator,
            judge=build_judge(shown, segmenter),
            segmenter=segmenter,
            split=split,
        )
        return [sheet.path for sheet in sheets]

    return draw


def replay(
    file: str | Path,
    folder: Path | None = None,
    *,
    every_step: bool = False,
    store_path: str | Path | None = None,
    device: str | None = None,
    warn: Callable[[str], None] = ignore_warning,
) -> tuple[Replay, list[ReplayedPatch]]:
    """``ftengine replay``: make the patches of a replay file again, painted as in the run, and draw them into ``folder``.

    every_step: also the batches before the one that broke. A generator's run is painted with its last checkpoint, not with the weights of
    that moment. store_path, device: in place of the run's. warn: told of files that are no longer those of the run. Raises ConfigError or StoreError where a file, painter or volume is gone.
    """
    found = read_replay(file)
    config = found.config if device is None else found.config.with_overrides({"device": device})
    store = open_store(store_path or found.sources.store)
    check_region(config, store)
    sources = found.sources
    for text in _changed_files(found):
        warn(text)
    generator = (sources.generator if found.kind == "segmenter" else found.checkpoint) or None
    stages: tuple[Stage, ...] = ()
    if generator is not None or (found.kind == "segmenter" and not config.synthesis.needs_generator):
        bank = build_bank(config, store, split=sources.split or None, held_out_fold=sources.held_out_fold)
        painters = load_painters(config, generator, sources.judge or None)
        stages = (build_synthesis_stage(config, *painters, with_gate=False, bank=bank),)
    patches: list[ReplayedPatch] = []
    for step in found.steps if every_step else found.steps[-1:]:
        _, batch = rebuild(
            config, store, step, device=resolve_device(config.device), stages=stages, cuts=found.kind == "segmenter"
        )
        patches += replayed_patches(config, step, batch, folder, has_verdicts=found.kind == "segmenter")
    return found, patches


def _changed_files(found: Replay) -> Iterator[str]:
    """What a replay opens and is not what the run had: other painters by SHA-256, a checkpoint of a later step."""
    known = {found.sources.generator: found.sources.generator_sha256, found.sources.judge: found.sources.judge_sha256}
    for path, digest in known.items():
        if path and digest and sha256_of(path) != digest:
            yield f"{path}: is not the file that the run had (sha256 {digest[:12]}...): what is painted may differ"
    if found.kind == "generator" and found.checkpoint:
        saved = load_checkpoint(found.checkpoint, "generator").get("step", 0)
        if saved > found.steps[-1].step:
            yield (
                f"{found.checkpoint}: is of step {saved}, and the run broke at step {found.steps[-1].step}: it went on since; what is "
                "painted differs"
            )


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _fingerprint(path: str | Path | None) -> str:
    """A file's SHA-256; empty for None."""
    return "" if path is None else f"sha256:{sha256_of(path)}"


def _whole_store(place: str | Path) -> str:
    return str(place) if "://" in str(place) else _whole(place)


def _whole(path: str | Path | None) -> str:
    return "" if path is None else str(Path(path).resolve())


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
    from ftengine.evaluation.calibration import draw_calibration  # matplotlib, which training does not need
    from ftengine.evaluation.evaluate import cases_of_kind

    check_region(config, store)
    every = config.with_overrides({"qc.threshold": None, "qc.retries": 0})
    generator, judge = load_painters(every, generator_path, judge_path)
    assert judge is not None  # noqa: S101 - a path was given
    cases = cases_of_kind(store, "tumor", split, fold)
    real, num_small, num_cut = _judge_real(every, store, judge, cases)
    if not real:
        raise ConfigError(
            f"{store.location}: no labelled tumour in {len(cases)} tumour-annotated volumes{_selection(split, fold)}; want real tumours that the "
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
    for before, after in _painted_batches(chosen, store, stage, split, fold, num_batches):
        result += _painted_tumors(chosen, before, after)
        if len(result) >= num_wanted:
            break
    return result[:num_wanted]


def _painted_batches(
    config: Config, store: Store, stage: SynthesisStage, split: str | None, fold: int | None, num_batches: int
) -> Iterator[tuple[Batch, Batch]]:
    """Batches before and after painting: of organ-labelled volumes where the store has any, else of the chosen ones."""
    has_organs = "organ" in store.column("annotation").to_pylist()
    rows: dict[str, Any] = {} if has_organs else {"split": split, "fold": fold}
    with build_loader(config, store, **rows) as loader:
        while num_batches > 0:
            for batch in loader:
                yield batch, stage(batch)
                num_batches -= 1
                if num_batches <= 0:
                    return


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


def _selection(split: str | None, fold: int | None) -> str:
    return "".join(f" of {name} {value!r}" for name, value in (("split", split), ("fold", fold)) if value is not None)


PATCHES_PER_TUMOR = 40  # looked at for each synthetic tumour that is wanted: a size class can be rare


def measure_fid(
    config: Config,
    store: Store,
    *,
    features: str | Path | FeatureNetwork,
    rule: CropRule | None = None,
    generator_path: str | Path | None = None,
    judge_path: str | Path | None = None,
    split: str | None = None,
    fold: int | None = None,
    repeats: int = 5,
    num: int | None = None,
    sizes: Sizes = "matched",
    name: str | None = None,
    on_tumor: OnTumor = lambda: None,
    warn: Callable[[str], None] = ignore_warning,
) -> FidResult:
    """``ftengine fid``: FID and KID of painted tumours against the labelled ones of a split or fold, by tumour type.

    features: a file of weights, as ``load_features`` takes it with ``rule``, or a network. Repeat k paints with seed + k; ``num`` tumours of
    each type (None: as many as there are real ones), of the real ones' size classes where ``sizes`` is "matched". With a judge, those that
    pass. Painted on organ-labelled volumes where the store has any, else on free patches of the chosen ones; copy-paste takes its
    tumours from outside ``fold``, without one from the chosen volumes. Raises ConfigError where there is no real tumour, or nothing could be painted.
    """
    check_region(config, store)
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: want at least 1.")
    if num is not None and num < 1:
        raise ConfigError(f"num={num}: want at least 1 synthetic tumour of each type.")
    rule = rule or CropRule()
    device = resolve_device(config.device)
    network = (
        load_features(features, config.region, rule=rule, device=device)
        if isinstance(features, str | Path)
        else features
    )
    real = collect_real(config, store, _tumor_rows(config, store, split, fold), network, on_tumor=on_tumor)
    if not real:
        raise ConfigError(
            f"{store.location}: no labelled tumour{_selection(split, fold)}; want real tumours to compare with. Choose another --split or --fold."
        )
    wanted = {organ: shares_of(tumors.sizes, num) for organ, tumors in real.items()}
    painters = load_painters(config, generator_path, judge_path)
    pastes_real = config.synthesis.synthesizer == "copy-paste" and fold is None
    if pastes_real:
        warn(
            "copy-paste pastes the very tumours that it is compared with; give --fold, and it takes those of the other folds"
        )
    painted = []
    for repeat in range(repeats):
        quota = Quota(wanted, ordered_sizes(config), sizes)
        batches = _batches_for_fid(config, store, painters, split, fold, repeat, quota.num_left)
        painted.append(
            (config.seed + repeat, *collect_painted(config, store, batches, network, quota, on_tumor=on_tumor), quota)
        )
    if not any(found for _, found, _, _ in painted):
        raise ConfigError(
            f"{store.location}: not one tumour of {' or '.join(real)} could be painted. 'ftengine preview' shows why; a judge that passes nothing is "
            "one reason."
        )
    organs = {
        organ: organ_result(
            organ,
            tumors,
            [
                (seed, found.get(organ, FeatureSet()), num_cut[organ], quota.missing(organ))
                for seed, found, num_cut, quota in painted
            ],
        )
        for organ, tumors in real.items()
    }
    for result in organs.values():
        for note in result.notes:
            warn(note)
    return FidResult(
        name=name or _painter_name(config, generator_path),
        settings=settings_of(config, network.info, rule, real, sizes, num),
        painter={
            "generator_sha256": _fingerprint(generator_path),
            "judge_sha256": _fingerprint(judge_path),
            "store": str(store.location),
            "split": split or "",
            "fold": fold,
            "pastes_real": pastes_real,
            "synthesis": config.synthesis.model_dump(
                mode="json", exclude=None if config.synthesis.shape == "realistic" else {"realistic_shapes"}
            ),
            "qc": config.qc.model_dump(mode="json"),
        },
        organs=organs,
    )


def _tumor_rows(config: Config, store: Store, split: str | None, fold: int | None) -> dict[str, list[int]]:
    """The tumour-annotated rows of the index that hold each organ's tumour."""
    table = store.select(["split", "fold", "annotation", "tumor_values"])
    used = rows_in(table, split=split, fold=fold)
    used &= np.array(table.column("annotation").to_pylist(), dtype=str) == "tumor"
    values = table.column("tumor_values").to_pylist()
    return {
        name: [int(row) for row in np.flatnonzero(used) if organ.tumor in values[row]]
        for name, organ in config.region.organs.items()
    }


def _batches_for_fid(
    config: Config,
    store: Store,
    painters: tuple[nn.Module | None, SegmenterJudge | None],
    split: str | None,
    fold: int | None,
    repeat: int,
    num_tumors: int,
) -> Iterator[tuple[Batch, Batch]]:
    """Batches of one repeat, as the volumes lie: flips, turns and changes of intensity are for training."""
    augment = {f"augment.{key}": 0.0 for key in type(config.augment).model_fields if key.endswith("_probability")}
    chosen = config.with_overrides(
        {
            "seed": config.seed + repeat,
            "loader.annotated_fraction": 0.0,
            "loader.positive_fraction": 1.0,
            "synthesis.fraction": 1.0,
            **augment,
        }
    )
    bank = build_bank(chosen, store, split=split, held_out_fold=fold)
    stage = build_synthesis_stage(chosen, *painters, with_gate=False, bank=bank)
    num_batches = math.ceil(PATCHES_PER_TUMOR * num_tumors / config.training.batch_size)
    yield from _painted_batches(chosen, store, stage, split, fold, num_batches)


def _painter_name(config: Config, generator_path: str | Path | None) -> str:
    name = config.synthesis.synthesizer
    return f"{name} (fixed contrast)" if generator_path is None and config.synthesis.needs_generator else name


@dataclass(frozen=True)
class SynthesisResult:
    """One painted CT. image_hu int16, label and mask uint8, all [z, y, x]; proportion is P of Eq. 4, NaN without a judge.

    Where ``passed`` is false, image and label are the ones given (Eq. 5) and mask shows where the tumour would have been.
    """

    image_hu: NDArray[np.int16]
    label: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    proportion: float
    passed: bool


def synthesize(
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8],
    organ: str,
    *,
    seed: int = 0,
    spacing_mm_zyx: FloatZYX | None = None,
    generator: Generator | str | Path | None = None,
    judge: nn.Module | str | Path | None = None,
    config: Config | None = None,
    bank: TumorBank | None = None,
) -> SynthesisResult:
    """Paint one tumour into ``organ`` of a CT.

    image_hu: int16 HU [z, y, x], RAS+; label: uint8 of the same shape with the region's values (the organ must be there). A volume
    larger than the region's patch is painted in one patch around the tumour's place. generator, judge: networks or checkpoint files;
    generator None: a fixed contrast instead of tanh(G(x)); judge None: no quality control. config: its region and synthesis sections
    apply (default: the abdomen preset, or the chest one where ``organ`` is lung); ``synthesis.synthesizer: copy-paste`` takes a bank, as
    ``build_bank`` makes it. Voxels outside
    the mask (with a soft edge: outside the organ) come back bit-identical.
    Raises ConfigError for an unknown organ, shapes that differ, an organ that the label does not hold, or one without a tumour in the bank.
    """
    if config is None:
        config = Config.preset("chest" if organ == "lung" else "abdomen")
    region = config.region
    if organ not in region.organs:
        raise ConfigError(f"organ={organ!r}: region {region.name} has {', '.join(region.organs)}.")
    image_hu, label = np.asarray(image_hu), np.asarray(label)
    if image_hu.ndim != 3 or image_hu.shape != label.shape:
        raise ConfigError(
            f"image_hu has shape {image_hu.shape} and label {label.shape}; want two equal [z, y, x] shapes."
        )
    if not np.issubdtype(image_hu.dtype, np.integer) or not np.issubdtype(label.dtype, np.integer):
        raise ConfigError(
            f"image_hu is {image_hu.dtype} and label {label.dtype}; want integer HU and integer label values."
        )
    if bank is not None and organ not in bank.tumors:
        raise ConfigError(
            f"the bank holds no tumour of {organ}; it has {', '.join(bank.tumors) or 'none'}. Choose one of these."
        )
    spacing = spacing_mm_zyx or region.spacing_mm_zyx
    inside = label == region.organs[organ].organ
    if not inside.any():
        raise ConfigError(
            f"label holds no {organ} (value {region.organs[organ].organ}); want at least one voxel of it."
        )

    box = working_box(config, torch.from_numpy(np.ascontiguousarray(inside)), seed, spacing)
    place = box.slices()
    low, high = region.window_hu
    device = resolve_device(config.device)
    window = np.clip((image_hu[place].astype(np.float32) - low) / (high - low), 0.0, 1.0)
    only_organ = np.where(inside[place], label[place], 0).astype(
        np.uint8
    )  # real tumours nearby neither forbid nor take part
    image_batch = torch.from_numpy(window)[None, None].to(device)
    label_batch = torch.from_numpy(only_organ)[None, None].to(device)
    synthesis = config.synthesis.model_copy(update={"fraction": 1.0, "min_organ_voxels": 1})
    loaded_generator: Generator | None
    if isinstance(generator, str | Path):
        loaded_generator, trained = load_generator(generator)
        _check_blend(config, trained, generator)
    else:
        loaded_generator = generator
    if isinstance(loaded_generator, nn.Module):
        loaded_generator = loaded_generator.to(device).eval()
    segmenter = load_segmenter(judge)[0] if isinstance(judge, str | Path) else judge
    synthesizer = build_synthesizer_of_any_size(
        config.model_copy(update={"synthesis": synthesis, "seed": seed}),
        loaded_generator,
        None if segmenter is None else segmenter.to(device).eval(),
        spacing_mm_zyx=spacing,
        bank=bank,
    )
    painting = synthesizer.paint(image_batch, label_batch, [Address(0, 0)])
    painted = painting.records()[0]
    assert painted is not None  # noqa: S101 - fraction 1 and an organ that is there: always painted
    mask = np.zeros(label.shape, dtype=np.uint8)
    mask[place] = painting.mask[0, 0].cpu().numpy()
    new_image, new_label = image_hu.astype(np.int16, copy=True), label.astype(np.uint8, copy=True)
    if painted.passed:
        change = (painting.image - image_batch)[0, 0].cpu().numpy() * (high - low)
        new_image[place] += np.rint(change).astype(np.int16)  # HU outside the window keep their distance to it
        new_label[mask.astype(bool)] = region.organs[organ].tumor
    return SynthesisResult(new_image, new_label, mask, painted.proportion, painted.passed)


def working_box(config: Config, inside: torch.Tensor, seed: int, spacing_mm_zyx: FloatZYX) -> Box:
    """The whole volume where it fits a patch of the region, else a patch around a voxel of the organ.

    inside: bool [z, y, x], the organ, at least one voxel of it; seed: decides the voxel.
    """
    shape = int_zyx(inside.shape)
    patch = config.region.patch_zyx
    if all(n <= p for n, p in zip(shape, patch, strict=True)):
        return Box((0, 0, 0), shape)
    margin = margin_vox(config.synthesis.center_margin_mm, spacing_mm_zyx)
    organ = inside.contiguous()[None]
    center = int_zyx(choose_center(organ, margin, [np.random.default_rng(seed).random()])[0, 0].tolist())
    size = int_zyx(min(n, p) for n, p in zip(shape, patch, strict=True))
    origin = int_zyx(min(max(c - s // 2, 0), n - s) for c, s, n in zip(center, size, shape, strict=True))
    return Box(origin, size)


class _AnySize(nn.Module):
    """Evaluates a network on any size: pads by replication to a multiple of its stride, and crops the result."""

    def __init__(self, network: Any, multiple: int) -> None:
        super().__init__()
        self._network, self._multiple = network, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, y, x_size = x.shape[2:]
        missing = [-n % self._multiple for n in (z, y, x_size)]
        padded = nn.functional.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
        with torch.no_grad():
            result: torch.Tensor = self._network(padded)
        return result[:, :, :z, :y, :x_size]
