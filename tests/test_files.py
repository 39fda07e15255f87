"""Files written whole or not at all, and what they are known by."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from ftengine.files import (
    read_json,
    sha256_of_files,
    sha256_of_stream,
    sync,
    write_json_whole,
    write_text_whole,
    write_whole,
)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_failure_keeps_what_was_there(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "f.txt"
    write_text_whole(file, "first \N{LATIN SMALL LETTER E WITH ACUTE}\n", durable=durable)
    assert file.read_bytes() == b"first \xc3\xa9\n"

    def fail(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(file, fail, durable=durable)
    assert file.read_bytes() == b"first \xc3\xa9\n"
    assert _names(tmp_path) == ["f.txt"]
    write_whole(file, lambda stream: stream.write(b"second"), durable=durable)
    assert file.read_bytes() == b"second"
    assert _names(tmp_path) == ["f.txt"]


def test_what_comes_before_the_move_sees_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")
    seen: list[bytes] = []
    write_whole(file, lambda stream: stream.write(b"new"), before=lambda: seen.append(file.read_bytes()))
    assert seen == [b"old"]
    assert file.read_bytes() == b"new"

    def refuse() -> None:
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError, match="not now"):
        write_whole(file, lambda stream: stream.write(b"newer"), before=refuse)
    assert file.read_bytes() == b"new"
    assert _names(tmp_path) == ["f"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("folder" if target == tmp_path else f"bytes {target.stat().st_size}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append("move")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_whole(tmp_path / "f", lambda stream: stream.write(b"12345"), before=lambda: done.append("before"))
    assert done == ["bytes 5", "before", "move", "folder"]
    done.clear()
    write_whole(tmp_path / "f", lambda stream: stream.write(b"123"), durable=False)
    assert done == ["move"]
    done.clear()
    sync(tmp_path / "f")
    assert done == ["bytes 3"]


_WRITER = """
import sys, time
from pathlib import Path
from ftengine.files import write_whole
def write(stream):
    stream.write(b"x" * 100_000); stream.flush(); print("half", flush=True); time.sleep(60)
write_whole(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    assert file.read_bytes() == b"old"
    assert next(n for n in _names(tmp_path) if n != "f").endswith(".partial")


def test_digests(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(range(256)) * 10_000)  # more than a block
    second.write_bytes(b"end")
    whole = first.read_bytes() + second.read_bytes()
    assert sha256_of_files(first, second) == hashlib.sha256(whole).hexdigest()
    assert sha256_of_files(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    assert sha256_of_files() == hashlib.sha256(b"").hexdigest()
    with first.open("rb") as stream:
        stream.seek(1000)
        assert sha256_of_stream(stream) == sha256_of_files(first)
        assert stream.tell() == 0
    with pytest.raises(FileNotFoundError):
        sha256_of_files(tmp_path / "none")


def test_json_is_read_back_and_holds_no_nan(tmp_path: Path) -> None:
    file = tmp_path / "made" / "document.json"
    write_json_whole(file, {"dice": 0.5, "none": None})
    assert read_json(file) == {"dice": 0.5, "none": None}
    with pytest.raises(ValueError, match="JSON"):
        write_json_whole(file, {"dice": float("nan")})
    assert [p.name for p in file.parent.iterdir()] == ["document.json"]
    assert read_json(file) == {"dice": 0.5, "none": None}


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text_whole(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
