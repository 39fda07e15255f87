"""``ftengine view`` as a user starts it: one JSON document or a list of addresses, a server that answers, a clean end."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import typer

from ftengine.cli import view
from ftengine.cli.main import run
from ftengine.store.reader import open_store
from ftengine.store.serve import listen
from tests.support import make_store, small_config


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("view"), small_config()).path


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ftengine", "view", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run()
    return int(stop.value.code or 0)


def _get(url: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20)  # noqa: S310 - loopback


def test_it_serves_until_ctrl_c(store_path: Path) -> None:
    """A process of its own: what it printed leads to the bytes of the store, and SIGINT ends it in order."""
    command = [sys.executable, "-m", "ftengine.cli.main", "view", str(store_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert "Ctrl-C ends it" in process.stderr.readline()  # printed behind the document
            lines = [process.stdout.readline()]
            while not lines[-1].startswith("}"):
                assert lines[-1], "the document ends early"
                lines.append(process.stdout.readline())
            document = json.loads("".join(lines))
            store = open_store(store_path)
            assert document["num_volumes"] == len(store)
            assert [links["case"] for links in document["cases"]] == store.cases
            shard = (store_path / "volumes" / store.cases[0] / "0/c/0/0/0").read_bytes()
            with _get(f"{document['cases'][0]['image_url']}0/c/0/0/0", Range="bytes=-100") as answer:
                assert (answer.status, answer.read()) == (206, shard[-100:])
            with _get(document["url"]) as answer:
                page = answer.read().decode()
            assert all(case in page for case in store.cases)
        finally:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Addresses at which the command would have waited for requests: these tests are about what it prints."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr("ftengine.store.serve.run_server", lambda _, sock: seen.append(sock.getsockname()))
    return seen


def test_it_prints_addresses_of_the_first_cases(
    store_path: Path, served: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "SHOWN", 3)
    assert _main(monkeypatch, store_path) == 0
    ((host, port),) = served
    assert host == "127.0.0.1"
    out = capsys.readouterr().out
    base = f"http://127.0.0.1:{port}/"
    assert out.startswith(f"{base}  4 volumes\n")
    for case in ("a/0", "a/1", "o/0"):
        assert f"\n{case}\n  zarr          {base}store/volumes/{case}/\n" in out
        assert f"  label         {base}store/volumes/{case}/labels/seg/\n" in out
    assert out.count("  neuroglancer  https://neuroglancer-demo.appspot.com/#!%7B") == 3
    assert f"... and 1 more: see {base}, or name one with --case" in out


def test_a_case_can_be_named(
    store_path: Path, served: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, store_path, "--case", "o/1", "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert [links["case"] for links in json.loads(out)["cases"]] == ["o/1"]
    assert (err, len(served)) == ("", 1)


def test_open_opens_the_list(store_path: Path, served: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(typer, "launch", opened.append)
    assert _main(monkeypatch, store_path, "--open") == 0
    assert opened == [f"http://127.0.0.1:{served[0][1]}/"]


def test_errors_are_one_line_before_anything_is_printed(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        for arguments, code, text in (
            ((tmp_path,), 3, "is not a store"),
            ((store_path, "--case", "o/9"), 3, "holds no case 'o/9'"),
            ((store_path, "--port", port), 2, f"127.0.0.1:{port} cannot be had"),
            ((store_path, "--allow-origin", "*"), 2, "want https://HOST"),
        ):
            assert _main(monkeypatch, *arguments) == code
            out, err = capsys.readouterr()
            assert out == ""
            assert len(err.splitlines()) == 1
            assert err.startswith("ftengine: error: ")
            assert text in err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named_with_its_cure(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for a package that is not there
    assert _main(monkeypatch, store_path) == 2
    assert f"'ftengine view' needs the package {package}" in capsys.readouterr().err


def test_help_needs_no_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert _main(monkeypatch, "--help") == 0
    assert "Serve a local store read-only on 127.0.0.1" in capsys.readouterr().out
