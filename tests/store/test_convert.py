"""A conversion: what is done again and what is not, by how many, where; what a killed one leaves behind."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftengine.errors import CaseError, ConfigError, StoreError
from ftengine.store import convert, index, workers
from ftengine.store.case import CaseOutcome, ConvertOptions, Task, failed
from ftengine.store.convert import Resources, convert_cases, read_failed
from ftengine.store.location import locate
from ftengine.store.maintenance import compact_store
from ftengine.store.reader import open_store
from ftengine.store.subset import make_subset
from ftengine.store.verify import verify_store
from ftengine.store.workers import Workers, run_tasks
from ftengine.volume.discover import Source, discover
from ftengine.volume.nifti import write_nifti
from tests.support import organ_volume, ras_grid_at, small_config

REGION = small_config().region
SHAPE = (20, 22, 24)


def write_cases(folder: Path, count: int) -> list[Source]:
    """``count`` small CT with labels; every other one holds a tumour."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, label = organ_volume(SHAPE, tumor=number % 2 == 0, seed=number)
        write_nifti(folder / f"{number:03d}_ct.nii.gz", image, ras_grid_at(SHAPE))
        write_nifti(folder / f"{number:03d}_label.nii.gz", label, ras_grid_at(SHAPE))
    return discover([folder], dataset="d")


def content_hash(store: Path) -> str:
    """Of every file that a reader uses, by name and bytes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in store.rglob("*") if p.is_file() and p.name not in (".writer.lock", "failed.csv")):
        digest.update(file.relative_to(store).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return write_cases(tmp_path_factory.mktemp("src"), 6)


@pytest.fixture(scope="module")
def undisturbed(sources: list[Source], tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    assert convert_cases(sources, store, REGION).exit_code == 0
    return content_hash(store)


# the same result whoever converts


@pytest.mark.parametrize(
    "resources",
    [Resources(workers=2), Resources(workers=3, memory_bytes=400_000_000), Resources(dask="local:2")],
    ids=["two processes", "one at a time for lack of memory", "dask"],
)
def test_every_kind_of_worker_gives_the_same_store(
    resources: Resources, sources: list[Source], undisturbed: str, tmp_path: Path
) -> None:
    environment = dict(os.environ)
    report = convert_cases(sources, tmp_path / "s.zarr", REGION, resources=resources)
    assert dict(os.environ) == environment  # Dask's nanny sets numbers of threads for all that starts later
    assert (report.count("converted"), report.exit_code) == (6, 0)
    assert [o.case for o in report.outcomes] == sorted(o.case for o in report.outcomes)
    assert content_hash(tmp_path / "s.zarr") == undisturbed


def test_a_dask_cluster_that_is_not_there_is_named(sources: list[Source], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dask local:x: want local:N"):
        convert_cases(sources, tmp_path / "s.zarr", REGION, resources=Resources(dask="local:x"))


class _Recorder(Workers):
    """Slots that do nothing but note how much runs at the same time."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running: list[Task] = []
        self.most_bytes = 0
        self.need: Callable[[Task], int] = lambda _task: 0

    def submit(self, task: Task) -> None:
        self.running.append(task)
        self.most_bytes = max(self.most_bytes, sum(self.need(t) for t in self.running))

    def wait(self) -> tuple[Task, CaseOutcome]:
        task = self.running.pop(0)
        return task, CaseOutcome(task.source.case, "converted")

    def close(self) -> None:
        self.running.clear()


@pytest.mark.parametrize(("limit", "most"), [(None, 24), (10, 10), (9, 9), (3, 7)])
def test_memory_decides_how_many_run(limit: int | None, most: int) -> None:
    """Needs 7 2 1 4 4 6 in four slots; a case larger than the limit runs alone."""
    needs = dict(zip("abcdef", (7, 2, 1, 4, 4, 6), strict=True))
    tasks = [Task(Source(name, "d", Path(name)), "s", REGION, ConvertOptions()) for name in needs]
    recorder = _Recorder(4)
    recorder.need = lambda task: needs[task.source.case]
    done = run_tasks(tasks, recorder, memory_bytes=limit, need_bytes=recorder.need, on_start=lambda _task: None)
    assert sorted(task.source.case for task, _ in done) == sorted(needs)
    assert recorder.most_bytes <= most


def test_the_estimate_follows_the_header(sources: list[Source]) -> None:
    small = convert.case_bytes(sources[0], REGION)
    finer = REGION.model_copy(update={"spacing_mm_zyx": (1.0, 1.0, 1.0)})
    voxels = int(np.prod(SHAPE))
    assert small == 300_000_000 + 16 * voxels
    assert convert.case_bytes(sources[0], finer) == 300_000_000 + 8 * voxels + 8 * 27 * voxels


# what is up to date


@pytest.mark.parametrize("unchanged", ["stat", "hash"])
def test_nothing_is_done_twice(unchanged: Any, tmp_path: Path) -> None:
    sources = write_cases(tmp_path / "src", 2)
    convert_cases(sources, tmp_path / "s.zarr", REGION)
    before = content_hash(tmp_path / "s.zarr")
    report = convert_cases(sources, tmp_path / "s.zarr", REGION, unchanged=unchanged)
    assert report.count("skipped") == 2
    assert content_hash(tmp_path / "s.zarr") == before


def test_stat_redoes_a_touched_file_and_hash_does_not(tmp_path: Path) -> None:
    sources = write_cases(tmp_path / "src", 2)
    convert_cases(sources, tmp_path / "s.zarr", REGION)
    os.utime(sources[0].image, ns=(1, 1))
    assert convert_cases(sources, tmp_path / "s.zarr", REGION, unchanged="hash").count("skipped") == 2
    # by stat the worker looks closer, and finds the content unchanged
    report = convert_cases(sources, tmp_path / "s.zarr", REGION)
    assert [o.reason.rsplit(", ")[-1] for o in report.outcomes] == ["by their content", "size and time of its files"]


def test_a_changed_file_is_done_again(tmp_path: Path) -> None:
    sources = write_cases(tmp_path / "src", 2)
    convert_cases(sources, tmp_path / "s.zarr", REGION, resources=Resources(workers=2))
    image, _ = organ_volume(SHAPE, tumor=False, seed=77)
    write_nifti(sources[0].image, image, ras_grid_at(SHAPE))
    report = convert_cases(sources, tmp_path / "s.zarr", REGION, resources=Resources(workers=2))
    assert [o.status for o in report.outcomes] == ["converted", "skipped"]
    assert any("replaces the volume" in note for note in report.outcomes[0].notes)
    np.testing.assert_array_equal(open_store(tmp_path / "s.zarr").read_volume("d/000").image, image)


# failures


def test_failed_csv_lists_what_cannot_be_used_until_it_can(tmp_path: Path) -> None:
    sources = write_cases(tmp_path / "src", 2)
    whole = sources[0].image.read_bytes()
    sources[0].image.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "src" / "=cmd_ct.nii.gz").write_bytes(b"no image")
    sources = discover([tmp_path / "src"], dataset="d")
    report = convert_cases(sources, tmp_path / "s.zarr", REGION, resources=Resources(workers=2))
    assert (report.count("failed"), report.count("converted"), report.exit_code) == (2, 1, 1)
    location = locate(tmp_path / "s.zarr")
    rows = {row["case"]: row for row in read_failed(location)}
    assert set(rows) == {"d/000", "d/=cmd"}
    assert str(sources[0].image) == rows["d/000"]["file"]
    assert all(row["reason"] and row["code"] for row in rows.values())
    with (tmp_path / "s.zarr" / "failed.csv").open(newline="") as stream:
        assert next(csv.reader(stream)) == ["case", "file", "code", "reason", "advice"]
    # repaired, and without the other file among the sources: one row stays, since nobody tried it again
    sources[0].image.write_bytes(whole)
    convert_cases([s for s in sources if s.case != "d/=cmd"], tmp_path / "s.zarr", REGION)
    assert [row["case"] for row in read_failed(location)] == ["d/=cmd"]


def test_cells_of_failed_csv_are_never_formulas(tmp_path: Path) -> None:
    folder = tmp_path / "=src"
    folder.mkdir()
    (folder / "x_ct.nii.gz").write_bytes(b"no image")
    source = Source("d/x", "d", Path("=src/x_ct.nii.gz"))
    report = convert.ConversionReport("s", "demo", [failed(source, CaseError("=1+1", "@x"))])
    location = locate(tmp_path / "s.zarr")
    convert._write_failed(location, report)
    (row,) = read_failed(location)
    assert (row["file"], row["reason"], row["advice"]) == ("'=src/x_ct.nii.gz", "'=1+1", "'@x")


def test_a_dead_worker_costs_one_case_and_is_named(sources: list[Source], tmp_path: Path) -> None:
    report = subprocess.run(
        _program(sources, tmp_path / "s.zarr", "die_on='d/002'", workers=2),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    outcomes = {o["case"]: o for o in json.loads(report.stdout)["cases"]}
    assert outcomes["d/002"]["code"] == "worker-died"
    assert "signal 9, probably out of memory" in outcomes["d/002"]["reason"]
    assert sorted(c for c, o in outcomes.items() if o["status"] == "converted") == [
        s.case for s in sources if s.case != "d/002"
    ]


def test_a_killed_dask_worker_costs_nothing(sources: list[Source], undisturbed: str, tmp_path: Path) -> None:
    """The cluster runs the case again on another worker."""
    report = subprocess.run(
        _program(sources, tmp_path / "s.zarr", f"die_on='d/002'; once={str(tmp_path / 'once')!r}", dask="local:2"),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert (tmp_path / "once").exists()  # it did die
    assert json.loads(report.stdout)["converted"] == 6
    assert content_hash(tmp_path / "s.zarr") == undisturbed


def test_a_full_disk_stops_the_run_and_keeps_what_is_committed(sources: list[Source], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        for resources in (Resources(), Resources(workers=2)):
            with pytest.raises(
                StoreError, match=r"cannot be written \(No space left on device\); what is committed stays"
            ):
                convert_cases(sources, disk / "s.zarr", REGION, resources=resources)
            store = open_store(disk / "s.zarr")
            assert 0 < len(store) < 6
            assert all(f.verdict == "sound" for f in verify_store(store))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_target_is_a_store_error(sources: list[Source], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=False).returncode:
        pytest.skip("no right to mount a read-only disk here")
    try:
        with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\)"):
            convert_cases(sources, disk / "s.zarr", REGION)
    finally:
        subprocess.run(["umount", disk], check=True)


# kill -9 at every stage, then the same command again


def _program(sources: list[Source], store: Path, harm: str, *, workers: int = 1, dask: str | None = None) -> list[str]:
    """A script that converts and dies where ``harm`` says: ``die_at`` = (function, before or after, which call), or ``die_on`` a case."""
    folder = sources[0].image.parent
    script = store.parent / f"convert_{os.urandom(4).hex()}.py"
    text = f"""
        import json, os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.store import harm
        from ftengine.store.convert import Resources, convert_cases
        from ftengine.volume.discover import discover
        from tests.support import small_config
        die_at = die_on = once = None
        {harm}
        harm.arm(die_at, die_on, once)  # workers import this script, too
        if __name__ == "__main__":
            sources = discover([Path({str(folder)!r})], dataset="d")
            report = convert_cases(sources, {str(store)!r}, small_config().region,
                                   resources=Resources(workers={workers}, dask={dask!r}))
            print(json.dumps(report.to_json()))
    """
    script.write_text(textwrap.dedent(text))
    return [sys.executable, str(script)]


STAGES = [
    ("scratch", "after"),
    ("publish", "before"),
    ("publish", "after"),
    ("append_row", "before"),
    ("append_row", "after"),
    ("compact_index", "before"),
    ("compact_index", "after"),
    ("_sync_tree", "after"),
    ("delete", "before"),
    ("write_failed", "before"),
]


@pytest.mark.parametrize(("function", "when"), STAGES)
def test_killed_at_any_stage_the_same_command_ends_alike(
    function: str, when: str, sources: list[Source], undisturbed: str, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    program = _program(sources, store, f"die_at = ({function!r}, {when!r}, 2)")
    killed = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = open_store(store)  # valid at any moment
    assert all(f.verdict == "sound" for f in verify_store(half))
    assert convert_cases(sources, store, REGION).exit_code == 0
    compact_store(locate(store))
    assert content_hash(store) == undisturbed
    assert not (store / ".incoming").exists()


def test_interrupted_it_stops_soon_and_goes_on(sources: list[Source], undisturbed: str, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    command = [sys.executable, "-m", "ftengine.cli.main", "convert", str(sources[0].image.parent), str(store)]
    command += ["--region", "demo", "--dataset", "d", "--workers", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((store / "index.d").glob("*.parquet")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert len(open_store(store)) >= 1
    convert_cases(sources, store, REGION)
    compact_store(locate(store))
    assert content_hash(store) == undisturbed


# in a bucket


def test_a_bucket_takes_the_same_store(sources: list[Source], s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{os.urandom(4).hex()}/s.zarr"
    report = convert_cases(sources, url, REGION, resources=Resources(workers=2))
    assert report.exit_code == 0
    convert_cases(sources, tmp_path / "s.zarr", REGION)
    far, near = open_store(url), open_store(tmp_path / "s.zarr")
    assert far.cases == near.cases
    assert far.index.equals(near.index)
    for case in near.cases:
        a, b = far.read(case, (3, -2, 5), (16, 16, 16)), near.read(case, (3, -2, 5), (16, 16, 16))
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)
    assert convert_cases(sources, url, REGION).count("skipped") == 6
    assert all(f.verdict == "sound" for f in verify_store(far))
    location = locate(url)
    location.delete("volumes/d/000/0/c/0/0/0")
    with pytest.raises(StoreError, match=r"d/000: a chunk is missing or damaged"):
        open_store(url).read_volume("d/000")


def test_a_subset_shares_the_voxels_of_a_bucket(sources: list[Source], s3_server: str, tmp_path: Path) -> None:
    """Beside its parent in the bucket, and in a folder of this machine."""
    place = f"{s3_server}/{os.urandom(4).hex()}"
    convert_cases(sources[:3], f"{place}/s.zarr", REGION)
    whole = open_store(f"{place}/s.zarr")
    for out in (f"{place}/sub.zarr", tmp_path / "sub.zarr"):
        make_subset(whole, out, cases=["d/001"])
        part = open_store(out)
        assert part.cases == ["d/001"]
        assert str(part.volumes) == f"{place}/s.zarr"
        np.testing.assert_array_equal(part.read_volume("d/001").image, whole.read_volume("d/001").image)
        assert [f.verdict for f in verify_store(part)] == ["sound"]
    with pytest.raises(ConfigError, match="lies inside the store"):
        make_subset(whole, f"{place}/s.zarr/sub.zarr")


def test_a_bucket_feeds_training(sources: list[Source], s3_server: str, tmp_path: Path) -> None:
    from ftengine.assemble import train_segmentation

    url = f"{s3_server}/{os.urandom(4).hex()}/s.zarr"
    convert_cases(sources, url, REGION)
    convert_cases(sources, tmp_path / "s.zarr", REGION)
    config = small_config(training__steps=2)
    far = train_segmentation(config, url, tmp_path / "far")
    near = train_segmentation(config, tmp_path / "s.zarr", tmp_path / "near")
    assert far.losses == near.losses


# verify and compact


def test_verify_names_volume_and_chunk(sources: list[Source], tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    convert_cases(sources[:2], store, REGION)
    assert [f.verdict for f in verify_store(open_store(store))] == ["sound", "sound"]
    shard = store / "volumes/d/000/0/c/0/0/0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    bad, good = verify_store(open_store(store))
    assert (bad.case, bad.verdict, good.verdict) == ("d/000", "damaged", "sound")
    assert "volumes/d/000" in bad.problem
    assert "(0, 0, 0)" in bad.problem


def test_verify_holds_rows_against_arrays(sources: list[Source], tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    convert_cases(sources[:2], store, REGION)
    table = index.read_index(locate(store))
    rows = table.to_pylist()
    rows[0]["class_voxels"][1] += 1
    index.append_row(locate(store), rows[0])
    bad, good = verify_store(open_store(store))
    assert (bad.verdict, good.verdict) == ("damaged", "sound")
    assert "class_voxels" in bad.problem


def test_deep_verify_compares_with_the_sources(tmp_path: Path) -> None:
    sources = write_cases(tmp_path / "src", 3)
    store = tmp_path / "s.zarr"
    options = ConvertOptions(label_map=((2, 1),))
    convert_cases(sources, store, REGION, options=options)
    opened = open_store(store)
    assert {f.verdict for f in verify_store(opened, sources=sources)} == {"sound"}
    image, _ = organ_volume(SHAPE, tumor=False, seed=99)
    write_nifti(sources[0].image, image, ras_grid_at(SHAPE))
    findings = verify_store(opened, sources=sources[:2])
    assert [f.verdict for f in findings] == ["differs", "sound", "no source"]
    assert "voxels of the image differ" in findings[0].problem


def test_compact_removes_volumes_without_a_row_and_nothing_else(sources: list[Source], tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    nested = [replace(s, case=f"d/0/labels/{i}") for i, s in enumerate(sources[:3])]  # names that look like arrays
    convert_cases([*nested, *sources[3:]], store, REGION)
    before = content_hash(store)
    rows = index.read_index(locate(store))
    assert compact_store(locate(store)).orphans == ()
    assert content_hash(store) == before
    # a volume whose row was lost, one half written, a scratch folder
    index.withdraw_case(locate(store), "d/0/labels/1")
    (store / "volumes" / "e" / "half" / "0").mkdir(parents=True)
    (store / "volumes" / "e" / "half" / "0" / "zarr.json").write_text("{")
    (store / ".incoming" / "x").mkdir(parents=True)
    planned = compact_store(locate(store), dry_run=True)
    assert planned.orphans == ("d/0/labels/1", "e")
    assert (store / ".incoming" / "x").exists()
    done = compact_store(locate(store))
    assert (done.num_rows, done.orphans) == (rows.num_rows - 1, planned.orphans)
    assert not (store / "volumes" / "e").exists()
    assert not (store / "volumes" / "d" / "0" / "labels" / "1").exists()
    assert all(f.verdict == "sound" for f in verify_store(open_store(store)))


def test_workers_die_with_their_parent(sources: list[Source], tmp_path: Path) -> None:
    """Killed, a conversion leaves no process that still writes."""
    program = _program(sources, tmp_path / "s.zarr", "", workers=2)
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: list[int] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(children) < 2:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [int(pid) for pid in listed if "spawn_main" in _command_line(int(pid))]
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60  # a worker that is still importing this script ends when it has; it has no task
    while time.monotonic() < deadline and any(_command_line(pid) for pid in children):
        time.sleep(0.05)
    assert len(children) == 2
    assert not any(_command_line(pid) for pid in children)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_one_thread_is_what_workers_use() -> None:
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        workers.one_thread()
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
