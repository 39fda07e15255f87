"""Sheets of painted patches, of volumes and of predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.plan import Plan
from ftengine.pictures import samples as module
from ftengine.pictures.hu_windows import WindowChoice
from ftengine.pictures.panels import MASK_COLOR, PREDICTION_COLOR, Color, class_color
from ftengine.pictures.preview import preview
from ftengine.pictures.sheets import SheetInfo, described, write_volume_sheet
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import make_store, organ_volume, ras_grid_at, small_config

WINDOW = (-175.0, 250.0)
LABELS = {"background": 0, "liver": 1, "liver_tumor": 2}
SPACING = (3.0, 3.0, 3.0)
WHITE = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def config() -> Config:
    return small_config(device="cpu", qc__retries=0)


@pytest.fixture(scope="module")
def store(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("preview"), config)


class FixedJudge:
    """A judge that gives every patch the same P, and fails it below 0.5."""

    def __init__(self, proportion: float) -> None:
        self.proportion = proportion
        self.calls = 0

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(image) == len(mask) == len(tumor_values)
        self.calls += 1
        proportion = torch.full((len(image),), self.proportion)
        return proportion, proportion >= 0.5


def dark_is_tumor(image: torch.Tensor) -> torch.Tensor:
    """Logits of a segmenter that calls dark liver a tumour."""
    dark = ((image > 0.4) & (image < 0.58)).float()
    return torch.cat([torch.full_like(dark, 0.2), torch.full_like(dark, 0.5), dark], dim=1)


def pixels_of(path: Path, color: Color) -> int:
    """Pixels of a PNG that have a colour exactly, as the middle of a line has."""
    drawn = imread(path)[..., :3]
    return int((np.abs(drawn - np.array(color, dtype=np.float32)).max(axis=-1) < 0.5 / 255).sum())


def test_draws_the_asked_number_of_sheets_at_the_asked_width(config: Config, store: Store, tmp_path: Path) -> None:
    seen: list[SheetInfo] = []
    judge = FixedJudge(0.8)
    sheets = preview(
        config,
        store,
        tmp_path / "new",
        num_sheets=3,
        judge=judge,
        segmenter=dark_is_tumor,
        on_sheet=seen.append,
        width_px=1280,
    )
    assert seen == sheets
    assert [s.path.name for s in sheets] == ["sheet-000.png", "sheet-001.png", "sheet-002.png"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [s.path.name for s in sheets]
    assert judge.calls == 3
    for sheet in sheets:
        assert imread(sheet.path).shape[1] == 1280
        assert pixels_of(sheet.path, MASK_COLOR) > 20
        assert pixels_of(sheet.path, PREDICTION_COLOR) > 20
        assert sheet.organ == "liver"
        assert sheet.passed
        assert sheet.proportion == pytest.approx(0.8)
        assert -200 < sheet.contrast_hu < -10  # the fixed contrast darkens
        assert 3 < sheet.diameter_mm < 40
        assert sheet.title.startswith(f"{sheet.case}: synthetic {sheet.size_class} liver tumour, ")
        assert "P = 0.80, passed" in sheet.title


def test_sheets_are_patches_of_the_loaders_plan(config: Config, store: Store, tmp_path: Path) -> None:
    plan = Plan(config, store, mix="mixed", split="train")
    sheets = preview(config, store, tmp_path, num_sheets=2, split="train")
    for sheet in sheets:
        assert plan.request(sheet.epoch, sheet.index).case == sheet.case
        assert sheet.seed == config.seed
    assert [(s.epoch, s.index) for s in sheets] == sorted((s.epoch, s.index) for s in sheets)


def test_same_preview_gives_the_same_bytes(config: Config, store: Store, tmp_path: Path) -> None:
    first, second = (preview(config, store, tmp_path / name, num_sheets=1)[0] for name in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_random_changes_of_the_loader_are_left_out(config: Config, store: Store, tmp_path: Path) -> None:
    always = config.with_overrides(
        {"augment.flip_probability": 1.0, "augment.rot90_probability": 1.0, "augment.shift_probability": 1.0}
    )
    never = config.with_overrides(
        {"augment.flip_probability": 0.0, "augment.rot90_probability": 0.0, "augment.shift_probability": 0.0}
    )
    sheets = [preview(c, store, tmp_path / str(n), num_sheets=1)[0] for n, c in enumerate((always, never))]
    assert sheets[0].path.read_bytes() == sheets[1].path.read_bytes()


def test_failed_patch_is_shown_as_it_was_painted(config: Config, store: Store, tmp_path: Path) -> None:
    kept = preview(config, store, tmp_path / "kept", num_sheets=1)[0]
    failed = preview(config, store, tmp_path / "failed", num_sheets=1, judge=FixedJudge(0.1))[0]
    assert not failed.passed
    assert failed.contrast_hu == pytest.approx(kept.contrast_hu)
    assert failed.title.endswith("P = 0.10, failed")
    assert kept.title.endswith("not judged")
    assert np.isnan(kept.proportion)
    assert failed.num_draws == 1
    retried = config.with_overrides({"qc.retries": 2})
    again = preview(retried, store, tmp_path / "again", num_sheets=1, judge=FixedJudge(0.1))[0]
    assert again.num_draws == 3


def test_without_segmenter_there_is_no_prediction_column(config: Config, store: Store, tmp_path: Path) -> None:
    sheet = preview(config, store, tmp_path, num_sheets=1, judge=FixedJudge(0.8))[0]
    assert pixels_of(sheet.path, PREDICTION_COLOR) == 0


def test_module_as_segmenter_is_set_to_eval_mode(config: Config, store: Store, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 1), torch.nn.Dropout(0.5)).train()
    preview(config, store, tmp_path, num_sheets=1, segmenter=network)
    assert not network.training


def test_painted_whatever_the_fraction(config: Config, store: Store, tmp_path: Path) -> None:
    rarely = config.with_overrides({"synthesis.fraction": 0.0})
    assert len(preview(rarely, store, tmp_path, num_sheets=1)) == 1


def ill_store(folder: Path, config: Config, *, healthy_too: bool) -> Store:
    """A volume whose liver is all tumour and, where asked, a healthy one."""
    root = create_store(folder / "ill.zarr", config.region)
    grid = ras_grid_at((40, 40, 40))
    for name, value, annotation in (("a/0", 2, "tumor"), ("o/0", 1, "organ"))[: 2 if healthy_too else 1]:
        image, label = organ_volume((40, 40, 40), tumor=False, seed=0)
        label[label == 1] = value
        provenance = Provenance("made by a test", "", annotation=annotation)
        write_volume(root, name, image, label, grid, grid, config.region, provenance)
    return open_store(root)


def test_says_why_nothing_can_be_painted(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIES_PER_SHEET", 4)
    huge = config.with_overrides({"synthesis.min_organ_voxels": 5000})
    with pytest.raises(ConfigError, match=r"none of 8 patches .*too little healthy organ.*min_organ_voxels=5000"):
        preview(huge, store, tmp_path, num_sheets=2)
    always = config.with_overrides({"loader.positive_fraction": 1.0, "loader.absent_classes": "allow"})
    with pytest.raises(ConfigError, match=r"none of 4 patches .*a labelled tumour in the patch: 4"):
        preview(always, ill_store(tmp_path, config, healthy_too=False), tmp_path, num_sheets=1)
    assert not list(tmp_path.glob("*.png"))


def test_fewer_sheets_come_back_where_the_tries_run_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIES_PER_SHEET", 1)
    labelled = config.with_overrides({"loader.positive_fraction": 1.0})  # slot 0 of a batch is ill, slot 1 healthy
    sheets = preview(labelled, ill_store(tmp_path, config, healthy_too=True), tmp_path, num_sheets=2)
    assert [(s.case, s.index) for s in sheets] == [("o/0", 1)]


def test_wrong_requests_are_refused(config: Config, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_patches=0"):
        preview(config, store, tmp_path, num_sheets=0)
    with pytest.raises(ConfigError, match="the configuration is for"):
        preview(Config.preset("abdomen"), store, tmp_path, num_sheets=1)


def volume(*, tumor: bool) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    return organ_volume((20, 24, 28), tumor=tumor, seed=3)


def test_volume_sheet_outlines_each_class(tmp_path: Path) -> None:
    image, label = volume(tumor=True)
    path = tmp_path / "deep" / "volume.png"
    write_volume_sheet(
        path, image, label, spacing_mm_zyx=(5.0, 1.0, 1.0), window_hu=WINDOW, labels=LABELS, title="a/0", width_px=960
    )
    assert imread(path).shape[1] == 960
    with_tumor = pixels_of(path, class_color(2))
    assert pixels_of(path, class_color(1)) > 100
    image, label = volume(tumor=False)
    write_volume_sheet(
        path, image, label, spacing_mm_zyx=(5.0, 1.0, 1.0), window_hu=WINDOW, labels=LABELS, title="a/0", width_px=960
    )
    assert pixels_of(path, class_color(2)) < with_tumor  # the legend alone


def test_volume_sheet_without_a_label_shows_the_middle(tmp_path: Path) -> None:
    image, label = volume(tumor=False)
    write_volume_sheet(
        tmp_path / "v.png", image, np.zeros_like(label), spacing_mm_zyx=SPACING, window_hu=WINDOW, labels=LABELS
    )
    assert imread(tmp_path / "v.png").shape[1] == 1600


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image, label = volume(tumor=True)
    with pytest.raises(ConfigError, match="label"):
        write_volume_sheet(
            tmp_path / "v.png", image, label[1:], spacing_mm_zyx=SPACING, window_hu=WINDOW, labels=LABELS
        )


def test_sheets_by_size_class(config: Config, store: Store, tmp_path: Path) -> None:
    sheets = preview(config, store, tmp_path, num_sheets=2, per_size=True, contact=True)
    wanted = module.size_classes(config)
    assert [s.size_class for s in sheets] == [name for name in wanted for _ in range(2)]
    assert [s.path.name for s in sheets[:2]] == [f"sheet-{wanted[0]}-000.png", f"sheet-{wanted[0]}-001.png"]
    assert {p.name for p in tmp_path.iterdir()} == {*(s.path.name for s in sheets), "contact.png"}
    assert pixels_of(tmp_path / "contact.png", MASK_COLOR) > 5 * len(sheets)


def test_size_classes_are_those_with_a_weight(config: Config) -> None:
    some = config.with_overrides({"synthesis.size_weights": {"small": 1.0}})
    assert module.size_classes(some) == ["small"]
    assert module.size_classes(config.with_overrides({"synthesis.shape": "realistic"})) == list(config.synthesis.sizes)


def test_each_tumour_of_a_patch_gets_a_sheet(config: Config, store: Store, tmp_path: Path) -> None:
    several = config.with_overrides({"synthesis.num_tumors": 4, "synthesis.size_weights": {"tiny": 1.0}})
    samples = [s for s in module.painted_samples(several, store, num_patches=8) if len(s.tumors) > 1]
    assert samples  # some of them lie apart
    for sample in samples:
        together = np.sum(sample.tumors, axis=0)
        assert together.max() == 1
        assert not np.any(together.astype(bool) & ~sample.mask)
        infos = [info for info, _ in described(several, sample, tmp_path / "sheet-000.png")]
        assert [i.number for i in infos] == list(range(1, len(sample.tumors) + 1))
        assert infos[1].path.name == "sheet-000-tumor-2.png"
        assert infos[0].diameter_mm >= infos[1].diameter_mm
        assert f"tumour 2 of {len(infos)}" in infos[1].title
    sheets = preview(several, store, tmp_path, num_sheets=8)
    assert sum(s.num_tumors > 1 for s in sheets) > 0
    assert all(s.path.exists() for s in sheets)


def test_window_changes_the_greys_and_nothing_else(config: Config, store: Store, tmp_path: Path) -> None:
    wide = preview(config, store, tmp_path / "wide", num_sheets=1)[0]
    narrow = preview(config, store, tmp_path / "narrow", num_sheets=1, window=WindowChoice("organ"))[0]
    assert wide.path.read_bytes() != narrow.path.read_bytes()
    assert (wide.case, wide.contrast_hu, wide.index) == (narrow.case, narrow.contrast_hu, narrow.index)
