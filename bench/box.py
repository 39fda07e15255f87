"""``synthesis.box: auto`` against ``full``: how often quality control says the same, how much the painted image differs, the time of both.

Patches come from a store as training would see them, with the configuration that the generator was trained with (``--set`` changes it).
Both ways paint the same tumours on the same patches, in turns. ``--gflop`` counts the networks' arithmetic instead and needs no checkpoint.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ftengine.assemble import build_loader, load_painters, resolve_device
from ftengine.bench.timing import Row, environment, report
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX, int_zyx
from ftengine.store.reader import open_store
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.inference import inference_dtype
from ftengine.training.checkpoint import load_generator
from ftengine.training.networks import build_generator, build_segmenter
from ftengine.types import Batch

MODES = ("full", "auto")
_RELEASED_WIDTH = 32  # of the released generator


@dataclass
class _Compared:
    """One number a painted patch."""

    proportions: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    difference: list[float] = field(default_factory=list)  # mean inside M between the two ways, in [0, 1]
    contrast: list[float] = field(default_factory=list)  # mean inside M between painted and given image
    is_boxed: list[bool] = field(default_factory=list)
    size_class: list[str] = field(default_factory=list)


def run(
    *,
    synth: str | Path,
    judge: str | Path,
    store: str | Path,
    patches: int,
    assignments: Sequence[str] = (),
    as_json: bool = False,
) -> dict[str, Any]:
    """Paint until ``patches`` patches are painted each way; prints and returns the figures.

    Raises ConfigError where checkpoints, store and configuration do not fit, and where nothing in the store can be painted.
    """
    config = load_generator(synth)[1].with_assignments(assignments)
    synthesizers = {mode: _synthesizer(config, mode, synth, judge) for mode in MODES}
    compared, boxes, batches = _Compared(), Counter[str](), 0
    rows = {mode: Row(mode) for mode in MODES}
    with build_loader(config, open_store(store), mix="mixed") as loader:
        limit = 20 * patches // loader.plan.batch_size + 20
        while len(compared.difference) < patches:
            for batch in loader:
                batches += 1
                _compare(batch, synthesizers, compared, boxes, rows, warm=batches == 1)
                if len(compared.difference) >= patches or batches > limit:
                    break
            if batches > limit:
                break
    if not compared.difference:
        raise ConfigError(f"{store}: nothing in {batches} batches can be painted; want organs without tumours.")
    figures = _figures(config, compared, boxes)
    document = report(
        "box auto against full, a batch",
        list(rows.values()),
        "full",
        as_json=as_json,
        extra=figures | _conditions(config),
    )
    if not as_json:
        print()
        print(json.dumps(figures, indent=2))
    return document


def _synthesizer(config: Config, mode: str, synth: str | Path, judge: str | Path) -> Synthesizer:
    """Keeps all that it paints: the threshold is applied afterwards, to both ways alike."""
    one = config.with_overrides({"synthesis.box": mode, "qc.threshold": None, "qc.retries": 0})
    generator, segmenter = load_painters(one, synth, judge)
    return Synthesizer(one.region, one.synthesis, seed=one.seed, generator=generator, judge=segmenter)


def _compare(
    batch: Batch,
    synthesizers: dict[str, Synthesizer],
    compared: _Compared,
    boxes: Counter[str],
    rows: dict[str, Row],
    *,
    warm: bool,
) -> None:
    """Paint a batch both ways, the one that was last in the batch before now first."""
    addresses = [Address(r.request.epoch, r.request.index) for r in batch.records]
    voxels = [r.label_voxels for r in batch.records]
    drawn = synthesizers["auto"].draw(batch.label, addresses, label_voxels=voxels)
    if not drawn:
        return
    if warm:
        for mode in MODES:
            synthesizers[mode].paint(batch.image, batch.label, addresses, label_voxels=voxels).records()
    paintings = {}
    turn = len(rows["full"].samples_s) % 2
    for mode in (MODES[turn], MODES[1 - turn]):
        started = time.perf_counter()
        paintings[mode] = synthesizers[mode].paint(batch.image, batch.label, addresses, label_voxels=voxels)
        records = paintings[mode].records()
        rows[mode].samples_s.append(time.perf_counter() - started)
        compared.proportions[mode] += [r.proportion for r in records if r is not None and r.num_voxels]
    full, auto = (paintings[mode] for mode in MODES)
    for row, record in enumerate(full.records()):
        if record is None or not record.num_voxels:
            continue
        shape = synthesizers["auto"].box_of(drawn[row], int_zyx(batch.image.shape[2:]))
        boxes["whole patch" if shape is None else " x ".join(map(str, shape))] += 1
        inside = full.mask[row] > 0
        compared.difference.append(float((full.image[row] - auto.image[row])[inside].abs().mean()))
        compared.contrast.append(float((full.image[row] - batch.image[row])[inside].abs().mean()))
        compared.is_boxed.append(shape is not None)
        compared.size_class.append(record.size_class)


def _figures(config: Config, compared: _Compared, boxes: Counter[str]) -> dict[str, Any]:
    low, high = config.region.window_hu
    threshold = config.qc.threshold
    full, auto = (np.array(compared.proportions[mode]) for mode in MODES)
    boxed = np.array(compared.is_boxed)

    def over(chosen: np.ndarray[Any, Any]) -> dict[str, Any]:
        if not chosen.any():
            return {"patches": 0}
        passed = [p[chosen] >= (0.0 if threshold is None else threshold) for p in (full, auto)]
        return {
            "patches": int(chosen.sum()),
            "verdicts_agree": float((passed[0] == passed[1]).mean()),
            "pass_rate_full": float(passed[0].mean()),
            "pass_rate_auto": float(passed[1].mean()),
            "mean_difference_of_p": float(np.abs(full - auto)[chosen].mean()),
            "mean_p_full": float(full[chosen].mean()),
            "mean_difference_inside_hu": float(np.array(compared.difference)[chosen].mean() * (high - low)),
            "mean_contrast_hu": float(np.array(compared.contrast)[chosen].mean() * (high - low)),
        }

    return {
        "threshold": threshold,
        "all": over(np.ones_like(boxed)),
        "boxed": over(boxed),
        "sizes": dict(Counter(compared.size_class)),
        "boxes": dict(boxes),
    }


def _conditions(config: Config) -> dict[str, Any]:
    synthesis, device = config.synthesis, resolve_device(config.device)
    return {
        "device": str(device),
        "dtype": str(inference_dtype(synthesis, device)),
        "patch_zyx": list(config.region.patch_zyx),
        "spacing_mm_zyx": list(config.region.spacing_mm_zyx),
        "batch_size": config.training.batch_size,
        "box_context_mm": synthesis.box_context_mm,
        "box_least_vox": synthesis.box_least_vox,
        "channels_last": synthesis.channels_last,
        "compile": synthesis.compile,
        "cuda_graphs": synthesis.cuda_graphs,
    }


def gflop(network: nn.Module, shape_zyx: IntZYX) -> float:
    """GFLOP (2 a multiply-add) of one forward pass on one patch, counted by torch on tensors without memory."""
    network = network.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty((1, 1, *shape_zyx), device="meta"))
    return float(counter.get_total_flops()) / 1e9


def run_gflop(*, sides: Sequence[int] = (64, 96), as_json: bool = False) -> dict[str, Any]:
    """Count the abdomen preset's G, the released width and S on cubes of the given sides."""
    config = Config.preset("abdomen")
    wide = config.with_overrides({"generator.width": _RELEASED_WIDTH})
    networks = {
        f"G, generator.width={config.generator.width}": build_generator(config),
        f"G, generator.width={_RELEASED_WIDTH}": build_generator(wide),
        f"S, swinunetr {config.network.feature_size}": build_segmenter(
            config.with_overrides({"network.checkpointing": False})
        ),
    }
    counted = {name: {str(n): gflop(network, (n, n, n)) for n in sides} for name, network in networks.items()}
    document = {"title": "GFLOP of a forward pass on one patch", "environment": environment(), "gflop": counted}
    if as_json:
        print(json.dumps(document, indent=2))
        return document
    print("| network | " + " | ".join(f"{n}^3" for n in sides) + " |\n|---|" + "---|" * len(sides))
    for name, row in counted.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench box``."""
    parser = argparse.ArgumentParser(prog="ftengine bench box", description=__doc__)
    parser.add_argument("--synth", help="checkpoint of the generator")
    parser.add_argument("--judge", help="checkpoint of the segmenter")
    parser.add_argument("--store", help="where patches come from")
    parser.add_argument("--patches", type=int, default=64, help="painted patches to compare")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--gflop", action="store_true", help="count the networks' arithmetic and end")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.gflop:
        run_gflop(as_json=options.json)
        return
    if not (options.synth and options.judge and options.store):
        raise ConfigError("bench box: give --synth G.pt --judge S.pt --store STORE, or --gflop.")
    run(
        synth=options.synth,
        judge=options.judge,
        store=options.store,
        patches=options.patches,
        assignments=options.set,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
