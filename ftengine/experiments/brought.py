"""What folders of label files hold that the user brings: a digest, so that other files under the same path are another unit."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.evaluation.pairs import label_files
from ftengine.files import sha256_of_files
from ftengine.volume.cases import image_stem

_DETACHED = (".nhdr", ".mhd")  # headers whose voxels lie in a file beside them


def digest_of_labels(path: Path, *, is_truth: bool) -> str:
    """A digest of the names below ``path``, sizes and bytes of its label files; its place does not count. Nothing there has a digest, too.

    Of a detached header, the files of the same name beside it count. Raises ConfigError where a file cannot be read.
    """
    if not path.is_dir():
        found = [path] if path.is_file() else []
        root = path.parent
    else:
        found, root = list(label_files(path, is_truth=is_truth)), path
    try:
        entries = [_entry(file, root) for header in found for file in _with_voxels(header)]
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}); want label files to score.") from error
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def _with_voxels(header: Path) -> Iterator[Path]:
    yield header
    if header.suffix.lower() in _DETACHED:
        start = f"{image_stem(header.name)}."
        beside = (f for f in header.parent.iterdir() if f.name.startswith(start) and image_stem(f.name) is None)
        yield from sorted(f for f in beside if f.is_file())


def _entry(file: Path, root: Path) -> tuple[str, int, str]:
    about = file.stat()
    return file.relative_to(root).as_posix(), about.st_size, _sha256(file, about.st_size, about.st_mtime_ns)


@cache
def _sha256(file: Path, _size: int, _mtime_ns: int) -> str:
    """A plan is cut more than once in a call; its files are read once."""
    return sha256_of_files(file)
