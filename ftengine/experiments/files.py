"""Result files: a file that exists is whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(file: Path, document: Mapping[str, Any]) -> None:
    """Write JSON beside its place, bring it to the disk and move it there: a killed process leaves the old file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(document, stream, indent=1, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def read_whole(file: Path) -> dict[str, Any]:
    """What ``write_whole`` wrote."""
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def write_text_whole(file: Path, text: str) -> None:
    """The same for text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
