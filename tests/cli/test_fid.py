"""``ftengine fid``: the JSON, the table of two ways to paint, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftengine.assemble import train_segmentation, train_synthesis
from ftengine.cli.main import app
from ftengine.errors import ConfigError
from ftengine.store.reader import Store
from ftengine.training.weight_files import sha256_of
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=1, generator_training__steps=1, qc__threshold=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("fid"), CONFIG)


@pytest.fixture(scope="module")
def segmenter(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmentation(CONFIG, store.path, tmp_path_factory.mktemp("fid") / "S", split="train").checkpoint


def test_two_ways_to_paint_in_one_table(
    store: Store, segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = train_synthesis(CONFIG, store.path, tmp_path / "G", baseline=segmenter).checkpoint
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.to_yaml())
    common = ["fid", str(store.path), "--features", str(segmenter), "--repeats", "2", "--config", str(config)]
    first, table = tmp_path / "fixed.json", tmp_path / "table.md"
    done = CliRunner().invoke(app, [*common, "--name", "fixed", "--out", str(first)])
    assert done.exit_code == 0, done.output
    assert "FID of synthetic against real tumours" in done.output
    assert "KID x 1000" in done.output
    assert "full rank" in done.stderr  # two samples
    painters = ["--synth", str(generator), "--judge", str(segmenter)]
    done = CliRunner().invoke(app, [*common, *painters, "--beside", str(first), "--out", str(table), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["name"] == "freetumor"
    assert document["painter"]["generator_sha256"] == f"sha256:{sha256_of(generator)}"
    assert document["settings"] == json.loads(first.read_text())["settings"]
    organ = document["organs"]["liver"]
    assert (organ["num_tumors"], len(organ["repeats"])) == (2, 2)
    fixed = json.loads(first.read_text())["organs"]["liver"]["fid"]
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| method", "| fixed", "| freetumor"]
    assert f"{fixed['mean']:.1f}" in rows[1]

    assert "- fixed: liver: " in table.read_text()  # few samples

    def no_painting(*_arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("ftengine.assemble.fid.load_painters", no_painting)
    other = [*common, "--margin-mm", "3", "--beside", str(first)]
    with pytest.raises(ConfigError, match=r"margin_mm=3\.0, and fixed with 10\.0"):
        CliRunner().invoke(app, other, catch_exceptions=False)
    monkeypatch.setattr("ftengine.assemble.fid.load_features", no_painting)
    with pytest.raises(ConfigError, match="named alike"):
        CliRunner().invoke(app, [*common, "--name", "fixed", "--beside", str(first)], catch_exceptions=False)


def test_refused(store: Store, segmenter: Path, tmp_path: Path) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(ConfigError) as error:
            CliRunner().invoke(app, ["fid", str(store.path), *arguments], catch_exceptions=False)
        return str(error.value)

    assert "no such file" in refusal("--features", str(tmp_path / "none.pt"))
    assert "--out r.html" in refusal("--features", str(segmenter), "--out", "r.html")
    (tmp_path / "r.json").write_text("{}")
    assert "is no result" in refusal("--features", str(segmenter), "--beside", str(tmp_path / "r.json"))
