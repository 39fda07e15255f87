"""A training step on patches that are on the device already, on our loader's, and on painted and judged ones; interleaved.

Every phantom is healthy and every patch holds an organ, so that all patches are eligible: the hardest case. G and S have the sizes of the
configuration and random weights; the last biases of S are set so that no class wins everywhere, and T is the median of P on the patches
made beforehand, so that both verdicts occur. Losses mean nothing here, times do.

A block starts its loader anew and leaves out the first steps, in which the queue still holds what was made before the clock ran. On a GPU
the host runs at most two steps ahead, and times are those of events on the training stream: ``idle`` is how long that stream stood still
for its next batch; ``wait`` is how long the host did.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ftengine.assemble import build_judge, build_loader, build_synthesis_stage, resolve_device
from ftengine.bench.phantoms import stored_bytes, write_store
from ftengine.bench.timing import environment, peak_bytes
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import IntZYX
from ftengine.loader.loader import Loader
from ftengine.loader.stages import Stage
from ftengine.store.reader import Store, open_store
from ftengine.synthesis.engine import Judge
from ftengine.synthesis.inference import Inference
from ftengine.training.losses import segmentation_loss
from ftengine.training.networks import build_generator, build_segmenter
from ftengine.types import Batch, PatchRecord

GOALS = {"step_of_ready": 1.25, "wait_share": 0.01}
READY, PLAIN = "ready patches", "our loader"
NUM_VOLUMES = 8
Size = Literal["released", "small"]
# size -> voxels of a phantom, and what the preset is changed to
SHAPES_ZYX: Mapping[Size, IntZYX] = {"released": (128, 160, 160), "small": (80, 96, 96)}
SIZES: Mapping[Size, Mapping[str, Any]] = {
    "released": {"training.precision": "bf16"},
    "small": {
        "region.patch_zyx": (64, 64, 64),
        "training.batch_size": 1,
        "network.name": "unet",
        "network.channels": (4, 8, 16),
        "generator.width": 2,
    },
}
EVERY_PATCH_ELIGIBLE: Mapping[str, Any] = {
    "loader.positive_fraction": 1.0,
    "loader.patches_per_epoch": 1 << 24,
    "qc.min_pass_rate": 0.0,
    "qc.retries": 0,
}
# name -> keys of the configuration; one that this version lacks leaves its variant out, but "full" is what there always is
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full patch, fp32": {"synthesis.box": "full", "synthesis.precision": "fp32"},
    "full patch": {"synthesis.box": "full"},
    "box": {"synthesis.box": "auto"},
}
BLOCKS: Mapping[Size, tuple[int, int, int]] = {"released": (3, 10, 6), "small": (3, 3, 2)}  # rounds, steps, warm steps
_READY_BATCHES = 6
_STEPS_AHEAD = 2


def has_key(config: Config, key: str) -> bool:
    """Whether a dotted key of the configuration exists."""
    values: Any = config.model_dump(mode="python")
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def known_variants(config: Config) -> dict[str, dict[str, Any]]:
    """The default variants as this version has them."""
    variants: dict[str, dict[str, Any]] = {"full patch": {}}
    for name, keys in VARIANTS.items():
        if all(has_key(config, key) for key in keys):
            variants[name] = dict(keys)
    return variants


# what a step is


class Trainer:
    """The segmenter that is trained: forward, DiceCE, backward, AdamW, as ``ftengine train seg`` does it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._network = build_segmenter(config).to(device).train()
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=config.training.learning_rate)
        self._loss = segmentation_loss()
        self._is_bf16 = config.training.precision == "bf16"

    def step(self, batch: Batch) -> Tensor:
        """One step; the loss stays on the device."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            loss: Tensor = self._loss(self._network(batch.image), batch.label)
        loss.backward()
        self._optimizer.step()
        return loss.detach()


class Clock(Protocol):
    """Marks on the device's own time line."""

    def mark(self) -> Any:
        """Now, behind everything launched so far."""
        ...

    def wait_for(self, mark: Any) -> None:
        """Block until the device has passed a mark."""
        ...

    def seconds(self, first: Any, second: Any) -> float:
        """Between two marks that are passed."""
        ...


class HostClock:
    """The host does the work: its clock is the device's."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def wait_for(self, mark: float) -> None:
        """Passed already."""

    def seconds(self, first: float, second: float) -> float:
        """The difference."""
        return second - first


class CudaClock:
    """Events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        """An event behind what was launched on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_for(self, mark: torch.cuda.Event) -> None:
        """Block until the event has happened."""
        mark.synchronize()

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Between two events that have happened."""
        return first.elapsed_time(second) / 1e3


@dataclass
class Samples:
    """All measured steps of a candidate, and what the batches were."""

    step_s: list[float] = field(default_factory=list)  # from the end of one step to the end of the next
    idle_s: list[float] = field(default_factory=list)  # of it: until the batch was there, on the device's time line
    wait_s: list[float] = field(default_factory=list)  # of the host, for the batch
    cpu_s: list[float] = field(default_factory=list)  # of the whole process, all threads
    round_medians_s: list[float] = field(default_factory=list)
    patches: int = 0
    painted: int = 0
    passed: int = 0
    busy_s: Counter[str] = field(default_factory=Counter)
    levels: list[dict[str, int]] = field(default_factory=list)

    def count(self, records: Sequence[PatchRecord]) -> None:
        """Count a batch's patches by what became of them."""
        self.patches += len(records)
        self.painted += sum(r.painted is not None for r in records)
        self.passed += sum(r.painted is not None and bool(r.painted.passed) for r in records)


def endless(loader: Loader) -> Iterator[Batch]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def levels_of(loader: Loader) -> dict[str, int]:
    """Fill of the loader's queues by name."""
    levels = getattr(loader, "levels", None)
    return {"ready": loader.queue_level()} if levels is None else dict(levels())


def copied(batch: Batch) -> Batch:
    """The batch in memory of its own: a stage may paint in place, and writes into the records."""
    return Batch(batch.image.clone(), batch.label.clone(), [copy.copy(r) for r in batch.records])


@dataclass
class Candidate:
    """Where a block's batches come from: a loader, or batches that lie ready (painted in the training thread with ``stage``)."""

    loader: Loader | None = None
    ready: Sequence[Batch] = ()
    stage: Stage | None = None

    def __post_init__(self) -> None:
        self._ring = cycle(self.ready)  # goes on from block to block

    def batches(self) -> Iterator[Batch]:
        """Endless; ends the loader's threads when closed."""
        if self.loader is not None:
            try:
                yield from endless(self.loader)
            finally:
                self.loader.close()
        for batch in self._ring:
            yield Batch(batch.image, batch.label, batch.records) if self.stage is None else self.stage(copied(batch))


def run_block(candidate: Candidate, trainer: Trainer, clock: Clock, samples: Samples, *, steps: int, warm: int) -> None:
    """``warm`` steps that do not count, then ``steps`` that do."""
    marks: list[tuple[Any, Any]] = []
    waits: list[float] = []
    cpu: list[float] = []
    records: list[list[PatchRecord]] = []
    loader = candidate.loader
    busy_before: Mapping[str, float] = {}
    with closing(candidate.batches()) as source:  # type: ignore[type-var]  # a generator, which has close
        for number in range(warm + steps):
            if loader is not None and number == warm:
                busy_before = loader.clock.seconds()
            if number >= _STEPS_AHEAD:
                clock.wait_for(marks[number - _STEPS_AHEAD][1])
            started = time.perf_counter()
            batch = next(source)
            waits.append(time.perf_counter() - started)
            arrived = clock.mark()
            trainer.step(batch)
            marks.append((arrived, clock.mark()))
            records.append(batch.records)
            cpu.append(time.process_time())
            if loader is not None and number >= warm:
                samples.levels.append(levels_of(loader))
        clock.wait_for(marks[-1][1])
        if loader is not None:
            busy = loader.clock.seconds()
            samples.busy_s.update({name: s - busy_before.get(name, 0.0) for name, s in busy.items()})
    counted = range(warm, warm + steps)
    step_s = [clock.seconds(marks[n - 1][1], marks[n][1]) for n in counted]
    samples.step_s += step_s
    samples.round_medians_s.append(statistics.median(step_s))
    samples.idle_s += [clock.seconds(marks[n - 1][1], marks[n][0]) for n in counted]
    samples.wait_s += [waits[n] for n in counted]
    samples.cpu_s += [cpu[n] - cpu[n - 1] for n in counted]
    for number in counted:
        samples.count(records[number])


# what is measured


def ready_batches(loader: Loader, device: torch.device) -> list[Batch]:
    """A few of the loader's batches, kept on the device. Raises AssertionError for one that is not as a batch must be."""
    kept = []
    with loader:
        for batch, _ in zip(endless(loader), range(_READY_BATCHES), strict=False):
            check_batch(batch, device)
            kept.append(Batch(batch.image.clone(), batch.label.clone(), batch.records))
    return kept


def check_batch(batch: Batch, device: torch.device) -> None:
    """AssertionError unless the batch has equal shapes, the right types and device, and holds more than one value."""
    image, label = batch.image, batch.label
    fits = image.shape == label.shape and image.ndim == 5 and len(batch.records) == len(image)
    typed = (image.dtype, label.dtype) == (torch.float32, torch.uint8) and image.device.type == device.type
    if not (fits and typed and bool(image.isfinite().all()) and float(image.std()) > 0 and bool((label > 0).any())):
        raise AssertionError(
            f"a batch of {tuple(image.shape)} {image.dtype} on {image.device} is none: nothing to time"
        )


def random_judge(config: Config, ready: Sequence[Batch], device: torch.device) -> nn.Module:
    """S with random weights whose classes are equally likely on average: its last biases are moved by the mean logits."""
    segmenter = build_segmenter(config.with_overrides({"seed": config.seed + 100})).to(device).eval()
    segmenter.requires_grad_(requires_grad=False)
    classes = config.region.num_classes
    last = [
        m
        for m in segmenter.modules()
        if isinstance(m, nn.Conv3d | nn.ConvTranspose3d) and m.out_channels == classes and m.bias is not None
    ][-1]
    with torch.no_grad():
        mean = torch.stack([segmenter(batch.image).mean(dim=(0, 2, 3, 4)) for batch in ready]).mean(dim=0)
        last.bias -= mean  # type: ignore[operator]  # asked for above
    return segmenter


def median_proportion(
    config: Config, generator: nn.Module, segmenter: nn.Module, ready: Sequence[Batch]
) -> tuple[float, list[float]]:
    """T that half of the painted patches pass, and P of each. Raises AssertionError where all P are alike: only one verdict could occur."""
    keep_all = config.with_overrides({"qc.threshold": None})
    stage = build_synthesis_stage(keep_all, generator, build_judge(keep_all, segmenter))
    proportions = []
    for batch in ready:
        painted = [r.painted for r in stage(copied(batch)).records]
        proportions += [float(p.proportion) for p in painted if p is not None]
    if len(set(proportions)) < 2:
        raise AssertionError(f"the random judge gives P={proportions}: no threshold gives both verdicts")
    return statistics.median(proportions), proportions


@dataclass
class Bench:
    """Everything that is made once: networks, patches, candidates."""

    config: Config
    device: torch.device
    trainer: Trainer
    candidates: dict[str, Candidate]
    description: dict[str, Any]


def prepare(
    config: Config,
    store: Store,
    device: torch.device,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    widths: Sequence[int],
    serial: bool,
) -> Bench:
    """Build all candidates and check that each gives batches."""

    def loader_of(cfg: Config, *stages: Stage) -> Loader:
        return build_loader(cfg, store, mix="mixed", stages=stages)

    ready = ready_batches(loader_of(config), device)
    segmenter = random_judge(config, ready, device)
    candidates = {READY: Candidate(ready=ready), PLAIN: Candidate(loader=loader_of(config))}
    description: dict[str, Any] = {
        "thresholds": {},
        "proportions": {},
        "variants": {k: dict(v) for k, v in variants.items()},
    }
    for width in widths:
        of_width = config.with_overrides({"generator.width": width})
        generator = build_generator(of_width).to(device).eval().requires_grad_(requires_grad=False)
        threshold, proportions = median_proportion(of_width, generator, segmenter, ready)
        description["thresholds"][width], description["proportions"][width] = threshold, proportions
        judged = of_width.with_overrides({"qc.threshold": threshold})

        def stage_of(cfg: Config, generator: nn.Module = generator) -> Stage:
            own_generator, own_segmenter = (
                Inference(copy.deepcopy(network), cfg.synthesis, device) for network in (generator, segmenter)
            )
            judge: Judge = build_judge(cfg, own_segmenter)
            return build_synthesis_stage(cfg, own_generator, judge)

        for name, keys in variants.items():
            cfg = judged.with_overrides(keys)
            candidates[f"painted and judged, {name}, G {width}"] = Candidate(loader=loader_of(cfg, stage_of(cfg)))
        if serial:
            first = judged.with_overrides(next(iter(variants.values())))
            candidates[f"the same in the training thread, G {width}"] = Candidate(ready=ready, stage=stage_of(first))
    return Bench(config, device, Trainer(config, device), candidates, description)


def run(
    *,
    size: Size = "released",
    device: str = "auto",
    store: Path | None = None,
    rounds: int,
    steps: int,
    warm: int,
    widths: Sequence[int] = (),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    serial: bool = True,
    assignments: Sequence[str] = (),
    count_syncs: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Measure, print, return. store: made there where it is missing; None: in a temporary folder. widths: of G; empty: the configured one."""
    torch_device = resolve_device(device)
    config = Config.preset("abdomen").with_overrides({**EVERY_PATCH_ELIGIBLE, **SIZES[size], "device": device})
    if has_key(config, "loader.absent_classes"):  # healthy phantoms hold no tumour class
        config = config.with_overrides({"loader.absent_classes": "allow"})
    config = config.with_assignments(assignments)
    with tempfile.TemporaryDirectory() as name:
        place = write_store(
            Path(name) / "step.zarr" if store is None else store,
            config.region,
            [SHAPES_ZYX[size]] * NUM_VOLUMES,
            with_tumors=False,
        )
        opened = open_store(place)
        bench = prepare(
            config,
            opened,
            torch_device,
            variants=known_variants(config) if variants is None else variants,
            widths=widths or [config.generator.width],
            serial=serial,
        )
        clock: Clock = CudaClock() if torch_device.type == "cuda" else HostClock()
        samples = measure(bench, clock, rounds=rounds, steps=steps, warm=warm)
        syncs = host_syncs(bench, clock, steps=warm) if count_syncs and torch_device.type == "cuda" else None
    document = {
        "title": f"training step, {config.network.name}, patch {config.region.patch_zyx}, batch {config.training.batch_size}, {torch_device.type}",
        "environment": environment(),
        "store": {"volumes": len(opened), "bytes": stored_bytes(place) if place.exists() else None},
        "config": config.model_dump(mode="json"),
        "weights": "random; S centred, T the median of P",
        **bench.description,
        "rounds": rounds,
        "steps": steps,
        "warm_steps": warm,
        "peak_host_bytes": peak_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch_device.type == "cuda" else None,
        "host_syncs": syncs,
        "candidates": {name: as_document(s, samples[READY]) for name, s in samples.items()},
    }
    print(json.dumps(document, indent=2) if as_json else as_text(document))
    return document


def measure(bench: Bench, clock: Clock, *, rounds: int, steps: int, warm: int) -> dict[str, Samples]:
    """One block of every candidate a round, after one of each that does not count (kernels and graphs are compiled there)."""
    for name, candidate in bench.candidates.items():
        tried = Samples()
        run_block(candidate, bench.trainer, clock, tried, steps=max(2, warm), warm=1)
        check_painted(name, candidate, tried)
    samples = {name: Samples() for name in bench.candidates}
    for _ in range(rounds):
        for name, candidate in bench.candidates.items():
            run_block(candidate, bench.trainer, clock, samples[name], steps=steps, warm=warm)
    return samples


def check_painted(name: str, candidate: Candidate, tried: Samples) -> None:
    """AssertionError where a candidate with a stage painted nothing, or one without a stage painted."""
    stages = bool(candidate.stage) or (candidate.loader is not None and bool(candidate.loader.stages))
    if bool(tried.painted) != stages:
        raise AssertionError(f"{name}: {tried.painted} of {tried.patches} patches were painted: nothing to time")


def host_syncs(bench: Bench, clock: Clock, *, steps: int) -> dict[str, dict[str, int]]:
    """Calls that made the host wait for the device while a loader ran, by the place in the code, as torch reports them."""
    found: dict[str, dict[str, int]] = {}
    for name, candidate in bench.candidates.items():
        if candidate.loader is None:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run_block(candidate, bench.trainer, clock, Samples(), steps=steps, warm=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        found[name] = dict(Counter(places))
    return found


# what is printed


def as_document(samples: Samples, ready: Samples) -> dict[str, Any]:
    """Figures of a candidate; ``step_of_ready`` is the median over rounds of its median step over that on ready patches."""
    total = sum(samples.step_s)
    ratios = [a / b for a, b in zip(samples.round_medians_s, ready.round_medians_s, strict=True)]
    levels = Counter[str]()
    for level in samples.levels:
        levels.update(level)
    return {
        "median_step_s": statistics.median(samples.step_s),
        "mean_step_s": statistics.fmean(samples.step_s),
        "step_of_ready": statistics.median(ratios),
        "mean_step_of_ready": statistics.fmean(samples.step_s) / statistics.fmean(ready.step_s),
        "ratios_by_round": ratios,
        "wait_share": sum(samples.wait_s) / total,
        "idle_share": sum(samples.idle_s) / total,
        "median_cpu_s": statistics.median(samples.cpu_s),
        "painted_share": samples.painted / samples.patches,
        "pass_rate": samples.passed / samples.painted if samples.painted else None,
        "busy_s_a_step": {name: s / len(samples.step_s) for name, s in samples.busy_s.items()},
        "mean_levels": {name: n / len(samples.levels) for name, n in levels.items()},
        "step_s": samples.step_s,
        "idle_s": samples.idle_s,
        "wait_s": samples.wait_s,
        "cpu_s": samples.cpu_s,
    }


def as_text(document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"### {document['title']}",
        "",
        (
            f"Ratios: median over {document['rounds']} rounds of {document['steps']} steps (goal for painted and judged: "
            f"{GOALS['step_of_ready']}); the wait should be at most {GOALS['wait_share']:.0%}. Weights: {document['weights']}."
        ),
        "",
        "| step on | median ms | mean ms | CPU ms | of ready | host waits | device idle | painted | passed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in document["candidates"].items():
        passed = "" if c["pass_rate"] is None else f"{c['pass_rate']:.0%}"
        lines.append(
            f"| {name} | {c['median_step_s'] * 1e3:.1f} | {c['mean_step_s'] * 1e3:.1f} | {c['median_cpu_s'] * 1e3:.0f} | {c['step_of_ready']:.2f} | {c['wait_share']:.2%} | "
            f"{c['idle_share']:.2%} | {c['painted_share']:.0%} | {passed} |"
        )
    lines += ["", "Busy ms a step, by part of the loader:", ""]
    for name, c in document["candidates"].items():
        if c["busy_s_a_step"]:
            parts = ", ".join(f"{part} {seconds * 1e3:.1f}" for part, seconds in c["busy_s_a_step"].items())
            levels = ", ".join(f"{queue} {level:.1f}" for queue, level in c["mean_levels"].items())
            lines.append(f"- {name}: {parts}; mean queue levels: {levels}")
    if document["host_syncs"] is not None:
        lines += ["", f"Host syncs by place: {json.dumps(document['host_syncs'])}"]
    return "\n".join(lines)


def parse_variants(given: Sequence[Sequence[str]] | None, config: Config) -> dict[str, dict[str, Any]] | None:
    """``--variant NAME key=value ...``, each given once; None where none is given. Raises ConfigError for an unknown key."""
    if not given:
        return None
    variants: dict[str, dict[str, Any]] = {}
    for name, *assignments in given:
        changed = config.with_assignments(assignments).model_dump(mode="python")
        keys = [text.partition("=")[0].strip() for text in assignments]
        variants[name] = {key: _value(changed, key) for key in keys}
    return variants


def _value(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench step``."""
    parser = argparse.ArgumentParser(prog="ftengine bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: released on a GPU, small on the CPU")
    parser.add_argument("--store", type=Path, help="a store of phantoms, made there where it is missing")
    parser.add_argument("--make-store", action="store_true", help="only make the store of --store")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--steps", type=int, help="measured steps of a block; default: 10, small: 3")
    parser.add_argument("--warm", type=int, help="steps before them; default: 6, small: 2")
    parser.add_argument("--g-width", type=int, nargs="+", default=[], help="widths of G; 32 is the released one")
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        metavar="NAME KEY=VALUE",
        help="a way to paint, e.g. --variant box synthesis.box=auto; can be given again; default: full patch, box",
    )
    parser.add_argument("--no-serial", action="store_true", help="leave out painting in the training thread")
    parser.add_argument("--syncs", action="store_true", help="count host syncs too (GPU)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration of all candidates"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    size: Size = options.size or ("released" if resolve_device(options.device).type == "cuda" else "small")
    rounds, steps, warm = BLOCKS[size]
    if options.make_store:
        if options.store is None:
            raise ConfigError("--make-store: want --store FOLDER, where it is made.")
        place = write_store(
            options.store, Config.preset("abdomen").region, [SHAPES_ZYX[size]] * NUM_VOLUMES, with_tumors=False
        )
        print(f"{place}: {stored_bytes(place) / 1e6:.1f} MB")
        return
    run(
        size=size,
        device=options.device,
        store=options.store,
        rounds=rounds if options.rounds is None else options.rounds,
        steps=steps if options.steps is None else options.steps,
        warm=warm if options.warm is None else options.warm,
        widths=options.g_width,
        variants=parse_variants(options.variant, Config.preset("abdomen")),
        serial=not options.no_serial,
        assignments=options.set,
        count_syncs=options.syncs,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
