"""Each kernel's CPU path against SciPy or NumPy computing the same; on a GPU, the CUDA kernel beside them."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.ndimage as ndi
import torch

from ftengine.bench.timing import Row, interleave, report
from ftengine.geometry import IntZYX
from ftengine.kernels import gaussian_blur, masked_blend, tumor_mask, tumor_proportion


def run(*, batch: int, patch_zyx: IntZYX, rounds: int, as_json: bool = False) -> list[dict[str, Any]]:
    """Every kernel on a batch of patches; results are compared before anything is timed."""
    rng = np.random.default_rng(0)
    x = rng.random((batch, *patch_zyx), dtype=np.float32)
    sigma = (0.8, 1.2, 1.2)
    center = [tuple(n // 2 for n in patch_zyx)] * batch
    radii = [(8.0, 9.0, 7.0)] * batch
    warp = torch.from_numpy(rng.normal(0, 1.5, (batch, 3, 2, 3, 3)))
    mask = tumor_mask(center, radii, warp, patch_zyx)
    tx, tmask = torch.from_numpy(x), mask
    g = torch.from_numpy(rng.normal(size=x.shape).astype(np.float32))

    predicted = torch.from_numpy(rng.random(x.shape) < 0.7)

    def blur_by_scipy() -> np.ndarray[Any, Any]:
        return np.stack([ndi.gaussian_filter(v, sigma) for v in x])

    def blend_by_numpy() -> np.ndarray[Any, Any]:
        m = mask.numpy()
        return np.asarray((1 - m) * x + m * (x - np.tanh(g.numpy()) * x))

    def proportion_by_numpy() -> np.ndarray[Any, Any]:
        inside = mask.numpy() == 1
        return np.array([(predicted.numpy()[i] & inside[i]).sum() / max(1, inside[i].sum()) for i in range(batch)])

    cases: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...], Callable[[], np.ndarray[Any, Any]] | None]] = {
        "gaussian_blur": (gaussian_blur, (tx, sigma), blur_by_scipy),
        "tumor_mask": (tumor_mask, (center, radii, warp, patch_zyx), None),
        "masked_blend": (masked_blend, (tx, g, tx, tmask.float()), blend_by_numpy),
        "tumor_proportion": (tumor_proportion, (predicted, tmask), proportion_by_numpy),
    }
    results = []
    for name, (kernel, arguments, reference) in cases.items():
        candidates: dict[str, Callable[[], object]] = {"ftengine, CPU": partial(kernel, *arguments)}
        if reference is not None:
            ours, wanted = kernel(*arguments).numpy(), reference()
            worst = float(np.abs(ours - wanted).max())
            if not worst <= 1e-5:
                raise AssertionError(
                    f"{name} differs from its reference by {worst} at {int((ours != wanted).sum())} places: nothing to time"
                )
            candidates["SciPy or NumPy"] = reference
        if torch.cuda.is_available():
            candidates["ftengine, CUDA"] = _on_gpu(kernel, arguments)
        rows: list[Row] = interleave(candidates, rounds=rounds)
        baseline = "SciPy or NumPy" if reference is not None else "ftengine, CPU"
        extra = {"batch": batch, "patch_zyx": patch_zyx}
        results.append(report(f"{name}, {batch} x {patch_zyx}", rows, baseline, as_json=as_json, extra=extra))
    return results


def _on_gpu(kernel: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> Callable[[], object]:
    moved = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)

    def call() -> object:
        result = kernel(*moved)
        torch.cuda.synchronize()
        return result

    return call


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench kernels``."""
    parser = argparse.ArgumentParser(prog="ftengine bench kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run(batch=4, patch_zyx=(96, 96, 96), rounds=options.rounds, as_json=options.json)


if __name__ == "__main__":
    main()
