"""What a reader study survives: answers sent to a server that is killed at random moments must all be kept, each once.

Also how long a case takes to come over loopback.
"""

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftengine.bench.timing import environment
from ftengine.config import Config
from ftengine.geometry import IntZYX
from ftengine.store.reader import Store, open_store
from ftengine.turing.build import ReaderName, StudyOptions, build_study
from ftengine.turing.cases import CaseDrawer, CaseOptions
from ftengine.turing.score import score_studies

_CASES = 10  # of the study; each is shown twice to each reader
_SHOWN = 2 * _CASES


def run(
    *,
    answers: int = 500,
    kills: int = 20,
    shape_zyx: IntZYX = (96, 128, 128),
    rounds: int = 20,
    as_json: bool = False,
) -> dict[str, Any]:
    """Answer a whole study while its server is killed ``kills`` times, then score it; time the loading of a case of ``shape_zyx`` voxels.

    answers: a multiple of 20, what a reader is asked. Kills are spread over the answers and fall at random moments, most of them while an answer is under way.
    """
    if answers % _SHOWN:
        raise SystemExit(f"--answers {answers}: want a multiple of {_SHOWN}, what a reader is asked")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = build_study_of_phantoms(folder, num_readers=answers // _SHOWN, shape_zyx=shape_zyx)
        load_s = _time_loading(study, rounds)
        given, survived = answer_under_kills(study, kills=kills, seed=0)
        _check_kept(study, given)
        scored = score_studies([study], [folder / "key.json"])
        _check(len(scored.answers) == answers, f"{len(scored.answers)} answers are scored")
    document = {
        "title": f"{answers} answers through {survived.kills} SIGKILLs of the server",
        "environment": environment(),
        "answers": answers,
        "kept_once": len(given),
        "repeated_requests": survived.repeated,
        "found_stored": survived.found_stored,
        "cut_lines": survived.cut_lines,
        "case_bytes": 2 * shape_zyx[0] * shape_zyx[1] * shape_zyx[2],
        "load_s": load_s,
    }
    print(json.dumps(document, indent=2) if as_json else _table(document))
    return document


class Survived(NamedTuple):
    """kills: of the server. repeated: requests that were sent again. found_stored: answers whose acknowledgement a kill had swallowed.
    cut_lines: journals that a kill left with a line cut short."""

    kills: int
    repeated: int
    found_stored: int
    cut_lines: int


class Server:
    """``ftengine turing serve`` in a process of its own."""

    def __init__(self, study: Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "ftengine.cli.main", "turing", "serve", str(study), "--port", str(port)]
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--json", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        lines = [self.process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith("}"):
            lines.append(self.process.stdout.readline())
        if not lines[-1]:
            raise AssertionError(f"the server did not start: {self.process.communicate()[1]}")
        document = json.loads("".join(lines))
        self.port = int(document["url"].rsplit(":", 1)[1].strip("/"))
        self.links: dict[str, str] = {r["reader"]: r["url"] for r in document["readers"]}

    def end(self, sign: int = signal.SIGINT) -> str:
        """Send a signal and wait; what the server wrote to stderr."""
        self.process.send_signal(sign)
        return self.process.communicate(timeout=30)[1]


class Client:
    """One reader, as the page talks to the server."""

    def __init__(self, port: int, link: str) -> None:
        self._port, self._token, self._cookie = port, link.partition("#")[2], ""

    def sign_in(self) -> None:
        """Exchange the link's token for a cookie."""
        response = self._request("POST", "/api/session", {"token": self._token})
        self._cookie = response.headers["set-cookie"].partition(";")[0]

    def get(self, path: str) -> "Answered":
        """A GET."""
        return self._request("GET", path)

    def post(self, path: str, document: Any) -> "Answered":
        """A POST of JSON."""
        return self._request("POST", path, document)

    def _request(self, method: str, path: str, document: Any = None) -> "Answered":
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
        try:
            headers = {"Cookie": self._cookie} if self._cookie else {}
            body = None
            if document is not None:
                headers["Content-Type"] = "application/json"
                body = json.dumps(document)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answered(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()


class Answered(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes


def build_study_of_phantoms(folder: Path, *, num_readers: int, shape_zyx: IntZYX) -> Path:
    """A study of ten liver tumours in phantoms, each shown twice; its key lies beside it as ``key.json``."""
    config = Config.preset("demo")
    store = _write_store(folder / "store.zarr", config)
    cut = CaseOptions(shape_zyx)
    readers = [ReaderName(f"Reader {n + 1}", "even" if n % 2 else "odd") for n in range(num_readers)]
    options = StudyOptions(per_type=_CASES, types={"liver": "liver"}, readers=readers, repeats=_CASES)
    built = build_study(
        CaseDrawer(config, store, store, cut, seed=0), config, cut, options, folder / "study", folder / "key.json"
    )
    return built.out


def answer_under_kills(study: Path, *, kills: int, seed: int) -> tuple[list[dict[str, Any]], Survived]:
    """Give every answer of every reader, each sent again until it is acknowledged, while the server is killed and started again."""
    draw = random.Random(seed)
    server = Server(study)
    port, links = server.port, server.links
    total = _SHOWN * len(links)
    moments = sorted(draw.sample(range(total), kills))
    given: list[dict[str, Any]] = []
    repeated = found_stored = cut_lines = 0
    for link in links.values():
        client = Client(port, link)
        client.sign_in()
        state = json.loads(client.get("/api/state").body)
        while state["current"] is not None:
            answer = _answer(draw, state)
            killer = None
            if len(given) in moments:
                killer = threading.Timer(draw.uniform(0.0, 0.015), os.kill, (server.process.pid, signal.SIGKILL))
                killer.start()
            while True:
                try:
                    response = client.post("/api/answer", answer)
                    break
                except (OSError, http.client.HTTPException):
                    repeated += 1
                    server.process.communicate()
                    server = Server(study, port)
            _check(response.status in {200, 201}, f"{response.status}: {response.body!r}")
            found_stored += response.status == 200
            given.append(answer)
            state = json.loads(response.body)["state"]
            if killer is not None:  # where it came behind the answer
                killer.join()
                if server.process.poll() is None:
                    server.process.kill()
                cut_lines += "was cut short" in (server.process.communicate()[1] or "")
                server = Server(study, port)
    cut_lines += "was cut short" in server.end()
    return given, Survived(kills, repeated, found_stored, cut_lines)


def _answer(draw: random.Random, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "reader": state["reader"]["id"],
        "item": state["current"]["item"],
        "answer_id": f"{draw.getrandbits(128):032x}",
        "synthetic": draw.random() < 0.5,
        "confidence": draw.randint(1, 5),
        "comment": "x" * draw.randint(0, 1500),
        "click_zyx": [draw.randrange(n) for n in state["shape_zyx"]] if draw.random() < 0.5 else None,
        "visit": f"{draw.getrandbits(128):032x}",
        "seconds": draw.uniform(1, 100),
    }


def _check_kept(study: Path, given: Sequence[dict[str, Any]]) -> None:
    """Each acknowledged answer lies in a journal once, as it was given, and nothing else does."""
    kept = [
        json.loads(line)
        for file in sorted((study / "answers").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    by_id = {line["answer_id"]: line for line in kept}
    _check(len(kept) == len(by_id) == len(given), f"{len(kept)} lines of {len(by_id)} answers for {len(given)} given")
    for answer in given:
        line = by_id[answer["answer_id"]]
        _check(all(line[name] == value for name, value in answer.items()), f"changed: {answer} is kept as {line}")


def _time_loading(study: Path, rounds: int) -> list[float]:
    """Seconds from asking for the state to the last byte of the case, each on a new connection."""
    server = Server(study)
    try:
        client = Client(server.port, next(iter(server.links.values())))
        client.sign_in()
        samples = []
        for _ in range(rounds):
            started = time.perf_counter()
            state = json.loads(client.get("/api/state").body)
            case = client.get(f"/api/case/{state['current']['item']}")
            samples.append(time.perf_counter() - started)
            z, y, x = state["shape_zyx"]
            _check(case.status == 200 and len(case.body) == 2 * z * y * x, f"{case.status}, {len(case.body)} bytes")
        return samples
    finally:
        server.end()


def _write_store(path: Path, config: Config) -> Store:
    """Phantoms with one liver tumour, and healthy ones."""
    from ftengine.store import index
    from ftengine.store.writer import Provenance, create_store, write_volume
    from ftengine.volume.phantom import TumorSpec, make_phantom

    region = config.region
    root = create_store(path, region)
    tumors = TumorSpec(num_tumors=(1, 1), diameter_mm=(14.0, 24.0), organs=("liver",))
    for case in range(_CASES):
        is_real = case % 2 == 0
        phantom = make_phantom(
            "abdomen",
            seed=1,
            case=case,
            shape_zyx=(48, 64, 64),
            spacing_mm_zyx=region.spacing_mm_zyx,
            tumors=tumors if is_real else None,
        )
        label = phantom.label * (phantom.label <= 2)  # the demo's region knows the liver alone
        provenance = Provenance("phantom", "", annotation="tumor" if is_real else "organ")
        write_volume(root, f"p/{case}", phantom.image_hu, label, phantom.grid, phantom.grid, region, provenance)
    index.compact_index(root)
    return open_store(root)


def _check(holds: bool, failure: str) -> None:
    if not holds:
        raise AssertionError(failure)


def _table(document: dict[str, Any]) -> str:
    load_ms = [1000 * s for s in document["load_s"]]
    return (
        f"### {document['title']}\n\nEvery answer that was acknowledged is kept once, as it was given. {document['repeated_requests']} requests were "
        f"sent again; {document['found_stored']} of them had been stored before their acknowledgement was lost; {document['cut_lines']} journals "
        f"ended in a line cut short.\n\nA case of {document['case_bytes'] / 1e6:.1f} MB with the state before it: median "
        f"{statistics.median(load_ms):.0f} ms, at most {max(load_ms):.0f} ms of {len(load_ms)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench turing``."""
    parser = argparse.ArgumentParser(prog="ftengine bench turing", description=__doc__)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--voxels", type=int, nargs=3, default=(96, 128, 128), metavar=("Z", "Y", "X"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    z, y, x = options.voxels
    run(answers=options.answers, kills=options.kills, shape_zyx=(z, y, x), as_json=options.json)


if __name__ == "__main__":
    main()
