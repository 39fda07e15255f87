"""The comparison of shapes runs whole on masks made here, says what is wrong with a folder, and on real tumours shows what it claims."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ftengine.bench import shape_fit, shapes
from ftengine.bench.shapes import read_real
from ftengine.config import Config, RealisticShapeConfig
from ftengine.errors import ConfigError
from ftengine.evaluation.shape_measures import MEASURES, column

SPACING_XYZ = (0.8, 0.8, 2.5)


def _write_masks(root: Path, organ: str, count: int, *, per_case: int = 2) -> Path:
    """Cases as in the shared data: LPS masks, x y z, with ``per_case`` ellipsoids of 6 to 16 mm and organ around."""
    folder = root / "tumor_masks" / f"{organ}_made"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    affine = np.diag([-SPACING_XYZ[0], -SPACING_XYZ[1], SPACING_XYZ[2], 1.0])
    for case in range(count):
        mask = np.ones((60 * per_case, 60, 24), dtype=np.uint8)
        mask[:, :, 0] = 0
        for number in range(per_case):
            axes = [np.arange(n) - c for n, c in zip(mask.shape, (30 + 60 * number, 30, 12), strict=True)]
            x, y, z = (
                (axis * mm / radius) ** 2
                for axis, mm, radius in zip(axes, SPACING_XYZ, rng.uniform(6, 16, 3), strict=True)
            )
            mask[x[:, None, None] + y[:, None] + z < 1] = 2
        np.savez(folder / f"case_{case:03d}.npz", mask=mask, affine=affine)
    return folder


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _write_masks(tmp_path, "kidney", 12)
    monkeypatch.setenv("FTENGINE_TEST_DATA", str(tmp_path))
    return tmp_path


def test_shape_bench_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    document = shapes.run(organs=["kidney"], num_drawn=12, as_json=True, out=out)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    result = document["organs"]["kidney"]
    assert (result["cases"], result["tumors_fit"], result["tumors_held_out"]) == (12, 12, 12)
    for shape in shapes.SHAPES:
        for view in shapes.VIEWS:
            ks = result[shape][view]["ks"]
            assert ks.keys() == set(MEASURES)
            assert all(0 <= distance <= 1 for distance in ks.values())
            assert result[shape][view]["percentiles"]["all"]["tumors"] >= 12
    assert json.loads((out / "shapes.json").read_text())["organs"] == json.loads(json.dumps(document["organs"]))
    assert "| roughness |" in (out / "shapes.md").read_text()
    picture = (out / "shapes.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert len(picture) < 200_000


def test_real_masks_are_measured_in_millimetres_whatever_their_grid(made: Path) -> None:
    real = read_real(made, "kidney")
    assert real.fit_slices_mm == [2.5] * 6
    for tumor in (*real.fit, *real.held_out):
        assert 6 < tumor.equivalent_radius_mm < 16
        assert 12 - 3 < tumor.diameter_mm < 32 + 3
        assert tumor.solidity > 0.8


def test_equal_samples_have_no_distance_and_disjoint_ones_all(made: Path) -> None:
    real = read_real(made, "kidney")
    assert set(shapes.compare(real.fit, real.fit).values()) == {0.0}
    large = shapes.measure_ours(
        Config.preset("abdomen").synthesis.model_copy(update={"size_weights": {"large": 1.0}}), "kidney", [1.5] * 3, 0
    )
    assert shapes.compare(real.fit, large)["volume_ml"] == 1.0


def test_through_thick_slices_a_tumor_keeps_its_size_and_gains_steps() -> None:
    config = Config.preset("abdomen").synthesis.model_copy(update={"size_weights": {"small": 1.0}})
    direct = shapes.measure_ours(config, "liver", [1.5] * 30, 1)
    thick = shapes.measure_ours(config, "liver", [5.0] * 30, 1)
    assert np.mean(column(thick, "volume_ml")) == pytest.approx(np.mean(column(direct, "volume_ml")), rel=0.1)
    assert np.median(column(thick, "roughness")) > np.median(column(direct, "roughness"))


def test_components_at_the_border_or_too_small_are_counted_not_measured() -> None:
    mask = np.zeros((30, 30, 30), dtype=bool)
    mask[0:6, 5:12, 5:12] = True
    mask[20:23, 20:23, 20:23] = True
    mask[12:18, 5:12, 5:12] = True
    found, small, cut = shapes.measure_mask(mask)
    assert (len(found), small, cut) == (1, 1, 1)


@pytest.mark.parametrize(
    ("organ", "says"),
    [
        ("colon", "no real tumours of 'colon'; there are empty, few, kidney"),
        ("empty", "holds no .npz file"),
        ("few", "want 10 in each"),
    ],
)
def test_a_folder_that_cannot_be_compared_says_why(made: Path, organ: str, says: str) -> None:
    (made / "tumor_masks" / "empty_made").mkdir()
    _write_masks(made, "few", 2, per_case=1)
    with pytest.raises(ConfigError) as caught:
        read_real(made, organ)
    assert says in str(caught.value)


def test_no_data_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FTENGINE_TEST_DATA"):
        read_real(tmp_path, "kidney")
    broken = _write_masks(tmp_path, "kidney", 1) / "case_000.npz"
    broken.write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match=r"case_000\.npz: cannot be read"):
        read_real(tmp_path, "kidney")


def test_the_fit_finds_the_size_and_is_a_function_of_its_data(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_fit, "NUM_DRAWN", 12)
    real = read_real(made, "kidney")
    first, second = (shape_fit.fit_organ(real, generations=1) for _ in range(2))
    assert first == second
    law = RealisticShapeConfig(**first)
    assert law.volume_ml == pytest.approx(np.exp(np.mean(np.log(column(real.fit, "volume_ml")))), abs=0.01)
    assert law.source == "12 tumours of 6 cases of kidney_made"
    pooled = shape_fit.pooled_law([real, real], [first, first])
    RealisticShapeConfig(**pooled)
    assert {k: pooled[k] for k in first if "volume" not in k and k != "source"} == {
        k: first[k] for k in first if "volume" not in k and k != "source"
    }
    assert pooled["volume_ml"] == first["volume_ml"]
    assert yaml.safe_load(shape_fit.as_yaml({"kidney": first})) == {"kidney": first}


@pytest.mark.data
@pytest.mark.parametrize("organ", ["kidney", "pancreas"])
def test_realistic_tumors_are_nearer_to_held_out_real_ones(data_dir: Path, organ: str) -> None:
    real = read_real(data_dir, organ)
    config = Config.preset("abdomen").synthesis
    thick = [float(t) for t in np.random.default_rng(1).choice(real.held_out_slices_mm, 100)]
    mean = {}
    for shape in shapes.SHAPES:
        ours = shapes.measure_ours(config.model_copy(update={"shape": shape}), organ, thick, 1)
        mean[shape] = np.mean(list(shapes.compare(real.held_out, ours).values()))
    assert mean["realistic"] < mean["paper"]
