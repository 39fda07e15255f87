"""The bench of training runs whole at toy size; a variant that fails or takes too long is a line of its table."""

import json
import subprocess
from typing import Any

import pytest
import torch

from ftengine.bench import train
from ftengine.config import Config

TINY = ["region.patch_zyx=[16,16,16]", "network.name=unet", "network.channels=[4,8]", "generator.width=1"]


def test_the_loops_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    document = train.run(device="cpu", rounds=2, steps=2, assignments=TINY, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    loop = document["loop"]
    assert [len(times) for times in loop["step_s"].values()] == [2, 2]
    by_hand = [a / b for a, b in zip(loop["step_s"][train.OURS], loop["step_s"][train.BARE], strict=True)]
    assert loop["ratios_by_round"] == by_hand
    assert f"| {loop['ours_of_bare']:.3f} |" in train.as_text(document)


def test_each_stage_is_measured_and_failures_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train.measure_stage
    monkeypatch.setattr(train, "_RELEASED_WIDTH", 3)

    def measure(stage: str, config: Any, device: torch.device, *, steps: int) -> dict[str, Any]:
        if config.generator.width == 3:
            raise torch.OutOfMemoryError("CUDA out of memory, 7 GiB wanted")
        return whole(stage, config, device, steps=steps)

    def too_slow(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(train, "measure_stage", measure)
    monkeypatch.setattr(subprocess, "run", too_slow)
    monkeypatch.setattr(train, "environment", dict)
    document = train.run(
        device="cpu", rounds=0, with_real_size=True, real_steps=2, assignments=[*TINY, "training.batch_size=2"]
    )
    rows = document["real_size"]
    assert list(rows) == [
        "seg, fp32",
        "seg, bf16",
        "synth, G 1, bf16",
        "synth, G 3, bf16",
        "seg, bf16, compiled",
        "synth, G 1, bf16, compiled",
        "synth, G 3, bf16, compiled",
    ]
    for name in ("seg, fp32", "seg, bf16", "synth, G 1, bf16"):
        assert len(rows[name]["step_s"]) == 2
        assert rows[name]["peak_bytes"] > 0
    assert rows["seg, fp32"]["batch_size"] == 2
    assert rows["synth, G 3, bf16"] == {"error": "OutOfMemoryError: CUDA out of memory, 7 GiB wanted"}
    assert "not done within" in rows["seg, bf16, compiled"]["error"]
    assert "OutOfMemoryError" in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_up() -> None:
    config = Config.preset("abdomen").with_assignments(TINY)
    rows = train.real_size(config, torch.device("cpu"), steps=1, seconds=0.0, compiled=True)
    assert all("left out" in row["error"] for row in rows.values())


def test_a_child_measures_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.preset("abdomen").with_assignments(TINY)
    job = {"config": config.model_dump(mode="json"), "stage": "seg", "device": "cpu", "steps": 1}
    train.main(["--child", json.dumps(job)])
    assert len(json.loads(capsys.readouterr().out)["step_s"]) == 1


def test_all_patches_of_the_real_size_batch_are_painted() -> None:
    config = Config.preset("abdomen").with_assignments(TINY)
    procedure, _ = train.build_stage("synth", config, torch.device("cpu"))
    procedure.add(train.healthy_batch(config, 3, torch.device("cpu")))
    assert procedure._num_drawn == 3  # type: ignore[attr-defined]
