"""Where a store lies: a folder, or a prefix in an S3 or Google Cloud bucket. The one place that knows the difference.

=======  ==========================================================================================
input    a path, ``s3://bucket/prefix`` or ``gs://bucket/prefix``; keys below it with ``/`` between their parts
does     whole-object reads and writes, lists, deletes, publishes a finished local tree; names the array driver's source
output   bytes, keys, tensorstore specifications
raises   FileNotFoundError for a missing key, OSError where a local disk refuses, StoreError where a bucket refuses
=======  ==========================================================================================

A volume is always built in a local scratch folder first and published whole: on a disk by one rename, in a bucket object by object.
Either way the index row comes last, and a volume without a row does not exist. Endpoint and credentials of a bucket come from the
environment and files that every S3 and GCS client reads (``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_PROFILE``, ...).
"""

import fcntl
import json
import os
import shutil
import socket
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from ftengine.errors import ConfigError, FtengineError, StoreError
from ftengine.files import sync, write_whole

SCRATCH = ".incoming"  # below a local store: volumes being built, moved to their place by a rename
LOCK = ".writer.lock"
_REMOTE = ("s3", "gs")


def locate(place: "str | Path | Location") -> "Location":
    """The location that a path or URL names; a location is returned as it is. ConfigError for an unknown kind of URL."""
    if isinstance(place, Location):
        return place
    text = str(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalLocation(Path(text).expanduser())
    if scheme not in _REMOTE or not rest.strip("/"):
        raise ConfigError(f"{text}: want a folder, s3://bucket/prefix or gs://bucket/prefix as a store.")
    return RemoteLocation(scheme, rest.strip("/"))


class Location(ABC):
    """A store's files. ``str(location)`` is its name in messages and commands."""

    @abstractmethod
    def read_bytes(self, key: str) -> bytes:
        """The content of a key."""

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a key whole or not at all, durably; replaces what is there."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether a key holds a file or object."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete one file or object, durably; a missing one is none of our business."""

    @abstractmethod
    def delete_tree(self, key: str) -> None:
        """Delete everything below a key."""

    @abstractmethod
    def keys(self, key: str, *, recursive: bool = False) -> list[str]:
        """Keys of the files directly below ``key``, or at any depth; sorted. Empty where there is nothing."""

    @abstractmethod
    def size_bytes(self, key: str) -> int:
        """Size of a file or object."""

    @abstractmethod
    def publish(self, folder: Path, key: str) -> None:
        """Bring a finished local tree to ``key``, durably, replacing what is there; ``folder`` is gone or useless afterwards."""

    @abstractmethod
    def scratch(self) -> Path:
        """A new local folder to build in; ``publish`` or ``shutil.rmtree`` ends it."""

    @abstractmethod
    def clear_scratch(self) -> None:
        """Remove what killed conversions left of volumes being built; only under the writer lock."""

    @abstractmethod
    def prune(self, key: str) -> None:
        """Remove empty folders below a key; a bucket has none."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing lies here yet."""

    @abstractmethod
    def only_writer(self) -> AbstractContextManager[None]:
        """Context: hold the store's writer lock; StoreError where another process holds it. Readers need none."""

    @abstractmethod
    def kvstore(self, key: str) -> dict[str, Any]:
        """The tensorstore key-value store of the folder ``key``."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """The file of this machine behind a key; None for an object of a bucket."""

    @abstractmethod
    def child(self, key: str) -> str:
        """Name of a key in messages."""

    def relative(self, text: str) -> "Location":
        """The location that a stored reference means: a URL or absolute path as it is, else relative to this one."""
        if "://" in text or Path(text).is_absolute():
            return locate(text)
        return self._joined(text)

    @abstractmethod
    def seen_from(self, other: "Location") -> str:
        """The reference that ``other.relative`` turns into this location: relative between folders, so that both can move together."""

    @abstractmethod
    def is_inside(self, other: "Location") -> bool:
        """Whether this location is the other one or lies below it."""

    @abstractmethod
    def _joined(self, relative: str) -> "Location":
        """A location beside or below this one."""


class LocalLocation(Location):
    """A folder of this machine or of a shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @override
    def local_path(self, key: str) -> Path | None:
        return self.path / key

    @override
    def child(self, key: str) -> str:
        return str(self.path / key)

    @override
    def read_bytes(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    @override
    def write_bytes(self, key: str, data: bytes) -> None:
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda stream: stream.write(data))

    @override
    def exists(self, key: str) -> bool:
        return (self.path / key).is_file()

    @override
    def delete(self, key: str) -> None:
        path = self.path / key
        if path.exists():
            path.unlink(missing_ok=True)
            sync(path.parent)

    @override
    def delete_tree(self, key: str) -> None:
        path = self.path / key
        if not path.exists():
            return
        try:  # away from its name first: a reader meets all of it or nothing
            doomed = self.scratch()
            path.replace(doomed / "doomed")
        except OSError:  # a full disk has no room for another name
            doomed = path
        shutil.rmtree(doomed)
        sync(path.parent)

    @override
    def keys(self, key: str, *, recursive: bool = False) -> list[str]:
        top = self.path / key
        found = top.rglob("*") if recursive else top.glob("*")
        return sorted(p.relative_to(self.path).as_posix() for p in found if p.is_file())

    @override
    def size_bytes(self, key: str) -> int:
        return (self.path / key).stat().st_size

    @override
    def publish(self, folder: Path, key: str) -> None:
        _sync_tree(folder)
        target = self.path / key
        self.delete_tree(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(target)
        for parent in (p for p in target.parents if p.is_relative_to(self.path)):
            sync(parent)

    @override
    def scratch(self) -> Path:
        folder = self.path / SCRATCH / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    @override
    def clear_scratch(self) -> None:
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)

    @override
    def prune(self, key: str) -> None:
        for folder in sorted((self.path / key).rglob("*"), key=lambda p: -len(p.parts)):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @override
    def is_empty(self) -> bool:
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    @override
    @contextmanager
    def only_writer(self) -> Iterator[None]:
        with (self.path / LOCK).open("w", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"{self}: another process is converting into this store; wait for it, or convert into another store."
                ) from error
            yield  # the lock goes with the file, also when the process is killed

    @override
    def kvstore(self, key: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.path / key}/"}

    @override
    def seen_from(self, other: Location) -> str:
        if not isinstance(other, LocalLocation):
            return str(self.path.resolve())
        return Path(os.path.relpath(self.path.resolve(), other.path.resolve())).as_posix()

    @override
    def is_inside(self, other: Location) -> bool:
        return isinstance(other, LocalLocation) and self.path.resolve().is_relative_to(other.path.resolve())

    @override
    def _joined(self, relative: str) -> Location:
        return LocalLocation(Path(os.path.normpath(self.path / relative)))


class RemoteLocation(Location):
    """A prefix in an S3 or Google Cloud bucket; what the bucket refuses becomes a StoreError."""

    def __init__(self, scheme: str, place: str) -> None:
        self._scheme = scheme
        self._place = place  # bucket/prefix

    def __reduce__(self) -> tuple[object, ...]:
        return RemoteLocation, (self._scheme, self._place)  # connections do not travel

    def __str__(self) -> str:
        return f"{self._scheme}://{self._place}"

    @override
    def local_path(self, key: str) -> Path | None:
        return None

    @override
    def child(self, key: str) -> str:
        return f"{self}/{key}"

    @cached_property
    def _files(self) -> Any:
        try:
            import fsspec

            # listings are not cached: other processes write here
            return fsspec.filesystem(self._scheme, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise ConfigError(
                f"{self}: the client of this kind of store is missing ({error.name or error}). Install ftengine[remote]."
            ) from error

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Clients raise errors of many kinds; FileNotFoundError is the one that means something to callers."""
        try:
            yield
        except (FileNotFoundError, FtengineError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise StoreError(
                f"{self.child(key)}: the bucket refused ({type(error).__name__}: {text}). Check name, endpoint, credentials and network."
            ) from error

    def _path(self, key: str) -> str:
        return f"{self._place}/{key}".rstrip("/")

    @override
    def read_bytes(self, key: str) -> bytes:
        with self._explained(key):
            return bytes(self._files.cat_file(self._path(key)))

    @override
    def write_bytes(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._files.pipe_file(self._path(key), data)

    @override
    def exists(self, key: str) -> bool:
        with self._explained(key):
            return bool(self._files.isfile(self._path(key)))

    @override
    def delete(self, key: str) -> None:
        with self._explained(key):
            try:
                self._files.rm_file(self._path(key))
            except FileNotFoundError:
                return

    @override
    def delete_tree(self, key: str) -> None:
        keys = self.keys(key, recursive=True)
        with self._explained(key):
            if keys:
                self._files.rm([self._path(k) for k in keys])

    @override
    def keys(self, key: str, *, recursive: bool = False) -> list[str]:
        top = self._path(key)
        with self._explained(key):
            try:
                found = self._files.find(top, maxdepth=None if recursive else 1)
            except FileNotFoundError:
                return []
        return sorted(name.removeprefix(f"{self._place}/") for name in found if name != top)

    @override
    def size_bytes(self, key: str) -> int:
        with self._explained(key):
            return int(self._files.size(self._path(key)))

    @override
    def publish(self, folder: Path, key: str) -> None:
        self.delete_tree(key)
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = f"{key}/{file.relative_to(folder).as_posix()}"
            with self._explained(name):
                self._files.put_file(str(file), self._path(name))
        shutil.rmtree(folder)

    @override
    def scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="ftengine-"))

    @override
    def clear_scratch(self) -> None:
        return  # a bucket's scratch lies in temporary folders of its workers

    @override
    def prune(self, key: str) -> None:
        return

    @override
    def is_empty(self) -> bool:
        return not self.keys("", recursive=False) and not self.keys("volumes", recursive=False)

    @override
    @contextmanager
    def only_writer(self) -> Iterator[None]:
        token = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex})
        with self._explained(LOCK):
            try:
                self._files.pipe_file(self._path(LOCK), token.encode(), mode="create")
            except FileExistsError as error:
                holder = json.loads(self.read_bytes(LOCK))
                raise StoreError(
                    f"{self}: process {holder['process']} on {holder['host']} is converting into this store, or died while it did. "
                    f"Wait for it; if it is gone, delete {self.child(LOCK)} and start again."
                ) from error
        try:
            yield
        finally:
            self.delete(LOCK)

    @override
    def kvstore(self, key: str) -> dict[str, Any]:
        bucket, _, prefix = self._place.partition("/")
        spec: dict[str, Any] = {
            "driver": "s3" if self._scheme == "s3" else "gcs",
            "bucket": bucket,
            "path": f"{prefix}/{key}/".lstrip("/"),
        }
        if self._scheme == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            spec |= {"endpoint": endpoint} if endpoint else {}
            spec |= {"aws_region": region or "us-east-1"} if endpoint or region else {}
        return spec

    @override
    def seen_from(self, other: Location) -> str:
        return str(self)

    @override
    def is_inside(self, other: Location) -> bool:
        return f"{self}/".startswith(f"{other}/")

    @override
    def _joined(self, relative: str) -> Location:
        return RemoteLocation(self._scheme, os.path.normpath(f"{self._place}/{relative}"))


def _sync_tree(top: Path) -> None:
    """Make a whole tree durable: every file, then every folder from the leaves up."""
    for entry in sorted(top.rglob("*"), key=lambda p: -len(p.parts)):
        sync(entry)
    sync(top)
