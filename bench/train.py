"""Our training loop against a bare PyTorch loop on the same batch; with --real-size one step of each stage at the paper's size.

The loop: both train the same network from the same weights on one batch that lies on the device, in blocks that take turns. Ours is the
loop of ``ftengine train`` whole: ledger of time, logs, TensorBoard, signals, learning rates; only the batch does not come from a store. A
block's time is from the end of its warm steps to the end of its last step, with the device's work done.

At real size: SwinUNETR 48 (S), G and C of width 32 (the released ones) and of the configured width (the light ones), random weights and
patches; every patch is healthy and painted, the hardest case for G. Compiled variants run in processes of their own, which are ended when the
time is up. A variant that fails is recorded with its reason, and the others go on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftengine.assemble import build_loader, resolve_device
from ftengine.bench.phantoms import write_store
from ftengine.bench.timing import environment, peak_bytes
from ftengine.config import Config
from ftengine.geometry import Box, int_zyx
from ftengine.loader.loader import Loader
from ftengine.store.reader import Store, open_store
from ftengine.training.losses import segmentation_loss
from ftengine.training.networks import build_classifier, build_generator, build_segmenter, count_parameters
from ftengine.training.run import Schedule
from ftengine.training.segmentation import Segmentation
from ftengine.training.synthesis import Adversarial
from ftengine.training.trainer import Frame, Procedure, Trainer
from ftengine.types import Augmentation, Batch, PatchRecord, PatchRequest

GOALS = {"ours_of_bare": 1.05}
OURS, BARE = "ftengine's loop", "bare PyTorch loop"
SMALL: Mapping[str, Any] = {
    "region.patch_zyx": (48, 48, 48),
    "training.batch_size": 2,
    "network.name": "unet",
    "network.channels": (8, 16, 32),
}
_RATE = 3e-4
_RELEASED_WIDTH = 32


class Repeating(Loader):
    """A loader with the plan of a store whose batches are all the same one."""

    def __init__(self, store: Store, config: Config, batch: Batch, device: torch.device) -> None:
        super().__init__(store, build_loader(config, store).plan, device=device)
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        """One endless epoch, whose number is that of the batch."""
        while True:
            yield self._batch


# the loop


def time_ours(
    config: Config, store: Store, batch: Batch, device: torch.device, folder: Path, *, steps: int, warm: int
) -> float:
    """Seconds of a step of our loop, in the mean of a block."""
    marks: dict[int, float] = {}

    def mark(done: int, _values: dict[str, float]) -> None:
        if done in {warm, warm + steps}:
            _finish(device)
            marks[done] = time.perf_counter()

    network = build_segmenter(config).to(device)
    trainer = Trainer(
        config,
        Segmentation(config, network, device),
        Repeating(store, config, batch, device),
        Frame(folder, device, on_step=mark),
        Schedule(warm + steps, _RATE, 0, log_every=config.training.log_every, checkpoint_every=1 << 30),
    )
    trainer.train()
    return (marks[warm + steps] - marks[warm]) / steps


def time_bare(config: Config, batch: Batch, device: torch.device, *, steps: int, warm: int) -> float:
    """Seconds of a step of the loop that anybody would write, in the mean of a block."""
    network = build_segmenter(config).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE)
    loss_function = segmentation_loss()
    started = 0.0
    for number in range(warm + steps):
        if number == warm:
            _finish(device)
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(batch.image), batch.label)
        loss.backward()
        optimizer.step()
    _finish(device)
    return (time.perf_counter() - started) / steps


def compare_loops(config: Config, device: torch.device, *, rounds: int, steps: int, warm: int) -> dict[str, Any]:
    """Blocks that take turns, the first of a round alternating; the ratio is the median over rounds."""
    samples: dict[str, list[float]] = {OURS: [], BARE: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = open_store(
            write_store(
                folder / "train.zarr", config.region, [(64, 64, 64)] * config.training.batch_size, with_tumors=True
            )
        )
        with build_loader(config, store, mix="annotated") as loader:
            found = next(iter(loader))
        batch = Batch(found.image.clone(), found.label.clone(), found.records)
        for number in range(-1, rounds):  # the first round does not count: memory, kernels
            order = (OURS, BARE) if number % 2 else (BARE, OURS)
            for candidate in order:
                seconds = (
                    time_ours(config, store, batch, device, folder / f"run-{number}", steps=steps, warm=warm)
                    if candidate == OURS
                    else time_bare(config, batch, device, steps=steps, warm=warm)
                )
                if number >= 0:
                    samples[candidate].append(seconds)
    ratios = [ours / bare for ours, bare in zip(samples[OURS], samples[BARE], strict=True)]
    return {
        "network": config.network.name,
        "parameters": count_parameters(build_segmenter(config)),
        "patch_zyx": list(config.region.patch_zyx),
        "batch_size": config.training.batch_size,
        "rounds": rounds,
        "steps": steps,
        "step_s": samples,
        "median_step_s": {candidate: statistics.median(times) for candidate, times in samples.items()},
        "ours_of_bare": statistics.median(ratios),
        "ratios_by_round": ratios,
        "goal": GOALS["ours_of_bare"],
    }


# one step of each stage


def variants(light_width: int, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """Name -> stage and keys of the configuration; eager ones first."""
    found: dict[str, dict[str, Any]] = {}
    for is_compiled in (False, True) if compiled else (False,):
        end = ", compiled" if is_compiled else ""
        for precision in ("fp32", "bf16") if not is_compiled else ("bf16",):
            found[f"seg, {precision}{end}"] = {
                "stage": "seg",
                "compiled": is_compiled,
                "keys": {"training.precision": precision, "training.compile": is_compiled},
            }
        for width in dict.fromkeys((light_width, _RELEASED_WIDTH)):
            found[f"synth, G {width}, bf16{end}"] = {
                "stage": "synth",
                "compiled": is_compiled,
                "keys": {
                    "generator.width": width,
                    "generator_training.precision": "bf16",
                    "generator_training.compile": is_compiled,
                },
            }
    return found


def healthy_batch(config: Config, size: int, device: torch.device) -> Batch:
    """Patches of noise with a block of the first organ each: all are painted."""
    region = config.region
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((size, 1, *region.patch_zyx), generator=generator)
    label = torch.zeros(image.shape, dtype=torch.uint8)
    z, y, x = (n // 8 for n in region.patch_zyx)
    label[:, :, z:-z, y:-y, x:-x] = next(iter(region.organs.values())).organ
    box = Box((0, 0, 0), int_zyx(region.patch_zyx))
    records = [
        PatchRecord(
            PatchRequest(0, n, n, f"b/{n}", "b", annotated=False, box=box, augmentation=Augmentation(), read=box)
        )
        for n in range(size)
    ]
    return Batch(image.to(device), label.to(device), records)


def build_stage(stage: str, config: Config, device: torch.device) -> tuple[Procedure, int]:
    """A procedure with random weights, and how many weights it trains."""
    segmenter = build_segmenter(config).to(device)
    if stage == "seg":
        return Segmentation(config, segmenter, device), count_parameters(segmenter)
    generator, classifier = build_generator(config).to(device), build_classifier(config).to(device)
    parameters = count_parameters(generator) + count_parameters(classifier)
    return Adversarial(config, generator, classifier, segmenter, device), parameters


def measure_stage(stage: str, config: Config, device: torch.device, *, steps: int) -> dict[str, Any]:
    """The first step (which compiles), then ``steps`` that count: seconds of each, and the most memory of them."""
    size = config.training.batch_size if stage == "seg" else config.generator_training.batch_size
    batch = healthy_batch(config, size, device)
    procedure, parameters = build_stage(stage, config, device)

    def step() -> dict[str, float]:
        procedure.add(batch)
        return procedure.update(1e-4).figures()  # reading the figures waits for the device

    first_s = _timed(step)
    step()  # cuDNN and the allocator have settled behind it
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples = [_timed(step) for _ in range(steps)]
    return {
        "first_step_s": first_s,
        "step_s": samples,
        "median_step_s": statistics.median(samples),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
        "parameters": parameters,
        "batch_size": size,
    }


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measured, or why it did not."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever stops a variant is its result
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def real_size(
    config: Config, device: torch.device, *, steps: int, seconds: float, compiled: bool
) -> dict[str, dict[str, Any]]:
    """All variants; what does not begin or end before ``seconds`` are over is recorded as left out."""
    deadline = time.monotonic() + seconds
    results = {}
    for name, variant in variants(config.generator.width, compiled=compiled).items():
        left = deadline - time.monotonic()
        if left <= 0:
            results[name] = {"error": f"left out: the {seconds:g} s were over (--seconds)"}
        elif variant["compiled"]:
            results[name] = attempt(lambda v=variant, s=left: _in_child(config, device, v, steps=steps, seconds=s))  # type: ignore[misc]  # bound now
        else:
            of_variant = config.with_overrides(variant["keys"])
            results[name] = attempt(lambda c=of_variant, v=variant: measure_stage(v["stage"], c, device, steps=steps))  # type: ignore[misc]  # bound now
    return results


def _in_child(
    config: Config, device: torch.device, variant: Mapping[str, Any], *, steps: int, seconds: float
) -> dict[str, Any]:
    job = {
        "config": config.with_overrides(variant["keys"]).model_dump(mode="json"),
        "stage": variant["stage"],
        "device": str(device),
        "steps": steps,
    }
    command = [sys.executable, "-m", "ftengine.bench.train", "--child", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)  # noqa: S603 - this program itself
    except subprocess.TimeoutExpired:
        return {"error": f"left out: not done within the {seconds:.0f} s that were left (--seconds)"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _child(job: Mapping[str, Any]) -> None:
    config = Config.from_dict(job["config"])
    device = torch.device(job["device"])
    print(json.dumps(attempt(lambda: measure_stage(job["stage"], config, device, steps=job["steps"]))))


def _timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# what is printed


def as_text(document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"### {document['title']}", ""]
    loop = document["loop"]
    if loop is not None:
        lines += [
            (
                f"{loop['network']} with {loop['parameters']:,} weights, patch {tuple(loop['patch_zyx'])}, batch {loop['batch_size']}; "
                f"{loop['rounds']} rounds of {loop['steps']} steps, taking turns. Ratio: median over rounds (goal {loop['goal']})."
            ),
            "",
            "| loop | median ms a step | of bare |",
            "|---|---|---|",
            f"| {BARE} | {loop['median_step_s'][BARE] * 1e3:.1f} | 1.000 |",
            f"| {OURS} | {loop['median_step_s'][OURS] * 1e3:.1f} | {loop['ours_of_bare']:.3f} |",
            "",
        ]
    if document["real_size"]:
        lines += ["| stage | step ms | peak GiB | first step s | trained weights |", "|---|---|---|---|---|"]
        for name, row in document["real_size"].items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | |")
            else:
                lines.append(
                    f"| {name} | {row['median_step_s'] * 1e3:.0f} | {row['peak_bytes'] / 2**30:.1f} | {row['first_step_s']:.1f} | {row['parameters']:,} |"
                )
    return "\n".join(lines)


def run(
    *,
    device: str = "auto",
    rounds: int = 5,
    steps: int = 20,
    with_real_size: bool = False,
    real_steps: int = 3,
    seconds: float = 110.0,
    compiled: bool = True,
    assignments: Sequence[str] = (),
    as_json: bool = False,
) -> dict[str, Any]:
    """Measure, print, return. rounds 0: no comparison of loops. assignments: of the configuration at real size, or else of the loops."""
    torch_device = resolve_device(device)
    real = Config.preset("abdomen").with_overrides({"device": device})
    small = real.with_overrides(dict(SMALL)).with_overrides({"loader.absent_classes": "allow"})
    loop = None
    if rounds:
        of_loops = small if with_real_size else small.with_assignments(assignments)
        loop = compare_loops(of_loops, torch_device, rounds=rounds, steps=steps, warm=2)
    document = {
        "title": f"training, {torch_device.type}",
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "loop": loop,
        "real_size": real_size(
            real.with_assignments(assignments), torch_device, steps=real_steps, seconds=seconds, compiled=compiled
        )
        if with_real_size
        else {},
    }
    print(json.dumps(document, indent=2) if as_json else as_text(document))
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench train``."""
    parser = argparse.ArgumentParser(prog="ftengine bench train", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="of the loops; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a block")
    parser.add_argument("--real-size", action="store_true", help="one step of each stage at the paper's size too")
    parser.add_argument("--real-steps", type=int, default=3, help="measured steps of each variant")
    parser.add_argument("--seconds", type=float, default=110.0, help="for all variants at real size together")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of the configuration (at real size where that is asked for)",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        _child(json.loads(options.child))
        return
    run(
        device=options.device,
        rounds=options.rounds,
        steps=options.steps,
        with_real_size=options.real_size,
        real_steps=options.real_steps,
        seconds=options.seconds,
        compiled=not options.no_compile,
        assignments=options.set,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
