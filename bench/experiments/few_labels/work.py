"""What each unit does, with the engine's own stages: ``assemble.train_segmentation``, ``train_synthesis``, its loader, its prediction."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftengine.assemble import (
    build_bank,
    build_loader,
    build_synthesis_stage,
    load_painters,
    resolve_device,
    train_segmentation,
    train_synthesis,
)
from ftengine.bench.experiments.few_labels.arms import ARMS, GENERATORS
from ftengine.bench.experiments.few_labels.data import ORGAN, STORE, TEST, TUMOR, make_data, read_truth, weights
from ftengine.bench.experiments.few_labels.protocol import Protocol
from ftengine.bench.experiments.few_labels.scores import VolumeScore, count_tumors, score_volume, summarize
from ftengine.bench.experiments.few_labels.units import Unit, run_folder
from ftengine.config import Config
from ftengine.experiments.serve import InterruptedRunError
from ftengine.prediction.infer import predict_volume
from ftengine.quality.contrast import contrast_hu
from ftengine.store.reader import open_store
from ftengine.training.checkpoint import load_segmenter
from ftengine.training.run import CHECKPOINT, TrainingResult, versions
from ftengine.types import Batch

THRESHOLDS = (0.5, 0.7, 0.9)
PERCENTILES = (5, 25, 50, 75, 95)
# a run's seed is 100 times the experiment's, plus this: no two kinds of run of a seed see the same sequence of patches
_SEED_OF_KIND: Mapping[str, int] = {"segmenter": 1, "judge": 2, "generator": 3, "student": 4}


def do(folder: Path, unit: Unit, protocol: Protocol, device: str) -> dict[str, Any]:
    """Do one unit and return its result as plain values. What a killed run left is taken up."""
    started = time.perf_counter()
    work = {"data": _data, "segmenter": _segmenter, "judge": _segmenter, "generator": _generator, "student": _student}
    result = work[unit.kind](folder, unit, protocol, device)
    return {**result, "seconds": time.perf_counter() - started, "device": _device_name(device), "versions": versions()}


def checkpoint(folder: Path, unit: Unit) -> Path:
    """The network that a unit has trained."""
    return run_folder(folder, unit) / CHECKPOINT


def _data(folder: Path, _unit: Unit, protocol: Protocol, _device: str) -> dict[str, Any]:
    make_data(folder, protocol)
    store = open_store(folder / STORE)
    return {"num_volumes": len(store)}


def _segmenter(folder: Path, unit: Unit, protocol: Protocol, device: str) -> dict[str, Any]:
    """S of a seed, or a judge that was trained on the oracle's volumes too; both from scratch."""
    config = _config(protocol, unit, device, with_oracle=unit.kind == "judge").with_overrides(
        {
            "training.steps": protocol.steps.segmenter,
            "training.learning_rate": protocol.learning_rates.segmenter,
        }
    )
    trained = _train_segmentation(folder, unit, config)
    return {**trained, **_evaluated(folder, unit, protocol, config)}


def _student(folder: Path, unit: Unit, protocol: Protocol, device: str) -> dict[str, Any]:
    arm, seed = ARMS[unit.name], unit.seed
    config = _config(protocol, unit, device, with_oracle=arm.data == "oracle").with_overrides(
        {
            "training.steps": protocol.steps.student,
            "training.learning_rate": protocol.learning_rates.student,
            **arm.keys,
        }
    )
    segmenter = checkpoint(folder, Unit("segmenter", seed=seed))
    painters: dict[str, Path] = {}
    if arm.generator is not None:
        painters["generator_path"] = checkpoint(folder, Unit("generator", arm.generator, seed))
    if arm.judge is not None:
        painters["judge_path"] = segmenter if arm.judge == "few" else checkpoint(folder, Unit("judge", seed=seed))
    result = _train_segmentation(folder, unit, config, init=segmenter, **painters)
    result |= _evaluated(folder, unit, protocol, config)
    if arm.paints:
        result["painting"] = _measured(
            folder, config, protocol, painters.get("generator_path"), painters.get("judge_path", segmenter)
        )
    checkpoint(folder, unit).unlink()  # its figures are what is wanted; a hundred students would fill a disk
    return result


def _generator(folder: Path, unit: Unit, protocol: Protocol, device: str) -> dict[str, Any]:
    recipe, segmenter = GENERATORS[unit.name], checkpoint(folder, Unit("segmenter", seed=unit.seed))
    config = _config(protocol, unit, device, with_oracle=False).with_overrides(
        {"generator_training.steps": protocol.steps.generator, **recipe}
    )
    started = time.perf_counter()
    trained = _finished(
        train_synthesis(
            config,
            folder / STORE,
            run_folder(folder, unit),
            baseline=segmenter,
            split="train",
            resume=checkpoint(folder, unit).exists(),
        )
    )
    seconds = time.perf_counter() - started
    painting = _measured(folder, config, protocol, trained.checkpoint, segmenter)
    return {"train_s": seconds, "losses": _plain(trained.losses), "painting": painting}


def _config(protocol: Protocol, unit: Unit, device: str, *, with_oracle: bool) -> Config:
    return protocol.config(
        {
            "seed": 100 * unit.seed + _SEED_OF_KIND[unit.kind],
            "device": device,
            "loader.dataset_weights": weights(unit.seed, protocol.phantoms, with_oracle=with_oracle),
        }
    )


def _train_segmentation(folder: Path, unit: Unit, config: Config, **options: Any) -> dict[str, Any]:
    resume = checkpoint(folder, unit).exists()
    if not resume:
        shutil.rmtree(run_folder(folder, unit), ignore_errors=True)  # logs of a run that was killed before it saved
    started = time.perf_counter()
    trained = _finished(
        train_segmentation(config, folder / STORE, run_folder(folder, unit), split="train", resume=resume, **options)
    )
    return {
        "train_s": time.perf_counter() - started,
        "resumed": resume,
        "losses": _plain(trained.losses),
        "quality": trained.quality,
        "mix": trained.mix,
        "warnings": trained.warnings,
    }


def _finished(result: TrainingResult) -> TrainingResult:
    if result.interrupted:
        raise InterruptedRunError(f"{result.checkpoint}: stopped after {result.steps} steps; the same command goes on.")
    return result


def _evaluated(folder: Path, unit: Unit, protocol: Protocol, config: Config) -> dict[str, Any]:
    """Figures on the test set, and the scores of its volumes."""
    started = time.perf_counter()
    store, truth = open_store(folder / STORE), read_truth(folder)
    network = load_segmenter(checkpoint(folder, unit))[0]
    device = resolve_device(config.device)
    organ, tumor = store.labels[ORGAN], store.labels[TUMOR]
    scores: list[VolumeScore] = []
    for case in (c for c in store.cases if c.startswith(f"{TEST}/")):
        volume = store.read_volume(case)
        predicted = predict_volume(network, volume.image, config, device)
        scores.append(
            score_volume(
                case,
                predicted == tumor,
                volume.label == tumor,
                (volume.label == tumor) | (volume.label == organ),
                truth[case].tumors,
                scanner=truth[case].scanner,
                spacing_mm_zyx=store.spacing_mm_zyx,
                scoring=protocol.scoring,
            )
        )
    return {
        "figures": summarize(scores, protocol.scoring, protocol.phantoms.seen_scanners),
        "num_tumors": count_tumors(scores, protocol.scoring),
        "volumes": [asdict(s) for s in scores],
        "evaluate_s": time.perf_counter() - started,
    }


def _measured(folder: Path, config: Config, protocol: Protocol, generator: Path | None, judge: Path) -> dict[str, Any]:
    """What a configuration paints, before any verdict: contrast to the ring around it, and S's P by size class."""
    every = config.with_overrides(
        {"qc.threshold": None, "qc.retries": 0, "loader.annotated_fraction": 0.0, "loader.positive_fraction": 1.0}
    )
    store = open_store(folder / STORE)
    painters = load_painters(every, generator, judge)
    stage = build_synthesis_stage(every, *painters, with_gate=False, bank=build_bank(every, store, split="train"))
    low, high = every.region.window_hu
    contrasts: list[float] = []
    proportions: list[tuple[str, float]] = []
    with build_loader(every, store, split="train") as loader:
        num_left = protocol.scoring.measured_batches
        while num_left > 0:
            for batch in loader:
                painted = stage(batch)
                contrasts += _contrasts(batch, painted, every, high - low)
                judged = [r.painted for r in painted.records if r.painted is not None]
                proportions += [(p.size_class, p.proportion) for p in judged if not math.isnan(p.proportion)]
                num_left -= 1
                if num_left == 0:
                    break
    values = np.array([p for _, p in proportions])
    return {
        "num_painted": len(proportions),
        "contrast_hu": {
            "percentiles": dict(zip(map(str, PERCENTILES), _percentiles(contrasts), strict=True)),
            "sd": float(np.std(contrasts)) if contrasts else None,
        },
        "passes": {str(t): float((values >= t).mean()) if len(values) else None for t in THRESHOLDS},
        "proportions": [[size, p] for size, p in proportions],
    }


def _contrasts(batch: Batch, painted: Batch, config: Config, hu_of_unit: float) -> list[float]:
    """Contrast of every tumour of a painted batch, HU."""
    tumors, organs = config.region.tumor_values, [o.organ for o in config.region.organs.values()]
    found = []
    for row in range(len(batch.image)):
        label = painted.label[row, 0].cpu().numpy()
        mask = np.isin(label, tumors) & ~np.isin(batch.label[row, 0].cpu().numpy(), tumors)
        if mask.any():
            hu = painted.image[row, 0].cpu().numpy() * hu_of_unit
            found.append(contrast_hu(hu, mask, np.isin(label, organs), config.region.spacing_mm_zyx))
    return [c for c in found if not math.isnan(c)]


def _percentiles(values: list[float]) -> list[float | None]:
    return [float(v) for v in np.percentile(values, PERCENTILES)] if values else [None] * len(PERCENTILES)


def _plain(values: list[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def _device_name(device: str) -> str:
    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else "cpu"
