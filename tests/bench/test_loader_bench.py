"""The bench of the loader runs whole at toy size in its real processes, and refuses to time what is no batch."""

import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ftengine.bench import loader, loader_parts, loader_report, slow_s3
from ftengine.bench.peers import PEERS, Setup
from ftengine.bench.peers.process import Child, check
from ftengine.errors import ConfigError
from ftengine.store.reader import open_store

SHAPE, PATCH = (40, 48, 56), (24, 24, 24)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    loader.make_sources(folder, 2, SHAPE)
    return folder


def _run(work: Path, **keywords: Any) -> dict[str, Any]:
    return loader.run(
        work=work, volumes=2, shape_zyx=SHAPE, patch_zyx=PATCH, rounds=1, seconds=0.05, as_json=True, **keywords
    )


def test_rates_are_those_of_all_candidates(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "monai-persistent", ("monai", (0,)))
    document = _run(work, peers=["monai-persistent"], modes=["crops", "painted"], chart=tmp_path / "c.png")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    rows = document["rates"]["rows"]
    assert list(rows) == [
        "ftengine, crops",
        "ftengine, painted",
        "monai-persistent, crops",
        "monai-persistent, augmented",
    ]
    for row in rows.values():
        assert len(row["samples"]) == 1
        assert row["samples"][0]["patches"] >= 4 * loader._LEAST_BATCHES
        assert row["patches_per_s"] == pytest.approx(row["samples"][0]["patches"] / row["samples"][0]["s"])
        assert row["checked"]["image"] == "(4, 1, 24, 24, 24) float32"
    assert rows["ftengine, painted"]["painted_share"] > 0.3
    assert rows["ftengine, crops"]["painted_share"] == 0
    factor = rows["ftengine, painted"]["patches_per_s"] / rows["monai-persistent, augmented"]["patches_per_s"]
    assert document["figures"] == {"painted, times MONAI PersistentDataset augmented": factor}
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "| ftengine, painted |" in loader_report.as_text(document)


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "monai-persistent"])
@pytest.mark.parametrize("mode", ["crops", "augmented"])
def test_every_peer_delivers_what_is_asked(peer: str, mode: Any, work: Path) -> None:
    package = {"nnunet": "nnunetv2", "torchio": "torchio"}.get(peer, "monai")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'peers')")
    setup = Setup(peer, mode, str(work / "nifti"), str(work / peer), PATCH, 4, 0)
    child = Child(peer, loader_parts.command("peer", json.loads(setup.to_json())), timeout_s=200)
    try:
        turn = child.run(seconds=0.0, batches=2, warm=0)
    finally:
        child.close()
    assert turn["patches"] == 8
    assert turn["s"] > 0
    assert child.description["checked"]["image"] == "(4, 1, 24, 24, 24) float32"


def test_plan_memory_and_first_batch_over_a_replicated_index(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _run(work, modes=(), soak_batches=6, plan_patches=100, num_rows=300, first=True)
    assert document["soak"]["batches"] == 6
    assert document["soak"]["early"] == 3
    assert document["soak"]["peak_gb"] * 1e3 >= document["soak"]["late_mb"] > 0
    assert document["plan"]["patches"] == 100
    assert document["plan"]["volumes_met"] > 20
    assert 0 < document["first_batch"]["s"] < document["first_batch"]["since_process_start_s"]
    assert set(document["figures"]) == {"memory growth", "peak_gb", "first_batch_s", "plan_s"}
    capsys.readouterr()


def test_a_replicated_index_leads_to_the_voxels_of_its_rows(work: Path, tmp_path: Path) -> None:
    source = open_store(work / "store.zarr")
    many = open_store(loader.replicated_index(tmp_path, work / "store.zarr", 7))
    assert len(many) == 7
    originals = [source.read_volume(case) for case in source.cases]
    for case in many.cases:
        volume = many.read_volume(case)
        assert any((volume.image == o.image).all() and (volume.label == o.label).all() for o in originals)


class _Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_wait_falls_with_the_length_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()

    class Source:
        def __init__(self, _loader: object) -> None:
            pass

        def batches(self) -> Iterator[None]:
            ready = clock.now
            while True:
                ready = max(ready, clock.now - 0.02) + 0.02  # one batch every 20 ms, one ahead
                clock.sleep(max(0.0, ready - clock.now))
                yield None

        def describe(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(loader_parts, "our_loader", lambda _options: None)
    monkeypatch.setattr(loader_parts, "Counted", Source)
    monkeypatch.setattr(loader_parts, "time", clock)
    result = loader_parts.waits({"step_ms": [1, 60], "batches": 10})
    shares = {float(ms): share for ms, share in result["shares"].items()}
    assert shares[1.0] == pytest.approx(0.95)
    assert shares[60.0] == 0
    assert list(shares) == [1, 15.75, 23.125, 30.5, 60]  # each half-way between too short and long enough
    assert result["shortest_ms"] == 23.125
    assert all(share >= 0.01 for ms, share in shares.items() if ms < result["shortest_ms"])


def test_what_is_no_batch_is_not_timed(work: Path) -> None:
    label = torch.ones(2, 1, 4, 4, 4)
    for image, says in (
        (torch.zeros(2, 1, 4, 4, 4), "that varies"),
        (torch.rand(2, 1, 4, 4, 5), "want"),
        (torch.rand(2, 1, 4, 4, 4, dtype=torch.float64), "want float32"),
    ):
        with pytest.raises(AssertionError, match=says):
            check(iter([(image, label)] * 8), (4, 4, 4))
    with pytest.raises(AssertionError, match="no labelled voxel"):
        check(iter([(torch.rand(2, 1, 4, 4, 4), label * 0)] * 8), (4, 4, 4))
    with pytest.raises(AssertionError, match=r"x: ended or said nothing[\s\S]*no case here"):
        Child("x", ["-c", "raise ValueError('no case here')"])


def test_the_proxy_delays_requests_and_passes_them_whole(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(bytes(range(256)) * 1000)
    with slow_s3.serving(tmp_path) as server, slow_s3.delayed(server, 0) as plain, slow_s3.delayed(server, 300) as slow:
        seconds = {}
        for port in (plain, slow):
            started = time.perf_counter()
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("GET", f"/{slow_s3.BUCKET}/a/b.bin", headers={"Authorization": "AWS bench:x"})
            assert connection.getresponse().read() == bytes(range(256)) * 1000
            connection.close()
            seconds[port] = time.perf_counter() - started
    assert seconds[slow] >= 0.3


def test_slow_storage_is_measured_over_s3(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _run(work, modes=(), delay_ms=5, in_flight=[8])
    part = document["slow_storage"]
    assert part["patches_per_s"].keys() == {"0 ms | 8", "5 ms | 8"}
    assert part["share_of_undelayed"]["8"] == part["patches_per_s"]["5 ms | 8"] / part["patches_per_s"]["0 ms | 8"]
    assert "S3, delay of each request" in loader_report.as_text(document)
    capsys.readouterr()


def test_read_cost_is_that_of_equal_voxels(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("nnunetv2") is None or find_spec("blosc2") is None:
        pytest.skip("nnunetv2 and blosc2 are not installed (extra 'peers')")
    document = _run(work, modes=(), reads=4)
    assert {name.split(" | ")[1] for name in document["reads"]["samples"]} == {"1", "2"}
    assert document["figures"]["read cost of blosc2"] > 0
    capsys.readouterr()


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="--no-rates with --peer"):
        loader.main(["--no-rates", "--peer", "all"])
