"""The two training stages on a store."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from ftengine.assemble.build import (
    build_bank,
    build_judge,
    build_loader,
    build_synthesis_stage,
    fingerprint,
    load_painters,
    resolve_device,
    same_region,
)
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.evaluation.validator import build_validation
from ftengine.loader.loader import Loader
from ftengine.loader.plan import Plan
from ftengine.quality.calibrate import judge_warning, painter_warning
from ftengine.quality.gate import QualityGate
from ftengine.store.reader import Store, open_store
from ftengine.training.checkpoint import load_segmenter
from ftengine.training.distributed import device_name_for, joined
from ftengine.training.estimate import Estimate, estimate
from ftengine.training.replay import Sources
from ftengine.training.run import Progress, TrainingResult, ignore_warning
from ftengine.training.segmentation import train_segmenter
from ftengine.training.synthesis import train_generator
from ftengine.training.trainer import Pictures
from ftengine.training.validation import Validation
from ftengine.training.weight_files import sha256_of


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
        told: list[str | None] = []
        if paints and judge_path is not None:
            told = [judge_warning(judge_path, config.qc.threshold), painter_warning(judge_path, generator_path)]
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
                    "--synth": fingerprint(generator_path),
                    "--judge": fingerprint(judge_path),
                    "--split": split or "",
                    "--fold": _text(held_out_fold),
                    "--val-split": val_split or "",
                    **({} if init is None else {"--init": fingerprint(init)}),
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
                notes=tuple(text for text in told if text is not None),
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
    same_region(config, trained, baseline)
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
                identity={"--baseline": fingerprint(baseline), "--split": split or "", "--fold": _text(held_out_fold)},
                allow=allow,
                sources=Sources(_whole_store(store_path)),
                pictures=None if rehearsal else _pictures(here, store, segmenter, val_split or split),
                world=world,
            )


def _pictures(config: Config, store: Store, segmenter: nn.Module, split: str | None) -> Pictures:
    """Draws what G paints on the same patches each time, before any verdict, as 'ftengine preview' does."""
    shown = config.with_overrides({"qc.retries": 0})

    def draw(generator: nn.Module, folder: Path) -> list[Path]:
        from ftengine.pictures.preview import preview  # matplotlib, which runs without pictures do not need

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


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _whole_store(place: str | Path) -> str:
    return str(place) if "://" in str(place) else _whole(place)


def _whole(path: str | Path | None) -> str:
    return "" if path is None else str(Path(path).resolve())
