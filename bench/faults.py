"""What a conversion survives: SIGKILL at random moments, resumed each time, must end as an undisturbed run does."""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftengine.bench.timing import environment
from ftengine.config import Config
from ftengine.store.location import SCRATCH, locate
from ftengine.store.maintenance import compact_store
from ftengine.store.reader import open_store
from ftengine.store.verify import verify_store
from ftengine.volume.nifti import write_nifti
from ftengine.volume.phantom import make_phantom


def run(*, volumes: int, kills: int, workers: int, as_json: bool = False) -> dict[str, Any]:
    """Convert ``volumes`` phantoms with ``workers`` processes, killed ``kills`` times at random moments of work, each time resumed.

    When a run ends before its kill, the next store begins, so that every kill hits work. After each kill the
    store must open and every committed volume be sound; each finished store must equal the undisturbed one byte by byte after
    ``store compact``, without an orphan.
    """
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_phantoms(folder / "src", volumes)
        undisturbed = folder / "undisturbed.zarr"
        process = _convert(folder / "src", undisturbed, workers)
        _wait_for_work(process, undisturbed, set())
        started = time.perf_counter()
        process.communicate()
        work_s = time.perf_counter() - started
        wanted = content_hash(undisturbed)
        hit = stores = 0
        committed: list[int] = []
        while hit < kills:
            stores += 1
            store = folder / f"{stores}.zarr"
            done = False
            while hit < kills and not done:
                left_behind = _scratch(store)
                process = _convert(folder / "src", store, workers)
                _wait_for_work(process, store, left_behind)
                try:
                    process.communicate(timeout=draw.uniform(0.0, work_s))
                    done = True
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    hit += 1
                    opened = open_store(store)
                    committed.append(len(opened))
                    _check(all(f.verdict == "sound" for f in verify_store(opened)), "a committed volume is damaged")
            _convert(folder / "src", store, workers).communicate()
            orphans = compact_store(locate(store)).orphans
            _check(not orphans, f"orphans after the resumed run: {orphans}")
            _check(content_hash(store) == wanted, "the resumed store differs from the undisturbed one")
    document = {
        "title": f"{hit} SIGKILLs in conversions of {volumes} volumes with {workers} workers",
        "environment": environment(),
        "stores_finished": stores,
        "work_s": work_s,
        "committed_at_kill": committed,
        "identical": True,
    }
    print(json.dumps(document, indent=2) if as_json else _table(document))
    return document


def _scratch(store: Path) -> set[str]:
    """Names of the volumes that are being built, or were when their worker died."""
    folder = store / SCRATCH
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def _wait_for_work(process: subprocess.Popen[bytes], store: Path, left_behind: set[str]) -> None:
    """Until a worker builds a volume, or the process has ended: the start of Python is no moment worth a kill."""
    while process.poll() is None:
        try:
            if _scratch(store) - left_behind:
                return
        except FileNotFoundError:  # being cleared
            continue
        time.sleep(0.002)


def _check(holds: bool, failure: str) -> None:
    if not holds:
        raise AssertionError(failure)


def _table(document: dict[str, Any]) -> str:
    return (
        f"### {document['title']}\n\n{document['stores_finished']} stores, each killed and resumed to its end, equal the undisturbed one byte "
        f"by byte. Work of an undisturbed run, start left out: {document['work_s']:.1f} s. Volumes committed at each kill: "
        f"{', '.join(map(str, document['committed_at_kill']))}."
    )


def content_hash(store: Path) -> str:
    """Of every file that a reader uses, by name and bytes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in store.rglob("*") if p.is_file() and p.name != ".writer.lock"):
        digest.update(file.relative_to(store).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _write_phantoms(folder: Path, count: int) -> None:
    region = Config.preset("demo").region
    folder.mkdir()
    for seed in range(count):
        phantom = make_phantom("abdomen", seed=seed, shape_zyx=(40, 56, 56), spacing_mm_zyx=region.spacing_mm_zyx)
        write_nifti(folder / f"{seed:03d}_ct.nii.gz", phantom.image_hu, phantom.grid)
        write_nifti(folder / f"{seed:03d}_label.nii.gz", phantom.label, phantom.grid)


def _convert(source: Path, store: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "ftengine.cli.main",
        "convert",
        str(source),
        str(store),
        "--region",
        "demo",
        "--quiet",
    ]
    command += ["--workers", str(workers), "--label-map", "3=0,4=0,5=0,6=0"]
    return subprocess.Popen(  # noqa: S603 - our own program
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench faults``."""
    parser = argparse.ArgumentParser(prog="ftengine bench faults", description=__doc__)
    parser.add_argument("--volumes", type=int, default=40)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run(volumes=options.volumes, kills=options.kills, workers=options.workers, as_json=options.json)


if __name__ == "__main__":
    main()
