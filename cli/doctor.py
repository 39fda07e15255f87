"""``ftengine doctor``: what this machine has."""

import typer
from rich.table import Table

from ftengine.cli.console import JsonOption, print_json, stdout


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine has and what will therefore be used; paste it into a bug report. Exit code 1 where something is wrong."""
    from ftengine.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        table = Table("what", "found", title="ftengine doctor")
        for name in ("ftengine", "python", "system", "cores"):
            table.add_row(name, str(found[name]))
        for name in ("memory_gb", "shared_memory_gb", "free_disk_gb"):
            table.add_row(name, "?" if found[name] is None else f"{found[name]:.1f}")
        for name, version in found["packages"].items():
            table.add_row(name, version or "not installed")
        table.add_row("CUDA of torch", found["cuda_of_torch"] or "none (CPU build)")
        table.add_row(
            "GPUs",
            "\n".join(f"{g['name']}, {g['memory_gb']:.0f} GB, compute {g['compute']}" for g in found["gpus"]) or "none",
        )
        for stage, what in found["will_use"].items():
            table.add_row(f"will use for {stage}", what)
        stdout().print(table)
        for problem in found["problems"]:
            typer.echo(f"problem: {problem}", err=True)
    raise typer.Exit(1 if found["problems"] else 0)
