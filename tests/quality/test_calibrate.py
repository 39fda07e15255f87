"""Judge calibration: tumours found, P of a judge whose answers are known, T by hand, and what training is told."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ftengine.config import Config, QualityConfig
from ftengine.errors import ConfigError
from ftengine.pictures.calibration import sentences
from ftengine.quality.calibrate import (
    Calibration,
    JudgedTumor,
    Origin,
    calibration_file,
    find_real_tumors,
    judge_real_tumors,
    judge_warning,
    painter_warning,
    read_calibration,
    write_calibration,
)
from ftengine.quality.contrast import contrast_hu
from ftengine.quality.judge import SegmenterJudge
from ftengine.training.weight_files import sha256_of
from tests.support import small_config

CONFIG: Config = small_config()  # window -175 to 250 HU, patch 16, liver 1 and liver_tumor 2
SPACING = (3.0, 3.0, 3.0)


class DarkIsTumor(nn.Module):
    """A segmenter that takes every voxel below 50 HU for tumour, and any other for background."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hu = x * 425.0 - 175.0
        tumor = (hu < 50.0).to(x.dtype)
        return torch.cat([1 - tumor, torch.zeros_like(tumor), tumor], dim=1)


def _calibration(real: list[float], painted: list[float] | None = None, **more: object) -> Calibration:
    given: dict[Origin, list[float]] = {"real": real, "painted": painted or []}
    tumors = [
        JudgedTumor(origin, "liver", "tiny" if i % 2 else "small", 10.0, -30.0, p)
        for origin, values in given.items()
        for i, p in enumerate(values)
    ]
    fields: dict[str, object] = {
        "judge_sha256": "",
        "generator_sha256": "",
        "store": "S",
        "split": "test",
        "fold": None,
        "held_out": True,
        "threshold": 0.7,
        "sizes": ("tiny", "small"),
        "tumors": tuple(tumors),
    }
    return Calibration(**{**fields, **more})  # type: ignore[arg-type]  # a plain mapping of its fields


def _volume() -> tuple[np.ndarray, np.ndarray]:
    image = np.full((24, 32, 40), 100, dtype=np.int16)
    label = np.ones(image.shape, dtype=np.uint8)
    label[10:14, 10:14, 10:14] = 2  # 64 voxels, of which half are dark
    image[10:14, 10:14, 10:12] = 40
    image[10:14, 10:14, 12:14] = 80
    label[0:2, 28:32, 36:40] = 2  # 32 voxels in a corner, all dark
    image[0:2, 28:32, 36:40] = 20
    label[20, 2, 2] = 2  # a speck
    return image, label


def test_real_tumors_are_found_and_judged_as_the_judge_would_paint_them() -> None:
    image, label = _volume()
    tumors, num_small = find_real_tumors(image, label, CONFIG.region, SPACING)
    assert num_small == 1
    corner, middle = tumors  # in order of position
    assert [int(t.mask.sum()) for t in tumors] == [32, 64]
    assert {t.image.shape for t in tumors} == {(16, 16, 16)}
    assert middle.diameter_mm == pytest.approx((6 / math.pi * 64 * 27) ** (1 / 3))
    assert (middle.contrast_hu, corner.contrast_hu) == pytest.approx((-40.0, -80.0))
    assert not any(t.is_cut for t in tumors)
    # the patch of the corner was moved into the volume: the tumour lies in its own corner
    assert np.argwhere(corner.mask).min(axis=0).tolist() == [0, 12, 12]
    np.testing.assert_allclose(corner.image[corner.mask == 1], (20 + 175) / 425, rtol=1e-6)

    judge = SegmenterJudge(DarkIsTumor(), QualityConfig(threshold=None), CONFIG.region)
    result = list(judge_real_tumors(tumors, judge, lambda r: f"{r:.0f}", batch_size=1, device=torch.device("cpu")))
    assert [t.proportion for t in result] == [1.0, 0.5]
    assert [(t.origin, t.organ, t.size) for t in result] == [("real", "liver", "6"), ("real", "liver", "7")]


def test_a_tumor_larger_than_the_patch_is_cut_and_a_small_volume_padded_with_air() -> None:
    image = np.full((8, 24, 24), 100, dtype=np.int16)
    label = np.full(image.shape, 2, dtype=np.uint8)
    (tumor,), _ = find_real_tumors(image, label, CONFIG.region, SPACING)
    assert tumor.is_cut
    assert int(tumor.mask.sum()) == 8 * 16 * 16
    assert tumor.image[0].max() == 0.0  # air beyond the volume
    assert math.isnan(tumor.contrast_hu)  # no organ around it


def test_contrast_is_measured_away_from_the_border() -> None:
    shape = (21, 21, 21)
    z, y, x = np.indices(shape)
    away = np.sqrt((z - 10) ** 2 + (y - 10) ** 2 + (x - 10) ** 2)
    tumor, organ = away < 4, away >= 4
    image = np.where(tumor, 60, 100).astype(np.int16)
    image[(away >= 4) & (away < 5)] = 0  # next to it: not looked at, nearer than 1.5 mm
    assert contrast_hu(image, tumor, organ, (1.0, 1.0, 1.0)) == pytest.approx(-40.0, abs=4.0)
    assert math.isnan(contrast_hu(image, tumor, np.zeros(shape, dtype=bool), (1.0, 1.0, 1.0)))
    assert math.isnan(contrast_hu(image, np.zeros(shape, dtype=bool), organ, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("real", "wanted"),
    [
        ([0.0, 0.2, 0.62, 0.9], 0.6),  # two of four are 0.62 and more
        ([0.0, 0.2, 0.62], 0.2),  # half of three is two
        ([0.7, 0.7], 0.7),
        ([1.0, 1.0], 0.95),
        ([0.0, 0.0, 0.9], None),
        ([0.08, 0.09], None),  # 0.05 would pass them: too low to mean anything
        ([0.1, 0.0], 0.1),
        ([], None),
    ],
)
def test_the_recommended_threshold_by_hand(real: list[float], wanted: float | None) -> None:
    calibration = _calibration(real)
    assert calibration.recommended_threshold == wanted
    advice = calibration.advice()
    if not real:
        assert "nothing can be recommended" in advice
    else:
        assert ("qc.threshold=null" if wanted is None else f"qc.threshold={wanted:g}") in advice
        assert "uncertain" in advice


def test_pass_rates_by_size_and_variant() -> None:
    calibration = _calibration([0.7, 0.9, 0.2, 0.6], [0.7])
    assert calibration.pass_rate("real", 0.7) == 0.5
    assert calibration.pass_rate("real", 0.7, "tiny") == 0.5  # 0.9 and 0.6
    assert calibration.pass_rate("real", 0.7, "large") is None
    assert calibration.pass_rate("painted", 0.7) == 1.0
    assert _calibration([], [0.7], released=True).pass_rate("painted", 0.7) == 0.0  # P > T there


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    calibration = _calibration([0.3, 0.8], [0.9], notes=("a note",))
    write_calibration(calibration, tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == calibration
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["pass_rates"]["real"]["all"]["0.7"] == 0.5
    (tmp_path / "bad.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="is no calibration of this version"):
        read_calibration(tmp_path / "bad.json")


def test_training_is_told_what_the_judge_fails(tmp_path: Path) -> None:
    judge = tmp_path / "S.pt"
    judge.write_bytes(b"weights")
    assert judge_warning(judge, None) is None
    assert "has not been calibrated; 'ftengine qc calibrate STORE --judge" in (judge_warning(judge, 0.7) or "")
    file = calibration_file(judge)
    assert file == tmp_path / "S.calibration.json"
    known = _calibration([0.1, 0.3, 0.8], judge_sha256=sha256_of(judge))
    write_calibration(known, file)
    told = judge_warning(judge, 0.7)
    assert told is not None
    assert "at T=0.7 this judge passes 33% of 3 real tumours:" in told
    assert "recommended: qc.threshold=0.3" in told
    assert judge_warning(judge, 0.3) is None  # two of three
    write_calibration(_calibration([0.1], judge_sha256=sha256_of(judge), held_out=False), file)
    assert "some of which it may have been trained on" in (judge_warning(judge, 0.7) or "")
    whole = file.read_text()
    for text in (whole[: len(whole) // 2], whole.replace('"format": 1', '"format": 0'), "[]"):
        file.write_text(text)  # advice only: no reason to refuse a run
        told = judge_warning(judge, 0.7) or ""
        assert "S.calibration.json: is no calibration of this version" in told
        assert "'ftengine qc calibrate STORE --judge" in told
    file.write_text(whole)
    judge.write_bytes(b"other weights")
    assert "is of another judge" in (judge_warning(judge, 0.3) or "")


def _sided(real_hu: list[float | None], painted_hu: list[float | None], **more: object) -> Calibration:
    given: dict[Origin, list[float | None]] = {"real": real_hu, "painted": painted_hu}
    tumors = tuple(JudgedTumor(o, "liver", "small", 10.0, hu, 0.8) for o, values in given.items() for hu in values)
    return replace(_calibration([]), tumors=tumors, **more)  # type: ignore[arg-type]  # a plain mapping of its fields


@pytest.mark.parametrize(
    ("real_hu", "painted_hu", "is_told"),
    [
        ([-30.0] * 10, [25.0] * 10, True),
        ([20.0] * 10, [-25.0] * 40, True),
        ([-30.0] * 10, [-5.0] * 10, False),
        ([-30.0, 30.0] * 5, [-25.0] * 40, False),  # half of them is no other side
        ([-30.0, 30.0, 30.0] * 4, [-25.0] * 40, True),
        ([-30.0] * 9, [25.0] * 40, False),  # too few to say
        ([-30.0] * 9 + [None] * 9, [25.0] * 40, False),
        ([-30.0] * 40, [], False),
    ],
)
def test_a_generator_of_the_other_contrast_is_told(
    real_hu: list[float | None], painted_hu: list[float | None], is_told: bool
) -> None:
    calibration = _sided(real_hu, painted_hu)
    assert (calibration.side_finding() is not None) == is_told
    assert any("brighter than their organ" in line for line in sentences(calibration)) == is_told
    assert (calibration.to_json()["side_finding"] is not None) == is_told


def test_training_is_told_of_the_other_contrast_of_its_own_generator(tmp_path: Path) -> None:
    judge, generator, other = (tmp_path / name for name in ("S.pt", "G.pt", "G2.pt"))
    for file in (judge, generator, other):
        file.write_bytes(file.name.encode())
    assert painter_warning(judge, generator) is None  # not calibrated: the judge's warning says so
    shas = {"judge_sha256": sha256_of(judge), "generator_sha256": sha256_of(generator)}
    write_calibration(_sided([-30.0] * 12, [25.0] * 50, **shas), calibration_file(judge))
    told = painter_warning(judge, generator) or ""
    assert "G.pt: 100% of 50 painted tumours are brighter than their organ, but 0% of 12 real ones" in told
    assert "synthesis.target_contrast_hu" in told
    without = _sided([-30.0] * 12, [25.0] * 50).side_finding() or ""
    assert "generator" not in without  # there is none to train anew
    assert "Choose another contrast in the section synthesis" in without
    assert painter_warning(judge, other) is None
    assert painter_warning(judge, None) is None
    write_calibration(_sided([-30.0] * 12, [-25.0] * 50, **shas), calibration_file(judge))
    assert painter_warning(judge, generator) is None
    calibration_file(judge).write_text("{")
    assert painter_warning(judge, generator) is None
