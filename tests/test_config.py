"""Presets, files, overrides, and what their errors say."""

from pathlib import Path
from typing import Any

import pytest

from ftengine.config import POOLED_SHAPE, Config, preset_names
from ftengine.datasets.registry import load_registry
from ftengine.errors import ConfigError


@pytest.mark.parametrize("name", ["abdomen", "chest", "demo"])
def test_presets_are_valid_and_survive_yaml(name: str, tmp_path: Path) -> None:
    config = Config.preset(name)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert Config.from_file(file) == config


def test_presets_have_the_papers_grids() -> None:
    abdomen, chest = Config.preset("abdomen").region, Config.preset("chest").region
    assert (abdomen.spacing_mm_zyx, abdomen.window_hu, abdomen.patch_zyx) == (
        (1.5, 1.5, 1.5),
        (-175, 250),
        (96, 96, 96),
    )
    assert (chest.spacing_mm_zyx, chest.window_hu, chest.patch_zyx) == ((5.0, 1.25, 1.25), (-1000, 500), (32, 192, 192))
    assert [name for name in preset_names() if "released" not in name] == [
        "abdomen",
        "abdomen-kidney",
        "abdomen-liver",
        "abdomen-pancreas",
        "chest",
        "chest-covid",
        "demo",
    ]


def test_presets_of_the_released_code_weigh_known_data_sets_and_paint_as_it_does() -> None:
    known = set(load_registry().entries)
    for name in ("abdomen-released-synth", "abdomen-released-seg", "chest-released"):
        config, plain = Config.preset(name), Config.preset(name.split("-")[0])
        assert set(config.loader.dataset_weights) <= known
        assert config.loader.annotated_fraction is None
        same: dict[str, Any] = {
            "loader.dataset_weights": {},
            "loader.annotated_fraction": 0.5,
            "synthesis.variant": "paper",
        }
        same |= {"loader.positive_fraction": 0.5, "augment.scale_probability": 0.1}
        same |= {"generator.width": 8, "generator.channel": "organ"}
        assert config.synthesis.variant == "released"
        training = {"training": plain.training, "generator_training": plain.generator_training}
        assert config.with_overrides(same).model_copy(update=training) == plain
    of_g = Config.preset("abdomen-released-synth").generator_training
    assert (of_g.optimizer, of_g.schedule, of_g.betas, of_g.weight_decay) == ("adam", "constant", (0.0, 0.999), 0.0)
    stage_1 = Config.preset("abdomen-released-synth")
    assert (stage_1.generator.width, stage_1.generator.channel, stage_1.loader.positive_fraction) == (32, "first", 1.0)
    chest = Config.preset("chest-released")
    assert (chest.generator.width, chest.augment.scale_probability, chest.loader.positive_fraction) == (32, 0.0, 0.5)
    assert (chest.generator_training.batch_size, chest.training.batch_size) == (8, 2)
    of_s = Config.preset("abdomen-released-seg").training
    assert (of_s.amsgrad, of_s.precision, of_s.cutmix_probability) == (True, "fp16", 1.0)
    assert Config.preset("chest-released").generator_training.lambda_cls == 0.5
    assert Config.preset("abdomen-released-synth").loader.dataset_weights == {"lits": 200, "msd07": 100, "kits23": 100}


def test_overrides_change_only_their_key() -> None:
    before = Config.preset("abdomen")
    after = before.with_overrides({"seed": 5, "loader.reader_threads": 4, "training.batch_size": 4})
    assert (after.seed, after.loader.reader_threads, after.training.batch_size) == (5, 4, 4)
    assert after.synthesis == before.synthesis
    assert before.seed == 0


def test_assignments_are_read_as_yaml() -> None:
    config = Config.preset("abdomen").with_assignments(
        [
            "training.learning_rate=3e-4",
            "qc.threshold=null",
            "synthesis.size_weights={tiny: 1}",
            "network.checkpointing=false",
        ]
    )
    assert config.training.learning_rate == 3e-4
    assert config.qc.threshold is None
    assert config.synthesis.size_weights == {"tiny": 1.0}
    assert config.network.checkpointing is False


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("training.batchsize=2", "Did you mean training.batch_size?"),
        ("loader.reader_thread=3", "Did you mean loader.reader_threads?"),
        ("batch_size=3", "Did you mean training.batch_size?"),
        ("qc.threshold=2", "qc.threshold: Input should be less than or equal to 1"),
        ("region.window_hu=[3, 1]", "want low < high, in HU"),
        ("region.patch_zyx=[32, 64, 96]", "square axial patch"),
        ("network.feature_size=50", "multiple of 12"),
        ("network.transformer_width=50", "transformer_width=50: want a multiple of 12"),
        ("network={name: unet, axes: xyz}", "axes=xyz with name=unet"),
        ("synthesis.sizes={tiny: {radius_mm: [9, 4], warp_sigma_mm: [1, 2]}}", "want 0 < low <= high, in mm"),
        (
            "synthesis={variant: released, sizes: {odd: {radius_mm: [4, 9], warp_sigma_mm: [1, 2]}}, size_weights: {odd: 1}}",
            "variant released knows",
        ),
        ("synthesis.shape=lumpy", "synthesis.shape: Input should be 'paper' or 'realistic' (got 'lumpy')"),
        ("synthesis={shape: realistic, variant: released}", "the released code knows its own shapes only"),
        (
            "synthesis.realistic_shapes={liver: {volume_ml: 3}}",
            "synthesis.realistic_shapes.liver.source: Field required",
        ),
        ("seed=x", "seed"),
        ("seed", "want key=value"),
        ("seed=[", "not YAML"),
    ],
)
def test_a_wrong_assignment_says_what_and_how(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.preset("abdomen").with_assignments([assignment])
    assert says in str(caught.value)


def test_an_organ_is_added_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "spleen.yaml"
    file.write_text(
        "preset: abdomen\nregion:\n  name: spleen\n  labels: {background: 0, spleen: 1, spleen_tumor: 2}\n"
        "  organs: {spleen: {organ: 1, tumor: 2}}\n"
    )
    region = Config.from_file(file).region
    assert region.organ_channel == {"spleen": 0}
    assert region.tumor_values == (2,)
    assert region.spacing_mm_zyx == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: {stepz: 3}", "training.stepz: there is no such key. Did you mean training.steps?"),
        ("[1, 2]", "want a mapping"),
        ("a: [", "not YAML"),
        ("preset: knee", "preset 'knee' does not exist"),
        ("region: {labels: {a: 0, b: 2}, organs: {}}", "0, 1, 2, ... without a gap"),
        ("region: {organs: {liver: {organ: 1, tumor: 9}}}", "names label values [9]"),
    ],
)
def test_a_wrong_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.from_file(file)
    assert says in str(caught.value)


def test_a_users_law_of_shape_replaces_that_organs_alone() -> None:
    shipped = Config.preset("abdomen").synthesis.realistic_shapes
    assert {"kidney", "pancreas", POOLED_SHAPE} == set(shipped)
    own = {"liver": shipped["kidney"].model_dump() | {"source": "mine", "volume_ml": 5.0}}
    config = Config.preset("abdomen").with_overrides(
        {"synthesis.shape": "realistic", "synthesis.realistic_shapes": own}
    )
    assert config.synthesis.realistic_shapes["liver"].volume_ml == 5.0
    assert {k: v for k, v in config.synthesis.realistic_shapes.items() if k != "liver"} == shipped


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        Config.from_file(tmp_path / "nowhere.yaml")
