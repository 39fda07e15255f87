"""A candidate in a process of its own: delivers batches on demand, is stopped between its turns, and counts the CPU of its workers too."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ftengine.bench.peers import Batches
from ftengine.geometry import IntZYX

_CHECKED_BATCHES = 8  # a batch may hold background alone, eight of them do not


class Child:
    """The parent's end. The child and its workers sleep (SIGSTOP) except in ``run``."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = 900.0,
    ) -> None:
        """Start ``python arguments...``, which must call ``serve``, and wait until it has prepared and checked its first batches.

        Raises AssertionError with the end of its stderr where it dies, says nothing in time or delivers what is no batch.
        """
        self.name = name
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(  # noqa: S603 - this package's own modules
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )
        try:
            self.description = self._reply()
        except BaseException:
            self.close()
            raise
        self._pause()

    def run(self, *, seconds: float, batches: int, warm: int) -> dict[str, Any]:
        """Take ``warm`` batches that do not count, then at least ``batches`` and for ``seconds``: {"s", "cpu_s", "patches", ...}."""
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.write(json.dumps({"seconds": seconds, "batches": batches, "warm": warm}) + "\n")
        self._process.stdin.flush()
        reply = self._reply()
        self._pause()
        return reply

    def close(self) -> None:
        """End the child and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        ready, _, _ = select.select([self._process.stdout], [], [], self._timeout_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            os.killpg(self._process.pid, signal.SIGKILL)
            _, errors = self._process.communicate()
            raise AssertionError(f"{self.name}: ended or said nothing for {self._timeout_s:.0f} s:\n{errors[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def serve(batches: Batches, patch_zyx: IntZYX, describe: Callable[[], dict[str, Any]] = dict) -> None:
    """The child's end: check the first batches, then answer each line of stdin. Other output of the process goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _say(replies, {"checked": check(batches, patch_zyx), **describe()})
    for line in sys.stdin:
        asked = json.loads(line)
        for _ in range(asked["warm"]):
            next(batches)
        cpu_s, started, seconds = group_cpu_s(), time.perf_counter(), 0.0
        taken = patches = 0
        while taken < asked["batches"] or seconds < asked["seconds"]:
            patches += len(next(batches)[0])
            taken, seconds = taken + 1, time.perf_counter() - started
        _say(replies, {"s": seconds, "cpu_s": group_cpu_s() - cpu_s, "patches": patches, **describe()})


def _say(stream: TextIO, reply: dict[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


def check(batches: Batches, patch_zyx: IntZYX) -> dict[str, Any]:
    """Shapes and types of the first batches. Raises AssertionError where they are no patches of CT with labels."""
    labelled = False
    first: dict[str, Any] = {}
    for _ in range(_CHECKED_BATCHES):
        image, label = next(batches)
        values = np.asarray(image)
        if values.ndim != 5 or values.shape[1] != 1 or sorted(values.shape[2:]) != sorted(patch_zyx):
            raise AssertionError(f"a batch has the shape {values.shape}; want [B, 1, {patch_zyx}]")
        if values.dtype != np.float32 or not np.isfinite(values).all() or values.std() == 0:
            raise AssertionError(f"a batch is {values.dtype} with spread {values.std()}; want float32 that varies")
        if tuple(label.shape) != values.shape:
            raise AssertionError(f"image {values.shape} and label {tuple(label.shape)} differ in shape")
        labelled |= bool((np.asarray(label) > 0).any())
        first = first or {"image": f"{values.shape} {values.dtype}", "label": str(label.dtype)}
    if not labelled:
        raise AssertionError(f"{_CHECKED_BATCHES} batches hold no labelled voxel: nothing to time")
    return first


def group_cpu_s() -> float:
    """Seconds of CPU that this process and its living workers have used."""
    group, ticks = str(os.getpgrp()), os.sysconf("SC_CLK_TCK")
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[2] == group:
            total += int(fields[11]) + int(fields[12])
    return total / ticks
