"""Rows of an opened store: the same whatever is compacted, withdrawn or mapped, and while another process compacts."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftengine.errors import StoreError
from ftengine.store import index, rows
from ftengine.store.chunk_lists import ChunkLists
from ftengine.store.location import locate
from ftengine.store.reader import open_store
from ftengine.store.rows import Rows
from ftengine.store.writer import create_store
from tests.support import make_store, small_config


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A row of a real volume."""
    store = make_store(tmp_path_factory.mktemp("rows"), small_config(), num_annotated=1, num_organs=0)
    return store.row("a/0")


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lists of any size go into a file; the folder of that file."""
    monkeypatch.setattr(rows, "_SMALL_BYTES", -1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ftengine-{os.getuid()}"


def _row(example: dict[str, Any], case: str, number: int) -> dict[str, Any]:
    """A row that can be told from others; every third volume has no label."""
    lists = [{"value": 1, "chunk": [number], "voxels": [5], "anchor": [number % 9]}] if number % 3 else []
    if number % 2:
        lists.append({"value": 2, "chunk": [0, 1, 2], "voxels": [1, number + 1, 3], "anchor": [7, 8, 9]})
    return example | {
        "case": case,
        "stored_bytes": number,
        "class_chunks": lists,
        "body_chunks": bytes([number % 256, 255]),
    }


def _check(opened: Rows, wanted: dict[str, dict[str, Any]]) -> None:
    names = sorted(wanted)
    assert opened.cases.to_pylist() == names
    assert len(opened) == len(names)
    assert opened.column("stored_bytes").to_pylist() == [wanted[name]["stored_bytes"] for name in names]
    assert opened.table.to_pylist() == [wanted[name] for name in names]
    assert opened.number("a") is None
    for number, name in enumerate(names):
        assert (opened.case(number), opened.number(name)) == (name, number)
        assert opened.row(number) == wanted[name]
        _check_lists(opened.chunk_lists, number, wanted[name])


def _check_lists(lists: ChunkLists, number: int, wanted: dict[str, Any]) -> None:
    assert lists.body(number).tobytes() == wanted["body_chunks"]
    found = lists.labelled(number)
    if found is None:
        assert not wanted["class_chunks"]
        return
    for place, entry in enumerate(wanted["class_chunks"]):
        part = slice(found.bounds[place], found.bounds[place + 1])
        for name in ("chunk", "voxels", "anchor"):
            assert getattr(found, name)[part].tolist() == entry[name]
    assert len(found.bounds) == len(wanted["class_chunks"]) + 1


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "withdraw", "compact"]), st.integers(0, 7)), max_size=14
)


@given(operations=OPERATIONS)
@settings(max_examples=25, deadline=None)
def test_rows_are_those_committed_last(example: dict[str, Any], operations: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        location = create_store(Path(folder) / "s.zarr", small_config().region)
        wanted: dict[str, dict[str, Any]] = {}
        for number, (operation, which) in enumerate(operations):
            case = f"d/case {which}"
            if operation == "compact":
                index.compact_index(location)
                continue
            index.withdraw_case(location, case)  # as write_volume does before it replaces one
            wanted.pop(case, None)
            if operation == "add":
                wanted[case] = _row(example, case, number)
                index.append_row(location, wanted[case])
        _check(Rows(location), wanted)
        index.compact_index(location)
        _check(Rows(location), wanted)


@pytest.mark.parametrize("compacted", [True, False])
def test_mapped_lists_equal_those_in_memory(
    example: dict[str, Any], tmp_path: Path, everything_is_large: Path, compacted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "ROW_GROUP", 3)  # several batches
    location = create_store(tmp_path / "s.zarr", small_config().region)
    wanted = {f"d/{n}": _row(example, f"d/{n}", n) for n in range(11)}
    for number, row in enumerate(wanted.values()):
        index.append_row(location, row)
        if number == 7:
            index.compact_index(location)
    if compacted:
        index.compact_index(location)
    _check(Rows(location), wanted)
    (file,) = everything_is_large.iterdir()
    made = file.stat().st_mtime_ns
    _check(Rows(location), wanted)
    assert file.stat().st_mtime_ns == made  # used again
    file.write_bytes(file.read_bytes()[:200])
    _check(Rows(location), wanted)  # cut short: made again
    index.append_row(location, _row(example, "d/0", 50))
    _check(Rows(location), wanted | {"d/0": _row(example, "d/0", 50)})  # other rows, another file
    assert len(list(everything_is_large.iterdir())) == 2


def test_a_folder_that_others_can_write_to_is_not_used(
    example: dict[str, Any], tmp_path: Path, everything_is_large: Path
) -> None:
    everything_is_large.mkdir()
    everything_is_large.chmod(0o777)
    location = create_store(tmp_path / "s.zarr", small_config().region)
    row = _row(example, "d/x", 5)
    index.append_row(location, row)
    index.compact_index(location)
    _check(Rows(location), {"d/x": row})
    assert not list(everything_is_large.iterdir())


def test_an_open_store_keeps_its_rows_when_the_index_is_replaced(example: dict[str, Any], tmp_path: Path) -> None:
    location = create_store(tmp_path / "s.zarr", small_config().region)
    first = {f"d/{n}": _row(example, f"d/{n}", n) for n in range(4)}
    for row in first.values():
        index.append_row(location, row)
    index.compact_index(location)
    opened = Rows(location)
    index.append_row(location, _row(example, "d/00", 9))
    index.compact_index(location)
    _check(opened, first)  # columns that nobody had asked for before


def test_columns_cut_off_behind_the_names_are_a_store_error(example: dict[str, Any], tmp_path: Path) -> None:
    location = create_store(tmp_path / "s.zarr", small_config().region)
    for number in range(50):
        index.append_row(location, _row(example, f"d/{number}", number))
    index.compact_index(location)
    file = tmp_path / "s.zarr" / index.COMPACTED
    content = bytearray(file.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 600] = bytes(600)
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"index\.parquet"):
        _ = Rows(location).table


_COMPACTING = """
import sys
from ftengine.store import index
from ftengine.store.location import locate
location = locate(sys.argv[1])
row = index.read_index(location).to_pylist()[0]
for number in range(int(sys.argv[2])):
    index.append_row(location, row | {"case": f"d/{number:04d}", "stored_bytes": number})
    print(number, flush=True)
    if number % 3 == 2:
        index.compact_index(location)
"""


def test_a_store_opens_while_another_process_compacts(example: dict[str, Any], tmp_path: Path) -> None:
    """Each opening sees every row committed before it, and never reports a damaged index."""
    location = create_store(tmp_path / "s.zarr", small_config().region)
    index.append_row(location, _row(example, "d/first", 1))
    command = [sys.executable, "-c", _COMPACTING, str(tmp_path / "s.zarr"), "60"]
    openings = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            committed = int(line)
            opened = open_store(tmp_path / "s.zarr")
            openings += 1
            names = set(opened.cases)
            assert {f"d/{n:04d}" for n in range(committed + 1)} <= names
            assert len(names) == len(opened.cases)
            assert (np.array(opened.column("stored_bytes").to_pylist()) >= 0).all()
    assert process.returncode == 0
    assert openings == 60


def test_files_that_keep_vanishing_end_in_one_sentence(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = create_store(tmp_path / "s.zarr", small_config().region)
    index.append_row(location, _row(example, "d/x", 1))
    (tmp_path / "s.zarr/index.d/gone.parquet").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(rows, "_PAUSE_S", 0.0)
    monkeypatch.setattr(
        type(location),
        "keys",
        lambda self, key, *, recursive=False: ["index.d/gone.parquet"] if key == "index.d" else [],
    )
    with pytest.raises(StoreError, match="vanish while they are read"):
        Rows(locate(tmp_path / "s.zarr"))


_MANY_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from ftengine.store.reader import open_store
names = ["shape_zyx", "class_voxels", "annotation", "split", "dataset", "tumor_values"]
with ThreadPoolExecutor(6) as pool:
    for _ in range(60):
        store, barrier = open_store(sys.argv[1]), Barrier(6)
        def ask(number):
            barrier.wait()
            for name in names[number:] + names[:number]:
                store.column(name)
            return store.rows.row(number % len(store)), store.rows.chunk_lists.labelled(0)
        list(pool.map(ask, range(6)))
"""


def test_many_threads_ask_at_once(tmp_path: Path) -> None:
    """Two reads of one Parquet file have waited for each other for ever: in a process that can be ended."""
    store = make_store(tmp_path, small_config())
    subprocess.run([sys.executable, "-c", _MANY_THREADS, str(store.path)], check=True, timeout=120)
