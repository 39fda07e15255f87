"""The package list of pyproject.toml against the disk, and the guards of the mapped folders."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "cli", "bench")


def _project() -> dict[str, dict[str, object]]:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        return tomllib.load(stream)["tool"]["setuptools"]


def test_every_package_on_disk_is_listed() -> None:
    inside = [p.parent.relative_to(ROOT) for p in (ROOT / "ftengine").rglob("__init__.py") if not _is_below_link(p)]
    mapped = [
        Path("ftengine") / p.parent.relative_to(ROOT) for name in MAPPED for p in (ROOT / name).rglob("__init__.py")
    ]
    assert sorted(str(p).replace("/", ".") for p in inside + mapped) == sorted(_project()["packages"])


def _is_below_link(path: Path) -> bool:
    return path.relative_to(ROOT).parts[1] in MAPPED


@pytest.mark.parametrize("name", MAPPED)
def test_links_for_checkers_lead_to_the_mapped_folders(name: str) -> None:
    link = ROOT / "ftengine" / name
    assert link.resolve() == (ROOT / name).resolve()
    assert _project()["package-dir"][f"ftengine.{name}"] == name


@pytest.mark.parametrize("name", MAPPED)
def test_the_bare_name_does_not_import(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import ftengine.{name}" in done.stderr


def test_kernel_sources_and_presets_are_package_data() -> None:
    data = _project()["package-data"]
    assert any((ROOT / "kernels").glob("*.cu"))
    assert "*.cu" in data["ftengine.kernels"]  # type: ignore[operator]  # a list
    assert "presets/*.yaml" in data["ftengine"]  # type: ignore[operator]  # a list
    assert "shapes.yaml" in data["ftengine"]  # type: ignore[operator]  # a list
    assert {"plans/*.yaml", "paper/*.yaml"} <= set(data["ftengine.experiments"])  # type: ignore[call-overload]  # a list


def test_every_direct_dependency_is_pinned() -> None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {_bare(text) for text in wanted}
    pinned = {_bare(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names - pinned == set()


def _bare(requirement: str) -> str:
    for sign in "=<>!~[; ":
        requirement = requirement.split(sign, maxsplit=1)[0]
    return requirement.strip().lower()


def test_public_names_all_resolve() -> None:
    import ftengine

    assert len(ftengine.__all__) <= 12
    for name in ftengine.__all__:
        assert getattr(ftengine, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = ftengine.nothing_of_this_name


def test_import_stays_light() -> None:
    """``import ftengine`` and ``ftengine --help`` load neither torch nor DALI."""
    code = "import sys, ftengine.cli.main; print([m for m in ('torch', 'nvidia.dali', 'monai', 'SimpleITK', 'zarr') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
