"""The kernels of the synthesis and their whole chain, by size class, batch and threads, in one interleaved run.

The unit on the CPU is ``scipy.ndimage.gaussian_filter`` of one patch in float64 with sigma 1.5 voxels, one thread; on a
GPU it is the card's own device-to-device copy. Results are compared with the references before anything is timed.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import torch
from torch import Tensor

from ftengine.bench.timing import environment, interleave
from ftengine.config import Config
from ftengine.geometry import IntZYX, mm_to_vox
from ftengine.kernels import (
    choose_center,
    gaussian_blur,
    masked_blend,
    prepare_patch,
    tumor_mask_and_box,
    tumor_proportion,
)
from ftengine.kernels.gaussian_blur_ref import gaussian_blur_ref
from ftengine.kernels.masked_blend_ref import masked_blend_ref
from ftengine.kernels.tumor_mask_ref import tumor_mask_ref
from ftengine.synthesis.shape import draw_patch

SIZE_CLASSES = ("tiny", "small", "medium", "large")
RELEASED_MS = 42.5  # mask, texture, blur and blend of one patch in the released code, one CPU core (reference 3.1)
EDGE_SIGMA_MM = 1.2
UNIT = "SciPy's Gaussian filter"
_CLASSES = 7
_WARM_LAUNCHES = 20
_CALLS_IN_A_ROW = 5


@dataclass(frozen=True)
class Inputs:
    """What a batch needs; the organ fills the patch, so that no tumour is cut short by it."""

    x: Tensor
    g: Tensor
    organ: Tensor
    draws: Tensor  # of the centres, uniform in [0, 1)
    radii: Tensor  # [B, 1, 3]: one tumour a patch
    warp: Tensor
    texture_sigma: Tensor
    edge_sigma: Tensor
    edge_reach: Tensor  # int64 [2, 3], what the edge's window adds to a box
    margin: IntZYX
    logits: Tensor
    raw_image: Tensor  # a padded read: int16 HU
    raw_label: Tensor

    @property
    def shape(self) -> IntZYX:
        """Voxels of a patch."""
        return (self.x.shape[1], self.x.shape[2], self.x.shape[3])


def make_inputs(size_class: str, batch: int, patch_zyx: IntZYX, device: torch.device) -> Inputs:
    """Tumours of one class as the abdomen preset draws them, on noise."""
    config = Config.preset("abdomen").with_overrides({"synthesis.size_weights": {size_class: 1.0}})
    spacing = config.region.spacing_mm_zyx
    drawn = [draw_patch(["liver"], config.synthesis, spacing, seed=0, epoch=0, index=i) for i in range(batch)]
    patches = [d for d in drawn if d is not None]
    rng = np.random.default_rng(0)
    edge_sigma = mm_to_vox(EDGE_SIGMA_MM, spacing)
    reach = [int(4 * sigma + 0.5) for sigma in edge_sigma]
    tensor = torch.from_numpy
    shape = (batch, *patch_zyx)
    padded = (batch, *(n + 8 for n in patch_zyx))
    return Inputs(
        x=tensor(rng.random(shape, dtype=np.float32)).to(device),
        g=tensor(rng.standard_normal(shape, dtype=np.float32)).to(device),
        organ=torch.ones(shape, dtype=torch.uint8, device=device),
        draws=tensor(rng.uniform(0.45, 0.55, batch)),  # near the middle: no tumour is cut by the patch's border
        radii=torch.tensor([[p.tumors[0].radii_vox_zyx] for p in patches], dtype=torch.float64),
        warp=tensor(np.stack([p.tumors[0].warp[None] for p in patches])),
        texture_sigma=torch.tensor([mm_to_vox(p.texture_sigma_mm, spacing) for p in patches], dtype=torch.float64),
        edge_sigma=torch.tensor(edge_sigma, dtype=torch.float64),
        edge_reach=torch.tensor([[-n for n in reach], reach], dtype=torch.int64).to(device),
        margin=tuple(int(n) for n in mm_to_vox(config.synthesis.center_margin_mm, spacing)),  # type: ignore[arg-type]  # three
        logits=tensor(rng.standard_normal((batch, _CLASSES, *patch_zyx), dtype=np.float32)).to(device),
        raw_image=tensor(rng.integers(-1000, 1000, padded, dtype=np.int16)).to(device),
        raw_label=tensor(rng.integers(0, _CLASSES, padded, dtype=np.uint8)).to(device),
    )


@dataclass(frozen=True)
class Buffers:
    """What a loop keeps from batch to batch, as ``Synthesizer`` does: the chain allocates nothing."""

    image: Tensor  # painted in place; after the first call it holds painted tumours, which cost the same to paint
    mask: Tensor
    box: Tensor
    soft: Tensor
    texture: Tensor

    @classmethod
    def like(cls, x: Tensor) -> "Buffers":
        """For batches like ``x``."""
        return cls(
            image=x.clone(),
            mask=torch.zeros_like(x, dtype=torch.uint8),
            box=torch.zeros((len(x), 2, 3), dtype=torch.int64, device=x.device),
            soft=torch.zeros_like(x),
            texture=torch.zeros_like(x),
        )


def hard_chain(inputs: Inputs, center: Tensor, buffers: Buffers) -> Tensor:
    """The paper variant: mask, texture (the patch blurred where the tumour lies), Eq. 1."""
    mask, box = tumor_mask_and_box(
        center, inputs.radii, inputs.warp, inputs.shape, inputs.organ, out=buffers.mask, box_out=buffers.box
    )
    texture = gaussian_blur(inputs.x, inputs.texture_sigma, box=box, out=buffers.texture)
    return masked_blend(buffers.image, inputs.g, texture, mask, box=box, out=buffers.image)


def soft_chain(inputs: Inputs, center: Tensor, buffers: Buffers) -> Tensor:
    """The same with a soft edge that fades inside the organ: two blurs, as in the released code."""
    mask, box = tumor_mask_and_box(
        center, inputs.radii, inputs.warp, inputs.shape, inputs.organ, out=buffers.mask, box_out=buffers.box
    )
    box = box + inputs.edge_reach
    soft = gaussian_blur(mask, inputs.edge_sigma, box=box, out=buffers.soft)
    texture = gaussian_blur(inputs.x, inputs.texture_sigma, box=box, out=buffers.texture)
    return masked_blend(buffers.image, inputs.g, texture, soft, organ=inputs.organ, box=box, out=buffers.image)


@dataclass(frozen=True)
class Case:
    """One thing to time: its name, the call, and the fewest bytes that it can move (None: not bound by memory)."""

    name: str
    call: Callable[[], object]
    num_bytes: int | None


def make_cases(inputs: Inputs) -> list[Case]:
    """Every kernel on one batch, and the two chains. Bytes count each input that must be read and each output once."""
    center = choose_center(inputs.organ, inputs.margin, inputs.draws)
    mask, box = tumor_mask_and_box(center, inputs.radii, inputs.warp, inputs.shape, inputs.organ)
    texture = gaussian_blur(inputs.x, inputs.texture_sigma, box=box)
    buffers = Buffers.like(inputs.x)
    batch, voxels = len(inputs.x), inputs.x.numel()
    painted = int(mask.sum())
    boxed = int((box[:, 1] - box[:, 0]).prod(1).sum())
    origin = torch.full((batch, 3), 4, dtype=torch.int64)
    turned = torch.arange(batch) % 2 == 1
    flips = torch.stack((turned, ~turned, turned), dim=1)
    factors = torch.linspace(0.9, 1.1, batch, dtype=torch.float32)
    return [
        Case("choose_center", lambda: choose_center(inputs.organ, inputs.margin, inputs.draws), voxels),
        Case(
            "tumor_mask",
            lambda: tumor_mask_and_box(center, inputs.radii, inputs.warp, inputs.shape, inputs.organ),
            voxels + boxed,
        ),
        Case("gaussian_blur", lambda: gaussian_blur(inputs.x, inputs.texture_sigma), 8 * voxels),
        Case(
            "gaussian_blur, box",
            lambda: gaussian_blur(inputs.x, inputs.texture_sigma, box=box),
            4 * voxels + 4 * boxed,  # the zeros outside are written too
        ),
        Case("masked_blend", lambda: masked_blend(inputs.x, inputs.g, texture, mask), 9 * voxels + 8 * painted),
        Case("tumor_proportion", lambda: tumor_proportion(mask, mask), voxels + painted),
        Case(
            "tumor_proportion, logits",
            lambda: tumor_proportion(inputs.logits, mask, tumor_classes=[2]),
            voxels + 4 * _CLASSES * painted,
        ),
        Case(
            "prepare_patch",
            lambda: prepare_patch(
                inputs.raw_image,
                inputs.raw_label,
                shape_zyx=inputs.shape,
                window_hu=(-175.0, 250.0),
                origin_zyx=origin,
                transpose_yx=turned,
                flip_zyx=flips,
                scale=factors,
                shift=factors - 1,
            ),
            (2 + 1 + 4 + 1) * voxels,
        ),
        Case("mask, texture, blend", lambda: hard_chain(inputs, center, buffers), None),
        Case("mask, texture, edge blur, blend", lambda: soft_chain(inputs, center, buffers), None),
    ]


def check(patch_zyx: IntZYX) -> None:
    """The chain against the float64 references, kernel by kernel; a difference would make every figure worthless."""
    inputs = make_inputs("small", 1, patch_zyx, torch.device("cpu"))
    center = choose_center(inputs.organ, inputs.margin, inputs.draws)
    mask, _ = tumor_mask_and_box(center, inputs.radii, inputs.warp, inputs.shape, inputs.organ)
    wanted = tumor_mask_ref(center[0, 0].numpy(), inputs.radii[0, 0].numpy(), inputs.warp[0, 0].numpy(), inputs.shape)
    if not np.array_equal(mask[0].numpy(), wanted):
        raise AssertionError("tumor_mask differs from its reference: nothing to time")
    x = inputs.x[0].numpy()
    texture = gaussian_blur_ref(x, inputs.texture_sigma[0].numpy())
    painted = masked_blend_ref(x, inputs.g[0].numpy(), texture, wanted)
    chain = hard_chain(inputs, center, Buffers.like(inputs.x))
    worst = float(np.abs(chain[0].numpy() - painted).max())
    if not worst <= 1e-5:
        raise AssertionError(f"the chain differs from its references by {worst}: nothing to time")


def run(
    *,
    patch_zyx: IntZYX = (96, 96, 96),
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 9,
    devices: Sequence[str] = ("cpu", "gpu"),
    as_json: bool = False,
) -> dict[str, Any]:
    """Time everything on ``devices``; returns and prints one document with all samples (seconds a call)."""
    check(patch_zyx)
    document: dict[str, Any] = {"environment": environment(), "patch_zyx": patch_zyx, "rounds": rounds}
    if "cpu" in devices:
        document |= _run_on_cpu(patch_zyx, batches, rounds)
    document["gpu"] = (
        _run_on_gpu(patch_zyx, batches, rounds) if "gpu" in devices and torch.cuda.is_available() else None
    )
    print(json.dumps(document, indent=2) if as_json else _as_text(document))
    return document


def _run_on_cpu(patch_zyx: IntZYX, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    threads_before = torch.get_num_threads()
    unit_input = np.random.default_rng(0).random(patch_zyx)
    candidates: dict[str, Callable[[], object]] = {UNIT: lambda: ndi.gaussian_filter(unit_input, 1.5)}
    try:
        torch.set_num_threads(1)
        for size_class in SIZE_CLASSES:
            inputs = make_inputs(size_class, 1, patch_zyx, torch.device("cpu"))
            candidates |= {f"{case.name} | {size_class}": case.call for case in make_cases(inputs)}
        by_class = {row.name: row.samples_s for row in interleave(candidates, rounds=rounds)}
    finally:
        torch.set_num_threads(threads_before)
    return {"one_patch_one_thread": by_class, "batches": _run_batches(patch_zyx, batches, rounds)}


def _run_batches(patch_zyx: IntZYX, batches: Sequence[int], rounds: int) -> dict[str, list[float]]:
    """The chains with one thread and with two, on batches of one class and on mixed ones, where every class stands equally often.

    A sample is one thread's work: where one large tumour is most of a batch, two threads cannot gain much. Each timing is the mean of
    a few calls in a row, as a loader makes them: buffers and threads are warm, as in one_patch_one_thread they are not.
    """
    threads_before = torch.get_num_threads()
    candidates: dict[str, Callable[[], object]] = {}
    for batch in batches:
        device = torch.device("cpu")
        for content, inputs in (
            ("mixed", _mixed(batch, patch_zyx, device)),
            ("medium", make_inputs("medium", batch, patch_zyx, device)),
        ):
            center = choose_center(inputs.organ, inputs.margin, inputs.draws)
            for name, chain in (("hard", hard_chain), ("soft", soft_chain)):
                for threads in (1, 2):
                    candidates[f"{name} | {content} | {batch} | {threads}"] = _with_threads(
                        threads, chain, inputs, center
                    )
    try:
        rows = interleave(candidates, rounds=rounds)
        return {row.name: [seconds / _CALLS_IN_A_ROW for seconds in row.samples_s] for row in rows}
    finally:
        torch.set_num_threads(threads_before)


def _with_threads(
    threads: int, chain: Callable[[Inputs, Tensor, Buffers], Tensor], inputs: Inputs, center: Tensor
) -> Callable[[], object]:
    buffers = Buffers.like(inputs.x)

    def call() -> object:
        torch.set_num_threads(threads)
        for _ in range(_CALLS_IN_A_ROW):
            chain(inputs, center, buffers)
        return None

    return call


def _mixed(batch: int, patch_zyx: IntZYX, device: torch.device) -> Inputs:
    """A batch whose samples take the size classes in turn."""
    by_class = [make_inputs(name, batch, patch_zyx, device) for name in SIZE_CLASSES]
    first = by_class[0]
    turn = [by_class[b % len(by_class)] for b in range(batch)]
    return Inputs(
        **{
            **first.__dict__,
            "radii": torch.stack([inputs.radii[b] for b, inputs in enumerate(turn)]),
            "warp": torch.stack([inputs.warp[b] for b, inputs in enumerate(turn)]),
        }
    )


# ---- GPU ----


def _run_on_gpu(patch_zyx: IntZYX, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Each kernel and the chains on a mixed batch, launched one by one; a host sync is an error throughout."""
    device = torch.device("cuda", torch.cuda.current_device())
    copy_s, copied = _copy_samples(device, rounds)
    document: dict[str, Any] = {"copy_bytes": copied, "copy_s": copy_s, "batches": {}}
    for batch in batches:
        inputs = _mixed(batch, patch_zyx, device)
        cases = make_cases(inputs)
        calls: dict[str, Callable[[], object]] = {case.name: case.call for case in cases}
        samples, busy = _gpu_samples(calls, rounds), _busy_samples(calls, rounds)
        document["batches"][str(batch)] = {
            name: {
                "samples_s": seconds,
                "busy_s": busy[name],
                "bytes": next((case.num_bytes for case in cases if case.name == name), None),
            }
            for name, seconds in samples.items()
        }
    return document


def _copy_samples(device: torch.device, rounds: int) -> tuple[list[float], int]:
    """The card's own copy within its memory: seconds a copy, and bytes read and written by one."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    samples = _gpu_samples({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return samples, 2 * source.numel() * source.element_size()


def _gpu_samples(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call by CUDA events around a row of launches, so that the host's time counts where it is the longer one."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, call in calls.items():
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.set_sync_debug_mode("error")
            try:
                started.record()
                for _ in range(_WARM_LAUNCHES):
                    call()
                ended.record()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            ended.synchronize()
            samples[name].append(started.elapsed_time(ended) / 1e3 / _WARM_LAUNCHES)
    return samples


def _busy_samples(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call that the device itself works, by the profiler: kernels and copies, without the gaps between them."""
    from torch.profiler import ProfilerActivity, profile

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(_WARM_LAUNCHES):
                    call()
                torch.cuda.synchronize()
            busy_us = sum(event.self_device_time_total for event in profiler.key_averages())
            samples[name].append(busy_us / 1e6 / _WARM_LAUNCHES)
    return samples


# ---- what is printed ----


def summary(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the goals are about: ratios to the unit, the factor to the released code, the gain of two threads."""
    samples = document["one_patch_one_thread"]
    unit = statistics.median(samples[UNIT])
    figures = {"unit_ms": unit * 1e3}
    for label, chain in (("hard", "mask, texture, blend"), ("soft", "mask, texture, edge blur, blend")):
        mean = statistics.fmean(statistics.median(samples[f"{chain} | {name}"]) for name in SIZE_CLASSES)
        figures[f"{label}_chain_ms"] = mean * 1e3
        figures[f"{label}_chain_of_unit"] = mean / unit
        figures[f"{label}_times_faster_than_released"] = RELEASED_MS / (mean * 1e3)
    for name, seconds in document["batches"].items():
        chain, content, batch, threads = name.split(" | ")
        if threads == "2":
            alone = document["batches"][f"{chain} | {content} | {batch} | 1"]
            gain = statistics.median(alone) / statistics.median(seconds)
            figures[f"{chain}_{content}_batch_{batch}_two_threads"] = gain
    return figures


def _as_text(document: Mapping[str, Any]) -> str:
    cpu = _cpu_text(document) if "one_patch_one_thread" in document else []
    return "\n".join([*cpu, *_gpu_text(document["gpu"])])


def _cpu_text(document: Mapping[str, Any]) -> list[str]:
    samples = document["one_patch_one_thread"]
    figures = summary(document)
    kernels = [name.removesuffix(" | tiny") for name in samples if name.endswith(" | tiny")]
    lines = [
        f"### one patch {tuple(document['patch_zyx'])}, one CPU thread, median ms",
        "",
        f"| kernel | {' | '.join(SIZE_CLASSES)} | mean / {UNIT} ({figures['unit_ms']:.1f} ms) |",
        "|---|" + "---|" * (len(SIZE_CLASSES) + 1),
    ]
    for kernel in kernels:
        medians = [statistics.median(samples[f"{kernel} | {name}"]) * 1e3 for name in SIZE_CLASSES]
        lines.append(
            f"| {kernel} | {' | '.join(f'{m:.2f}' for m in medians)} | {statistics.fmean(medians) / figures['unit_ms']:.3f} |"
        )
    lines.extend(
        f"\n{chain} edge: {figures[f'{chain}_chain_ms']:.2f} ms, {figures[f'{chain}_chain_of_unit']:.3f} of the unit, "
        f"{figures[f'{chain}_times_faster_than_released']:.0f} times faster than the released code's {RELEASED_MS} ms"
        for chain in ("hard", "soft")
    )
    lines += [
        "",
        "### batches, median ms",
        "",
        "| edge | tumours | batch | one thread | two threads | gain |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in document["batches"].items():
        chain, content, batch, threads = name.split(" | ")
        if threads == "1":
            two = statistics.median(document["batches"][f"{chain} | {content} | {batch} | 2"])
            one = statistics.median(seconds)
            lines.append(f"| {chain} | {content} | {batch} | {one * 1e3:.2f} | {two * 1e3:.2f} | {one / two:.2f} |")
    return [*lines, ""]


def _gpu_text(gpu: Mapping[str, Any] | None) -> list[str]:
    if gpu is None:
        return ["GPU: not measured, none is here."]
    bandwidth = gpu["copy_bytes"] / statistics.median(gpu["copy_s"])
    lines = [
        f"### GPU; its own copy moves {bandwidth / 1e9:.0f} GB/s",
        "",
        "| batch | kernel | launched one by one, median ms | device busy, median ms | GB/s while busy | of the copy |",
        "|---|---|---|---|---|---|",
    ]
    for batch, cases in gpu["batches"].items():
        for name, case in cases.items():
            seconds, busy = statistics.median(case["samples_s"]), statistics.median(case["busy_s"])
            rate = "" if case["bytes"] is None else f"{case['bytes'] / busy / 1e9:.0f}"
            share = "" if case["bytes"] is None else f"{case['bytes'] / busy / bandwidth:.2f}"
            lines.append(f"| {batch} | {name} | {seconds * 1e3:.4f} | {busy * 1e3:.4f} | {rate} | {share} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench kernels``."""
    parser = argparse.ArgumentParser(prog="ftengine bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device", choices=("cpu", "gpu"), nargs="+", default=["cpu", "gpu"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run(batches=options.batch, rounds=options.rounds, devices=options.device, as_json=options.json)


if __name__ == "__main__":
    main()
