"""Prediction of a file, whole: ours against MONAI's own chain with the same network; with --large the memory of a 512 x 512 x 1000 scan.

MONAI's chain: LoadImage, EnsureChannelFirst, Orientation, Spacing, ScaleIntensityRange, sliding_window_inference, argmax, Invert, SaveImage.
Both read one .nii.gz and write one .nii.gz in its geometry, taking turns in one process; each one's memory is that of a process of its own.
Before anything is timed, both sliding windows must give the same labels on MONAI's own resampled image.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ftengine.bench.timing import Row, as_table, environment, peak_bytes
from ftengine.config import Config
from ftengine.geometry import FloatZYX, IntZYX, grid_from_matrix, reverse_axes
from ftengine.prediction.infer import predict_volume
from ftengine.prediction.inputs import find_inputs
from ftengine.prediction.predict import Model, PredictOptions, predict_cases
from ftengine.training.checkpoint import load_segmenter, save_weights
from ftengine.training.networks import build_segmenter, count_parameters
from ftengine.training.weight_files import sha256_of
from ftengine.volume.nifti import write_nifti

GOALS = {"ours_of_monai": 1.0, "peak_gb": 6.0}
OURS, MONAI = "ftengine predict", "MONAI chain"
SHAPE_ZYX, SPACING_MM_ZYX = (100, 512, 512), (2.5, 0.75, 0.75)
LARGE_ZYX = (1000, 512, 512)
# at 1.5 mm the first shrinks to a fifth, the second stays as large as its file: the most that prediction has to hold
LARGE_SPACINGS_MM_ZYX: Mapping[str, FloatZYX] = {"clinical": (1.0, 0.8, 0.8), "worst": (1.5, 1.5, 1.5)}
SMALL: Mapping[str, Any] = {"network.name": "unet", "network.channels": (8, 16, 32), "inference.overlap": 0.25}


def write_scan(path: Path, shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> None:
    """An abdomen phantom in LPS order; beyond 100 slices one phantom repeated along z."""
    # processes that only predict must not pay for this import
    from ftengine.volume.phantom import TumorSpec, make_phantom

    depth, height, width = shape_zyx
    spacing_z, spacing_y, spacing_x = spacing_mm_zyx
    block = min(depth, 100)
    phantom = make_phantom(
        "abdomen",
        seed=4,
        shape_zyx=(block, height, width),
        spacing_mm_zyx=(250 / block, max(spacing_y, 400 / height), max(spacing_x, 400 / width)),
        tumors=TumorSpec(),
    )
    image = np.tile(phantom.image_hu, (math.ceil(depth / block), 1, 1))[:depth]
    write_nifti(path, image, grid_from_matrix(shape_zyx, np.diag([-spacing_x, -spacing_y, spacing_z, 1.0])))


def write_checkpoint(path: Path, assignments: Sequence[str]) -> None:
    """A segmenter of the abdomen with random weights."""
    config = Config.preset("abdomen").with_overrides(dict(SMALL)).with_assignments(assignments)
    save_weights(path, "segmenter", config, build_segmenter(config).state_dict(), identity={})


def predict_by_us(checkpoint: Path, scan: Path, out: Path, device: torch.device) -> None:
    """What the command does, checkpoint included."""
    network, config = load_segmenter(checkpoint)
    model = Model(network, config, sha256_of(checkpoint), device)
    inputs = find_inputs([str(scan)], config, checkpoint)
    (outcome,) = predict_cases(inputs, model, out, PredictOptions(overwrite=True))
    if outcome.status != "predicted":
        raise AssertionError(outcome.reason)


def predict_by_monai(checkpoint: Path, scan: Path, out: Path, device: torch.device) -> None:
    """The chain that MONAI's tutorials and bundles use."""
    from monai.transforms.io.array import SaveImage
    from monai.transforms.post.dictionary import Invertd

    network, config = load_segmenter(checkpoint)
    chain = monai_chain(config)
    data = chain({"image": str(scan)})
    data["label"] = data["image"].clone()
    data["label"].data = slide_by_monai(network, data["image"], config, device)[None].to(torch.float32)
    data = Invertd(keys="label", transform=chain, orig_keys="image", nearest_interp=True, to_tensor=True)(data)
    SaveImage(
        output_dir=out, output_postfix="", separate_folder=False, output_dtype=np.uint8, resample=False, print_log=False
    )(data["label"])


def monai_chain(config: Config) -> Any:
    """From a file to the windowed image on MONAI's grid, x y z."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import ScaleIntensityRanged
    from monai.transforms.io.dictionary import LoadImaged
    from monai.transforms.spatial.dictionary import Orientationd, Spacingd
    from monai.transforms.utility.dictionary import EnsureChannelFirstd

    low, high = config.region.window_hu
    return Compose(
        [
            LoadImaged(keys="image"),
            EnsureChannelFirstd(keys="image"),
            Orientationd(keys="image", axcodes="RAS", labels=None),
            Spacingd(keys="image", pixdim=config.region.spacing_mm_zyx[::-1], mode="bilinear"),
            ScaleIntensityRanged(keys="image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        ]
    )


def slide_by_monai(network: nn.Module, image: torch.Tensor, config: Config, device: torch.device) -> torch.Tensor:
    """Label [x, y, z] of a windowed image [1, x, y, z]; the network sees z y x, as it was trained."""
    from monai.inferers.utils import sliding_window_inference

    settings = config.inference
    zyx = torch.as_tensor(image).permute(0, 3, 2, 1).contiguous()
    with torch.no_grad():
        scores = sliding_window_inference(
            zyx[None],
            roi_size=config.region.patch_zyx,
            sw_batch_size=settings.windows_per_call,
            predictor=network.to(device).eval(),
            overlap=settings.overlap,
            mode=settings.weighting,
            sw_device=device,
            device="cpu",
        )
    assert isinstance(scores, torch.Tensor)  # noqa: S101 - one output, not a tuple
    return scores.argmax(1)[0].permute(2, 1, 0)


def check(checkpoint: Path, scan: Path, device: torch.device) -> float:
    """Share of voxels whose labels differ between the two sliding windows on one image, in whole HU. Raises AssertionError above 1e-6."""
    network, config = load_segmenter(checkpoint)
    low, high = config.region.window_hu
    unit = np.asarray(monai_chain(config)({"image": str(scan)})["image"])[0]
    hu: NDArray[np.int16] = np.rint(reverse_axes(unit) * (high - low) + low).astype(np.int16)
    again = (hu.astype(np.float32) - low) / (high - low)
    theirs = slide_by_monai(network, torch.from_numpy(reverse_axes(again).copy())[None], config, device)
    differ = float(np.mean(predict_volume(network, hu, config, device) != reverse_axes(theirs.numpy())))
    if differ > (0.0 if device.type == "cpu" else 1e-6):  # a GPU may divide by a constant in another way
        raise AssertionError(f"the two sliding windows differ in {differ:.2e} of the voxels")
    return differ


def compare(checkpoint: Path, scan: Path, folder: Path, device: torch.device, rounds: int) -> dict[str, Any]:
    """Ratio of one run, and the memory of each."""
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: predict_by_us(checkpoint, scan, folder / "ours", device),
        MONAI: lambda: predict_by_monai(checkpoint, scan, folder / "monai", device),
    }
    differ = check(checkpoint, scan, device)
    rows, cpu_s = interleave_with_cpu(calls, rounds=rounds)
    ours, theirs = (row.samples_s for row in rows)
    return {
        "differing_share": differ,
        "table": as_table("a scan from file to file", rows, MONAI),
        "samples_s": {row.name: row.samples_s for row in rows},
        "cpu_s": cpu_s,
        "ours_of_monai": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "ours_of_monai_cpu": statistics.median(a / b for a, b in zip(cpu_s[OURS], cpu_s[MONAI], strict=True)),
        "peak_gb": {
            name: _apart(part, checkpoint, scan, device)["peak_gb"] for name, part in ((OURS, "ours"), (MONAI, "monai"))
        },
    }


def interleave_with_cpu(
    calls: Mapping[str, Callable[[], object]], *, rounds: int
) -> tuple[list[Row], dict[str, list[float]]]:
    """Wall seconds as ``timing.interleave``, the first of a round alternating, and seconds of CPU of all threads, which other programs on the
    machine change less."""
    rows = {name: Row(name) for name in calls}
    cpu_s: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):  # the first does not count: files, kernels
        for name in calls if number % 2 else reversed(list(calls)):
            started, cpu_started = time.perf_counter(), time.process_time()
            calls[name]()
            if number >= 0:
                rows[name].samples_s.append(time.perf_counter() - started)
                cpu_s[name].append(time.process_time() - cpu_started)
    return list(rows.values()), cpu_s


def _apart(part: str, checkpoint: Path, scan: Path, device: torch.device) -> dict[str, Any]:
    """Run a part in a fresh process."""
    command = [sys.executable, "-m", "ftengine.bench.predict", "--part", part, "--device", str(device)]
    done = subprocess.run(  # noqa: S603 - this very module
        [*command, "--files", str(checkpoint), str(scan)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"{part} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_part(part: str, checkpoint: Path, scan: Path, device: torch.device) -> dict[str, Any]:
    """One prediction in this process: seconds, and the most memory that was resident. ``command``: through the command line."""
    started = time.perf_counter()
    imports_gb = peak_bytes() / 1e9
    with tempfile.TemporaryDirectory() as name:
        if part == "monai":
            predict_by_monai(checkpoint, scan, Path(name), device)
        elif part == "ours":
            predict_by_us(checkpoint, scan, Path(name), device)
        else:
            _by_command(["predict", str(checkpoint), str(scan), "--out", name, "--device", str(device)])
    return {"peak_gb": peak_bytes() / 1e9, "imports_gb": imports_gb, "s": time.perf_counter() - started}


def _by_command(arguments: Sequence[str]) -> None:
    from ftengine.cli.main import app

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            app(args=list(arguments))
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(f"{' '.join(arguments)}: exit code {stop.code}") from stop


def as_text(document: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"### {document['title']}",
        "",
        (
            f"{document['network']} with {document['parameters']:,} weights, {document['num_classes']} classes, patch {tuple(document['patch_zyx'])}, "
            f"overlap {document['overlap']:g}, {document['weighting']} weights."
        ),
        "",
    ]
    compared = document["compared"]
    if compared:
        peaks = ", ".join(f"{name} {gb:.2f} GB" for name, gb in compared["peak_gb"].items())
        lines += [
            compared["table"],
            "",
            (
                f"ours / MONAI: {compared['ours_of_monai']:.3f} of the time, {compared['ours_of_monai_cpu']:.3f} of the CPU time, medians over rounds "
                f"(goal {GOALS['ours_of_monai']:g} or less). Peak memory: {peaks}. "
                f"Labels that differ on one image: {compared['differing_share']:.1e}."
            ),
            "",
        ]
    for name, row in document["large"].items():
        lines.append(
            f"{name}: peak {row['peak_gb']:.2f} GB in {row['s']:.0f} s, imports {row['imports_gb']:.2f} GB (goal {GOALS['peak_gb']:g} GB)"
        )
    return "\n".join(lines)


def run(
    *,
    shape_zyx: IntZYX = SHAPE_ZYX,
    spacing_mm_zyx: FloatZYX = SPACING_MM_ZYX,
    device: str = "cpu",
    rounds: int = 3,
    large: Sequence[str] = (),
    large_zyx: IntZYX = LARGE_ZYX,
    checkpoint: Path | None = None,
    scan: Path | None = None,
    assignments: Sequence[str] = (),
    as_json: bool = False,
) -> dict[str, Any]:
    """Measure, print, return. rounds 0: no comparison. large: names of ``LARGE_SPACINGS_MM_ZYX``, one command each.

    checkpoint: instead of random weights; then ``assignments`` do nothing. scan: a CT file instead of the phantom.
    """
    torch_device = torch.device(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            checkpoint = folder / "weights.safetensors"
            write_checkpoint(checkpoint, assignments)
        compared = None
        if rounds:
            if scan is None:
                scan = folder / "scan_ct.nii.gz"
                write_scan(scan, shape_zyx, spacing_mm_zyx)
            compared = compare(checkpoint, scan, folder, torch_device, rounds)
        measured = {}
        for kind in large:
            path = folder / f"{kind}_ct.nii.gz"
            write_scan(path, large_zyx, LARGE_SPACINGS_MM_ZYX[kind])
            measured[f"{kind}, {large_zyx} at {LARGE_SPACINGS_MM_ZYX[kind]} mm"] = _apart(
                "command", checkpoint, path, torch_device
            )
            path.unlink()
        network, config = load_segmenter(checkpoint)
    document = {
        "title": f"prediction, {torch_device.type}",
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "network": config.network.name,
        "parameters": count_parameters(network),
        "num_classes": config.region.num_classes,
        "patch_zyx": list(config.region.patch_zyx),
        "overlap": config.inference.overlap,
        "weighting": config.inference.weighting,
        "compared": compared,
        "large": measured,
    }
    print(json.dumps(document, indent=2) if as_json else as_text(document))
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench predict``."""
    parser = argparse.ArgumentParser(prog="ftengine bench predict", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison; 0 leaves it out")
    parser.add_argument(
        "--large", nargs="*", default=[], choices=list(LARGE_SPACINGS_MM_ZYX), help="measure these commands' memory"
    )
    parser.add_argument("--checkpoint", type=Path, help="a segmenter of yours instead of random weights")
    parser.add_argument("--scan", type=Path, help="a CT file instead of the phantom")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration of the random network"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=("ours", "monai", "command"), help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is not None:
        checkpoint, scan = options.files
        print(json.dumps(measure_part(options.part, checkpoint, scan, torch.device(options.device))))
        return
    run(
        device=options.device,
        rounds=options.rounds,
        large=options.large,
        checkpoint=options.checkpoint,
        scan=options.scan,
        assignments=options.set,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
