"""Files: written whole or not at all, brought to the disk where that matters, and known by their SHA-256."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

_BLOCK_BYTES = 1 << 20


def write_whole(
    path: Path,
    write: Callable[[IO[bytes]], object],
    *,
    durable: bool = True,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write a file aside, in ``.NAME.<hex>.partial`` of its folder, and move it to its name: a reader meets the old one or the new one.

    The folder is made where it is missing. A pipe or a device, such as ``/dev/stdout``, is written to as it stands.

    durable: bytes and name are on the disk when this returns, so that a power cut keeps them; for a file that can be made again, leave it
    out. before: called just before the move. Raises what writing raises; what was at ``path`` stays then, and nothing is left beside it.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            write(stream)
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as stream:
            write(stream)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        before()
        partial.replace(path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """``write_whole`` of a text in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode("utf-8")), durable=durable)


def write_json_whole(path: Path, document: Mapping[str, Any]) -> None:
    """``write_whole`` of an object of JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json_whole`` wrote."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_files(*files: Path) -> str:
    """SHA-256 of the bytes of some files, one after the other, as 64 hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def sha256_of_stream(stream: IO[bytes]) -> str:
    """SHA-256 of what an open file holds from its beginning; leaves it at its beginning."""
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a binary file, as it wants
    stream.seek(0)
    return digest
