"""The bench of prediction runs whole at toy size, and its check notices labels that differ."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ftengine.bench import predict

# MONAI's readers warn of what is not installed
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodec")
TINY = ["region.patch_zyx=[16,16,16]", "network.channels=[4,8]"]


def test_both_chains_run_and_their_ratio_is_that_of_the_samples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(part: str, checkpoint: Path, scan: Path, device: torch.device) -> dict[str, float]:
        return predict.measure_part(part, checkpoint, scan, device)

    monkeypatch.setattr(predict, "_apart", in_this_process)
    document = predict.run(
        shape_zyx=(16, 32, 32),
        spacing_mm_zyx=(4.0, 3.0, 3.0),
        rounds=2,
        large=("clinical",),
        large_zyx=(24, 32, 32),
        assignments=TINY,
        as_json=True,
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    compared = document["compared"]
    ratios = [a / b for a, b in zip(*(compared["samples_s"][n] for n in (predict.OURS, predict.MONAI)), strict=True)]
    assert compared["ours_of_monai"] == pytest.approx(np.median(ratios))
    assert set(compared["peak_gb"]) == {predict.OURS, predict.MONAI}
    assert compared["differing_share"] == 0
    (large,) = document["large"].values()
    assert large["peak_gb"] >= large["imports_gb"] > 0
    assert f"{compared['ours_of_monai']:.3f}" in predict.as_text(document)


def test_labels_that_differ_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict.write_checkpoint(tmp_path / "w.safetensors", TINY)
    predict.write_scan(tmp_path / "s.nii.gz", (16, 32, 32), (4.0, 3.0, 3.0))
    monkeypatch.setattr(predict, "predict_volume", lambda _n, hu, _c, _d: np.full(hu.shape, 9, np.uint8))
    with pytest.raises(AssertionError, match="differ"):
        predict.check(tmp_path / "w.safetensors", tmp_path / "s.nii.gz", torch.device("cpu"))
