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
from pathlib import Path
from typing import Any

from ftengine.bench.timing import environment
from ftengine.config import Config
from ftengine.store.location import locate
from ftengine.store.maintenance import compact_store
from ftengine.store.reader import open_store
from ftengine.store.verify import verify_store
from ftengine.volume.nifti import write_nifti
from ftengine.volume.phantom import make_phantom


def run(*, volumes: int, kills: int, workers: int, as_json: bool = False) -> dict[str, Any]:
    """Convert ``volumes`` phantoms with ``workers`` processes, killed ``kills`` times at random moments of work, each time resumed.

    When a run ends before its kill, the store is thrown away and the next one begins, so that every kill hits work. After each kill the
    store must open and every committed volume be sound; each finished store must equal the undisturbed one byte by byte after
    ``store compact``, without an orphan.
    """
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_phantoms(folder / "src", volumes)
        started = time.perf_counter()
        _convert(folder / "src", folder / "undisturbed.zarr", workers).communicate()
        whole_s = time.perf_counter() - started
        wanted = content_hash(folder / "undisturbed.zarr")
        hit = stores = committed_at_kill = 0
        while hit < kills:
            stores += 1
            store = folder / f"{stores}.zarr"
            done = False
            while hit < kills and not done:
                process = _convert(folder / "src", store, workers)
                try:
                    process.communicate(timeout=draw.uniform(0.1, whole_s))
                    done = True
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    hit += 1
                    if (store / "zarr.json").exists():
                        opened = open_store(store)
                        committed_at_kill += len(opened)
                        _check(all(f.verdict == "sound" for f in verify_store(opened)), "a committed volume is damaged")
            _convert(folder / "src", store, workers).communicate()
            orphans = compact_store(locate(store)).orphans
            _check(not orphans, f"orphans after the resumed run: {orphans}")
            _check(content_hash(store) == wanted, "the resumed store differs from the undisturbed one")
    document = {
        "title": f"{hit} SIGKILLs in conversions of {volumes} volumes with {workers} workers",
        "environment": environment(),
        "stores_finished": stores,
        "undisturbed_s": whole_s,
        "mean_committed_at_kill": committed_at_kill / hit,
        "identical": True,
    }
    print(json.dumps(document, indent=2) if as_json else _table(document))
    return document


def _check(holds: bool, failure: str) -> None:
    if not holds:
        raise AssertionError(failure)


def _table(document: dict[str, Any]) -> str:
    return (
        f"### {document['title']}\n\n{document['stores_finished']} stores, each killed and resumed to its end, equal the undisturbed one byte "
        f"by byte (one undisturbed run: {document['undisturbed_s']:.1f} s; committed at a kill, mean: {document['mean_committed_at_kill']:.1f})."
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


def main() -> None:
    """``python -m ftengine.bench.faults``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=40)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    run(volumes=options.volumes, kills=options.kills, workers=options.workers, as_json=options.json)


if __name__ == "__main__":
    main()
