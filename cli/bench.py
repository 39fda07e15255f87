"""``ftengine bench NAME``: the measuring programs of bench/, one name each."""

from importlib import import_module
from typing import Annotated

import typer

from ftengine.cli.console import stdout
from ftengine.errors import ConfigError

PROGRAMS = {
    "store": "random patches: our reader, zarr-python on the same store, a whole .nii.gz",
    "kernels": "the kernels of the synthesis and their whole chain, by size class, batch and threads; on a GPU the share of its bandwidth",
    "box": "G and S on boxes around tumours against whole patches: time, verdicts, image; the GFLOP of the networks",
    "synthesisers": "painting a patch with each synthesiser, without networks",
    "loader": "our loader and those of MONAI, nnU-Net and TorchIO; read cost, shortest step, slow storage, memory",
    "step": "a training step on ready patches, on our loader's, on painted and judged ones",
    "train": "our training loop against a bare PyTorch loop; one step of each stage at real size",
    "shapes": "our tumour shapes against real ones",
    "shape_fit": "fit the laws of synthesis.shape realistic to real tumours",
    "convert": "conversion against the usual MONAI chain, workers, memory, size",
    "evaluation": "Dice, HD95 and surface Dice of label files against the same by MONAI, in as many workers",
    "scale": "an index of 161,310 rows; the whole conversion simulated",
    "faults": "conversions killed at random moments and resumed",
    "few-labels": "trained students: the baseline, painting in every variant, an oracle; paired seeds on phantoms, hours",
}
_MODULES = {"few-labels": "experiments.few_labels"}  # where it is not the program's name


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The program; without it they are listed.")] = None,
) -> None:
    """Measure side by side on this machine; ``ftengine bench NAME --help`` shows a program's options, all have ``--json``."""
    if name is None or name in {"-h", "--help"}:
        console = stdout()
        console.print("usage: ftengine bench NAME [--json] [OPTIONS]\n", highlight=False)
        for program, compares in PROGRAMS.items():
            console.print(f"  {program:<10} {compares}", highlight=False, soft_wrap=True)
        return
    if name not in PROGRAMS:
        raise ConfigError(f"bench {name}: no such program; want one of {', '.join(PROGRAMS)}.")
    import_module(f"ftengine.bench.{_MODULES.get(name, name)}").main(context.args)
