"""``ftengine bench``: every program by its name, with its own options."""

import json

import pytest
from typer.testing import CliRunner

from ftengine.cli.bench import PROGRAMS
from ftengine.cli.main import app
from ftengine.errors import ConfigError
from tests.kernels.support import REPOSITORY


def test_every_program_of_the_folder_has_its_name() -> None:
    modules = {path.stem for path in (REPOSITORY / "bench").glob("*.py")} - {
        "__init__",
        "timing",
        "phantoms",
        "slow_s3",
        "loader_parts",
        "loader_report",
    }
    experiments = {
        path.name for path in (REPOSITORY / "bench" / "experiments").iterdir() if (path / "__init__.py").exists()
    }
    assert set(PROGRAMS) == modules | {name.replace("_", "-") for name in experiments}
    listing = CliRunner().invoke(app, ["bench"])
    assert listing.exit_code == 0
    assert all(name in listing.output for name in PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_options_are_the_programs_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["bench", name, "--help"])
    assert result.exit_code == 0
    assert f"usage: ftengine bench {name}" in result.output
    assert "--json" in result.output or name == "shape_fit"  # it prints YAML
    assert capsys.readouterr().err == ""


def test_a_program_runs_and_prints_json() -> None:
    result = CliRunner().invoke(app, ["bench", "store", "--json", "--rounds", "1"])
    assert result.exit_code == 0
    assert [len(row["samples_s"]) for row in json.loads(result.output)["rows"]] == [1, 1, 1]


def test_an_unknown_name_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "nothing"])
    assert isinstance(result.exception, ConfigError)
    assert "want one of store, kernels" in str(result.exception)
