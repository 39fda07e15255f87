"""``ftengine config``: show a configuration as YAML."""

import typer

from ftengine.cli.console import ConfigOption, SetOption


def config(
    preset: str = typer.Argument("abdomen", help="Preset to start from, e.g. abdomen, abdomen-liver, chest, demo."),
    file: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Print the whole configuration as YAML: every key, with the values a run would use."""
    from ftengine.config import Config

    chosen = Config.preset(preset) if file is None else Config.from_file(file, default_preset=preset)
    typer.echo(chosen.with_assignments(assignments or []).to_yaml(), nl=False)
