"""Imports point one way: data goes right, imports go left (ARCHITECTURE.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"errors", "files", "geometry", "rng", "types", "config", "vml"}

# what each part may import of ftengine, besides itself
ALLOWED = {
    "errors": set[str](),
    "files": set[str](),
    "geometry": {"errors"},
    "rng": set[str](),
    "vml": set[str](),
    "types": {"geometry"},
    "config": {"errors", "geometry"},
    "kernels": {"errors", "geometry", "rng", "vml"},
    "volume": BASE,
    "datasets": {"errors", "config", "volume"},
    "store": BASE | {"volume", "datasets"},
    "loader": BASE | {"store", "kernels"},
    "synthesis": BASE | {"kernels"},
    "quality": BASE | {"kernels"},
    "training": BASE | {"loader", "synthesis", "quality"},
    "prediction": BASE | {"volume", "store", "training"},
    "evaluation": BASE | {"volume", "store", "training", "prediction"},
    "fid": BASE | {"store", "synthesis", "quality", "training", "evaluation"},
    "pictures": BASE | {"volume", "store", "loader", "synthesis", "quality", "training"},
    "report": BASE | {"volume", "store", "quality", "training", "evaluation", "pictures"},
    "organs": BASE | {"store", "training", "prediction"},
    "experiments": BASE | {"volume", "datasets", "store", "quality", "training", "evaluation", "assemble"},
    "turing": BASE | {"store", "synthesis", "quality", "evaluation", "pictures"},
    "adapters": BASE | {"store", "loader", "synthesis", "quality", "training", "assemble"},
}


def _modules() -> list[Path]:
    files = []
    for part in ALLOWED:
        folder = ROOT / ("kernels" if part == "kernels" else f"ftengine/{part}")
        files += sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return files


def _part(file: Path) -> str:
    relative = file.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def _imported_parts(file: Path) -> set[str]:
    """The parts of ftengine that a module imports, inside functions too; ``ftengine`` alone is the version."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "ftengine" else [f"ftengine.{a.name}" for a in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ftengine.")}
    return found - {"__version__"}


@pytest.mark.parametrize("module", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(module: Path) -> None:
    part = _part(module)
    assert _imported_parts(module) - {part} <= ALLOWED[part]


def test_only_the_top_level_knows_all_stages() -> None:
    """Everything else beside the stages is known: nobody adds a second ``assemble``."""
    files = {p.stem for p in (ROOT / "ftengine").glob("*.py")}
    assert files == BASE | {"__init__", "demo", "doctor"}


@pytest.mark.parametrize("module", sorted((ROOT / "ftengine" / "assemble").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_what_is_assembled_is_built_in_one_place(module: Path) -> None:
    """``assemble.build`` knows no sibling, the others only it; the package's own file hands all of it out."""
    siblings = {
        node.module.split(".")[2]
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ftengine.assemble.")
    }
    assert siblings <= ({"build"} - {module.stem})
    assert not _imported_parts(module) & {"demo", "doctor", "adapters", "cli", "bench"}


@pytest.mark.parametrize("folder", ["ftengine", "kernels", "cli", "bench"])
def test_nothing_imports_the_adapters(folder: str) -> None:
    """They are for the programs of users."""
    others = [p for p in (ROOT / folder).rglob("*.py") if "adapters" not in p.relative_to(ROOT).parts]
    assert others
    assert [p for p in others if "adapters" in _imported_parts(p)] == []


@pytest.mark.parametrize("folder", ["ftengine", "kernels"])
def test_only_commands_and_benches_import_experiments(folder: str) -> None:
    """An experiment calls ``assemble`` as a user would; the few-labels experiment of bench shares its scheduler."""
    links = {"experiments", "cli", "bench"}
    others = [p for p in (ROOT / folder).rglob("*.py") if not links & set(p.relative_to(ROOT).parts)]
    assert others
    assert [p for p in others if "experiments" in _imported_parts(p)] == []
