"""``ftengine weights``: what it prints, and that an error is one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ftengine.cli.main import run
from tests.training.released import random_state


def _run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ftengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run()
    assert (stop.value.code or 0) == code
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_a_generator_is_imported_shown_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 5, "state_dict": random_state("chest", "netG", "netD")}, tmp_path / "TGAN.pt")
    out, _ = _run(capsys, "weights", "import", tmp_path / "TGAN.pt", "--out", tmp_path / "ours")
    assert "released weights of the chest, sha256 " in out
    assert "segmenter: not in the file" in out
    assert "--set synthesis.variant=released" in out
    file = tmp_path / "ours" / "generator.pt"
    shown, _ = _run(capsys, "weights", "show", file, "--json")
    document = json.loads(shown)
    assert (document["kind"], document["region"], document["parameters"]) == ("ftengine generator", "chest", 19_073_665)
    assert document["trained_on"]["file"] == "TGAN.pt"
    text, _ = _run(capsys, "weights", "show", tmp_path / "TGAN.pt")
    assert "kind: released, chest: netG, netD" in text
    assert "netG.down_tr64.ops.0.conv1.weight" in text
    out, _ = _run(capsys, "weights", "export", file, "--out", tmp_path / "back.pt")
    assert "netG, netD in the released layout of the chest" in out
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    assert torch.equal(
        back["netG.out_tr.final_conv.bias"], random_state("chest", "netG")["netG.out_tr.final_conv.bias"]
    )


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    for arguments in (("import", tmp_path / "cut.pt", "--out", tmp_path / "o"), ("show", tmp_path / "cut.pt")):
        _, err = _run(capsys, "weights", *arguments, code=2)
        assert err.count("\n") == 1
        assert err.startswith("ftengine: error: ")
        assert "is not a file of weights, or is damaged or cut short" in err
