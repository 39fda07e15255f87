"""Each program runs, checks its results and reports every sample."""

import json
import time

import pytest

from ftengine.bench import kernels, store
from ftengine.bench.timing import as_table, interleave


def test_store_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    document = store.run(shape_zyx=(40, 48, 50), patch_zyx=(16, 16, 16), rounds=2, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert [len(r["samples_s"]) for r in document["rows"]] == [2, 2, 2]
    assert 0 < document["stored_bytes"] < document["raw_bytes"]


def test_kernel_bench_runs(capsys: pytest.CaptureFixture[str]) -> None:
    documents = kernels.run(batch=2, patch_zyx=(24, 24, 24), rounds=1)
    assert [d["title"].split(",")[0] for d in documents] == [
        "gaussian_blur",
        "tumor_mask",
        "masked_blend",
        "tumor_proportion",
    ]
    assert capsys.readouterr().out.count("| what |") == 4


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
