"""A store's files, in a folder and in a bucket: one contract, the same tests."""

import os
import pickle
import socket
import sys
from pathlib import Path

import pytest

from ftengine.errors import ConfigError, StoreError
from ftengine.store.location import LocalLocation, Location, RemoteLocation, locate


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        (tmp_path / "s.zarr").mkdir()
        return locate(tmp_path / "s.zarr")
    return locate(request.getfixturevalue("s3_server") + f"/{os.urandom(4).hex()}/s.zarr")


def test_write_read_list_delete(location: Location) -> None:
    assert location.is_empty()
    location.write_bytes("a/b.txt", b"one")
    location.write_bytes("a/b.txt", b"two")
    location.write_bytes("a/c/d.txt", b"")
    assert location.read_bytes("a/b.txt") == b"two"
    assert location.keys("a") == ["a/b.txt"]
    assert location.keys("a", recursive=True) == ["a/b.txt", "a/c/d.txt"]
    assert location.keys("nowhere") == []
    assert location.exists("a/b.txt")
    assert not location.exists("a")
    assert location.size_bytes("a/b.txt") == 3
    location.delete("a/b.txt")
    location.delete("a/b.txt")  # twice is fine
    assert not location.exists("a/b.txt")
    location.delete_tree("a")
    assert location.keys("a", recursive=True) == []
    with pytest.raises(FileNotFoundError):
        location.read_bytes("a/b.txt")


def test_publish_replaces_a_tree_whole(location: Location) -> None:
    for content in ("old", "new"):
        folder = location.scratch()
        (folder / "sub").mkdir()
        (folder / "sub" / content).write_text(content)
        (folder / "zarr.json").write_text(content)
        location.publish(folder, "volumes/d/x")
        assert not folder.exists()
    assert location.keys("volumes", recursive=True) == ["volumes/d/x/sub/new", "volumes/d/x/zarr.json"]
    assert location.read_bytes("volumes/d/x/zarr.json") == b"new"


def test_one_writer_at_a_time(location: Location) -> None:
    with location.only_writer():
        with pytest.raises(StoreError, match="is converting into this store"), location.only_writer():
            pass
    with location.only_writer():
        pass


def test_a_location_travels_to_another_process(location: Location) -> None:
    location.write_bytes("x", b"1")
    copy = pickle.loads(pickle.dumps(location))  # noqa: S301 - our own bytes
    assert str(copy) == str(location)
    assert copy.read_bytes("x") == b"1"


def test_relative_places() -> None:
    assert str(locate("/data/full.zarr").relative("../sub.zarr")) == "/data/sub.zarr"
    assert str(locate("/data/full.zarr").relative("/else/s.zarr")) == "/else/s.zarr"
    assert str(locate("s3://b/p/full.zarr").relative("../sub.zarr")) == "s3://b/p/sub.zarr"
    assert str(locate("/data/full.zarr").relative("s3://b/p")) == "s3://b/p"


def test_kinds_of_places() -> None:
    assert isinstance(locate("x"), LocalLocation)
    assert isinstance(locate("s3://bucket/prefix/"), RemoteLocation)
    assert str(locate("gs://bucket/prefix/")) == "gs://bucket/prefix"
    assert locate("gs://bucket/prefix").kvstore("a") == {"driver": "gcs", "bucket": "bucket", "path": "prefix/a/"}


def test_a_bucket_that_refuses_is_a_store_error(s3_server: str) -> None:
    missing = locate("s3://no-such-bucket/s.zarr")
    with pytest.raises((StoreError, FileNotFoundError)):
        missing.write_bytes("x", b"1")


def test_a_bucket_that_does_not_answer_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        StoreError, match=r"s3://bucket/s\.zarr/zarr\.json: the bucket refused .*credentials and network"
    ):
        locate("s3://bucket/s.zarr").read_bytes("zarr.json")


def test_a_missing_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"Install ftengine\[remote\]"):
        locate("gs://bucket/s.zarr").read_bytes("zarr.json")
