"""The scheduler with small real processes: order, failures, a parent that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typing_extensions import override

from ftengine.errors import ConfigError
from ftengine.experiments.folder import only_one
from ftengine.experiments.schedule import Crew, Job, Watcher, run_jobs

# a worker that writes a file a job; "slow" waits for a signal as a training does, and leaves a file when it has "saved"
WORKER = """
import signal, sys, time
from pathlib import Path
from ftengine.errors import ConfigError
from ftengine.experiments.serve import InterruptedRunError, serve
folder = Path(sys.argv[1])
def do(payload, advance):
    key = payload["key"]
    if key == "bad": raise ConfigError("it is bad")
    if key == "bug": raise ZeroDivisionError("oops")
    if key == "dies": sys.exit(7)
    if key == "slow":
        stop = []
        for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda *_: stop.append(1))
        (folder / "slow.begun").touch()
        while not stop: time.sleep(0.02)
        (folder / "slow.saved").touch()
        raise InterruptedRunError("saved")
    advance(0.5, "half")
    (folder / key).touch()
serve(do)
"""


def _job(key: str, *needs: str) -> Job:
    return Job(key, "kind", key, needs, {"key": key})


def _crew(folder: Path, workers: int = 1, keep_fds: tuple[int, ...] = ()) -> Crew:
    file = folder / "worker.py"
    file.write_text(WORKER)
    return Crew([sys.executable, str(file), str(folder)], folder / "logs", workers, keep_fds=keep_fds)


def _wait_for(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} does not come")


class _Told(Watcher):
    def __init__(self) -> None:
        self.said: list[str] = []

    @override
    def started(self, job: Job) -> None:
        self.said.append(f"{job.key} started")

    @override
    def advanced(self, job: Job, fraction: float, text: str) -> None:
        self.said.append(f"{job.key} {fraction} {text}")

    @override
    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self.said.append(f"{job.key} ended {error or 'well'}")

    @override
    def stopped(self, job: Job) -> None:
        self.said.append(f"{job.key} stopped")


class _SlowlyTold(_Told):
    @override
    def stopped(self, job: Job) -> None:
        time.sleep(0.5)
        super().stopped(job)


def test_jobs_follow_what_they_need_and_failures_keep_back_nothing_else(tmp_path: Path) -> None:
    told = _Told()
    jobs = [_job("b", "a"), _job("a"), _job("bad"), _job("after", "bad"), _job("bug"), _job("dies"), _job("last")]
    outcome = run_jobs(jobs, _crew(tmp_path), is_done=lambda key: (tmp_path / key).exists(), watcher=told)
    assert outcome.done == ["a", "b", "last"]
    assert outcome.failed["bad"] == "it is bad"
    assert outcome.failed["bug"] == "ZeroDivisionError: oops"
    assert "ended with code 7" in outcome.failed["dies"]
    assert outcome.num_left == 4
    assert told.said[:3] == ["a started", "a 0.5 half", "a ended well"]
    assert "ZeroDivisionError" in (tmp_path / "logs" / "worker-0.log").read_text()
    again = run_jobs(jobs[:2], _crew(tmp_path), is_done=lambda key: (tmp_path / key).exists())
    assert (again.done, again.num_left) == ([], 0)


def test_an_interrupt_of_the_whole_group_is_no_failure(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from tests.experiments.test_schedule import _SlowlyTold, _crew, _job\n"
        "from ftengine.experiments.schedule import run_jobs\n"
        "folder, told = Path(sys.argv[1]), _SlowlyTold()\n"
        "try:\n"
        "    run_jobs([_job('slow'), _job('b')], _crew(folder), is_done=lambda key: False, watcher=told)\n"
        "except KeyboardInterrupt:\n"
        "    (folder / 'told.json').write_text(json.dumps(told.said))\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, start_new_session=True)
    _wait_for(tmp_path / "slow.begun")
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    assert process.wait(timeout=30.0) == 0
    said = json.loads((tmp_path / "told.json").read_text())
    assert said[:2] == ["slow started", "slow stopped"]
    assert not any("ended" in text for text in said)
    assert (tmp_path / "slow.saved").exists()


GROUP = """
import os, sys
from pathlib import Path
from ftengine.experiments.folder import only_one
from ftengine.experiments.work import run_group
folder = Path(sys.argv[1])
inner = (
    "import os, signal, sys, time; from pathlib import Path; folder = Path(sys.argv[1]); "
    "signal.signal(signal.SIGTERM, lambda *_: ((folder / 'told').touch(), sys.exit(3))); "
    "(folder / 'pid').write_text(str(os.getpid())); (folder / 'begun').touch(); time.sleep(60)"
)
with only_one(folder) as lock:
    (folder / "result").write_text(str(run_group([sys.executable, "-c", inner, str(folder)], (lock,))))
"""


def _grouped(folder: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", GROUP, str(folder)])
    _wait_for(folder / "begun")
    return process


def test_what_a_worker_starts_is_told_to_stop_with_it(tmp_path: Path) -> None:
    process = _grouped(tmp_path)
    process.terminate()
    assert process.wait(timeout=30.0) == 0
    assert (tmp_path / "told").exists()
    assert (tmp_path / "result").read_text() == "(3, True)"


def test_the_lock_is_held_while_what_a_killed_worker_started_lives(tmp_path: Path) -> None:
    process = _grouped(tmp_path)
    process.kill()
    process.wait()
    with pytest.raises(ConfigError, match="another process runs this experiment"), only_one(tmp_path, wait_s=0.0):
        pass
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    with only_one(tmp_path, wait_s=30.0):
        assert (tmp_path / "told").exists()


def test_workers_of_a_killed_parent_save_and_the_lock_is_held_until_then(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.experiments.test_schedule import _crew, _job\n"
        "from ftengine.experiments.folder import only_one\n"
        "from ftengine.experiments.schedule import run_jobs\n"
        "folder = Path(sys.argv[1])\n"
        "with only_one(folder) as lock:\n"
        "    run_jobs([_job('slow')], _crew(folder, keep_fds=(lock,)), is_done=lambda key: False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    _wait_for(tmp_path / "slow.begun")
    with pytest.raises(ConfigError, match="another process runs this experiment"), only_one(tmp_path, wait_s=0.0):
        pass
    os.kill(process.pid, signal.SIGKILL)  # it alone: its worker is told by the end of its input
    process.wait()
    with only_one(tmp_path, wait_s=30.0):
        assert (tmp_path / "slow.saved").exists()
