"""``ftengine turing`` as a user runs it: build, serve, answer, score; one line an error."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ftengine.bench.turing import Client, Server
from ftengine.cli.main import run
from ftengine.turing.study import read_key
from tests.support import make_store, small_config

SIZE = ("--size-mm", 60, 72, 84)
READERS = ("--reader", "Ada:Junior", "--reader", "Ben")


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("turing-cli"), small_config(), num_annotated=4, num_organs=4).path


def _run(*arguments: object, code: int = 0) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ftengine", "turing", *map(str, arguments)])
        try:
            run()
        except SystemExit as stop:
            found = int(stop.code or 0)
        else:
            found = 0
    assert found == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def _build(store: Path, folder: Path, *more: object, code: int = 0) -> tuple[str, str]:
    return _run("build", store, "--out", folder / "s", "--key", folder / "k.json", *READERS, *SIZE, *more, code=code)


def test_a_study_is_built_served_answered_and_scored(store_path: Path, tmp_path: Path) -> None:
    out, err = _build(
        store_path, tmp_path, "--per-type", 4, "--repeats", 2, "--training-cases", 2, "--type", "liver=HCC", "--json"
    )
    document = json.loads(out)
    assert {k: document[k] for k in ("num_cases", "num_training", "num_showings")} == {
        "num_cases": 4,
        "num_training": 2,
        "num_showings": 8,
    }
    assert document["case_bytes"] == 2 * 20 * 24 * 28
    assert "HCC: 3 real\nHCC: 3 synthetic\n" in err
    assert [w.split(":")[0] for w in document["warnings"]] == [
        "real cases come from a, painted ones from o",
        "no judge",
        "real tumours have a median diameter of 19 mm, painted ones of 11 mm",
    ]
    truth = read_key(tmp_path / "k.json").truth

    server = Server(tmp_path / "s")
    client = Client(server.port, server.links["Ada"])
    client.sign_in()
    showings = json.loads((tmp_path / "s" / "study.json").read_text())["readers"][0]["showings"]
    for number, showing in enumerate(showings):
        answer: dict[str, Any] = {
            "reader": "r01",
            "item": showing["item"],
            "answer_id": f"{number:032x}",
            "synthetic": truth[showing["case"]].synthetic,
            "confidence": 5,
            "visit": f"{number:032x}",
            "seconds": 2.0,
        }
        assert client.post("/api/answer", answer).status == 201
    assert server.end() == ""

    out, _ = _run("score", tmp_path / "s", "--key", tmp_path / "k.json", "--json", "--out", tmp_path / "scored")
    scored = json.loads(out)
    assert scored == json.loads((tmp_path / "scored" / "score.json").read_text())
    ada, ben = scored["readers"]
    assert (ada["accuracy"]["mean"], ada["num_answered"], ben["num_answered"]) == (1.0, 6, 0)
    assert scored["passed"]["HCC"] == {"passed": 0, "undecided": 0, "synthetic": 2}
    out, _ = _run("score", tmp_path / "s", "--key", tmp_path / "k.json")
    for text in ("HCC sen.", "Average", "1 Junior", "Not finished: Ben 0 of 6", "Fleiss' kappa"):
        assert text in out


def test_errors_are_one_line(store_path: Path, tmp_path: Path) -> None:
    _build(store_path, tmp_path, "--per-type", 2)
    study, key = tmp_path / "s", tmp_path / "k.json"
    for arguments, code, text in (
        (("build", store_path, "--out", study, "--key", tmp_path / "k2", *READERS), 2, "a study is never overwritten"),
        (("build", store_path, "--out", tmp_path / "t", "--key", key, *READERS), 2, "a key is never overwritten"),
        (
            ("build", store_path, "--out", tmp_path / "t", "--key", tmp_path / "t" / "k", *READERS),
            2,
            "inside the study",
        ),
        (("build", tmp_path, "--out", tmp_path / "t", "--key", tmp_path / "k2", *READERS), 3, "is not a store"),
        (
            ("build", store_path, "--out", tmp_path / "t", "--key", tmp_path / "k2", *READERS, *SIZE),
            2,
            "only 4 labelled",
        ),
        (("serve", tmp_path), 2, "is not a study"),
        (("serve", study, "--allow-host", "*"), 2, "want the plain name of a host"),
        (("score", study, "--key", tmp_path / "lost"), 2, "a study cannot be scored"),
        (("score", study, "--key", key), 2, "no reader has answered anything yet"),
        (("score", study, "--key", key, "--key", key), 2, "1 studies and 2 keys"),
    ):
        out, err = _run(*arguments, code=code)
        lines = [line for line in err.splitlines() if line.startswith("ftengine: error: ")]
        assert out == ""
        assert len(lines) == 1, err
        assert text in lines[0]
        assert "Traceback" not in err
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "k2").exists()


def test_a_second_server_is_refused(store_path: Path, tmp_path: Path) -> None:
    _build(store_path, tmp_path, "--per-type", 2, "--quiet")
    server = Server(tmp_path / "s")
    _, err = _run("serve", tmp_path / "s", code=2)
    assert "another server is running on this study" in err
    server.end()


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for a package that is not there
    _, err = _run("serve", "study", code=2)
    assert f"'ftengine turing serve' needs the package {package}" in err
    assert "pip install 'ftengine[study]'" in err


def test_building_and_scoring_need_no_server(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, package, None)
    _build(store_path, tmp_path, "--per-type", 2)
    _, err = _run("score", tmp_path / "s", "--key", tmp_path / "k.json", code=2)
    assert "nothing to score" in err
