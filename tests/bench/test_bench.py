"""Each program runs, checks its results and reports every sample."""

import json
import time

import pytest
import torch

from ftengine.bench import kernels, store, synthesisers
from ftengine.bench.timing import as_table, interleave


def test_store_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    document = store.run(shape_zyx=(40, 48, 50), patch_zyx=(16, 16, 16), rounds=2, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert [len(r["samples_s"]) for r in document["rows"]] == [2, 2, 2]
    assert 0 < document["stored_bytes"] < document["raw_bytes"]


def test_kernel_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    document = kernels.run(patch_zyx=(32, 32, 32), batches=[2], rounds=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert torch.get_num_threads() == threads
    samples = document["one_patch_one_thread"]
    assert len(samples) == 1 + len(kernels.SIZE_CLASSES) * 10
    assert all(len(seconds) == 1 for seconds in samples.values())
    figures = kernels.summary(document)
    assert figures["hard_chain_ms"] / figures["unit_ms"] == pytest.approx(figures["hard_chain_of_unit"])
    assert figures["hard_medium_batch_2_two_threads"] > 0
    kernels.run(patch_zyx=(24, 24, 24), batches=[1], rounds=1)
    assert "mask, texture, edge blur, blend" in capsys.readouterr().out


def test_kernel_bench_times_nothing_where_results_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gaussian_blur_ref", lambda x, _sigma: x)
    with pytest.raises(AssertionError, match="the chain differs from its references"):
        kernels.run(patch_zyx=(24, 24, 24), batches=[1], rounds=1)


def test_candidates_are_interleaved() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("b")
        time.sleep(0.002)

    rows = interleave({"a": lambda: calls.append("a"), "b": slow}, rounds=3)
    assert calls == list("abababab")
    assert len(rows[0].samples_s) == 3
    assert rows[1].median_s > rows[0].median_s
    assert "times faster than a" in as_table("t", rows, "a")


def test_synthesiser_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    document = synthesisers.run(patch_zyx=(32, 32, 32), batch=1, rounds=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == set(synthesisers.ARMS)
    assert rows["constant"]["of_constant"] == 1
    assert all(row["ms_per_patch"] > 0 for row in rows.values())
