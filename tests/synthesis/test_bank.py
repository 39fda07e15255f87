"""The tumour bank: the true tumours of phantoms, of training volumes only, within its memory; and training with each synthesiser."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi

from ftengine.adapters.torch_dataset import PatchDataset
from ftengine.assemble import build_bank, build_loader, build_synthesis_stage, train_segmentation
from ftengine.config import DIVERSE, Config
from ftengine.errors import ConfigError, StoreError
from ftengine.geometry import IntZYX
from ftengine.pictures.preview import preview
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.subset import make_subset
from ftengine.store.tumors import tumors_of_row
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.synthesis.bank import BankTumor
from ftengine.types import TumorCrop
from ftengine.volume.phantom import TumorSpec, make_phantom
from tests.support import make_store, ras_grid_at, small_config

SPACING = (3.0, 3.0, 3.0)
PASTING = {
    "synthesis.synthesizer": "copy-paste",
    "synthesis.bank_least_mm3": 0.0,
    "synthesis.contrast_factor": (1.0, 1.0),  # the preset has another
}


def _config(**keys: Any) -> Config:
    values = {"device": "cpu", "qc.retries": 0, **PASTING} | {k.replace("__", "."): v for k, v in keys.items()}
    return small_config().with_overrides(values)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, tuple[Any, Any]]]:
    """Four phantoms with tumours, of two splits, and a healthy one; their liver is the region's."""
    region = _config().region
    root = create_store(tmp_path_factory.mktemp("bank") / "store.zarr", region)
    volumes = {}
    for case in range(5):
        phantom = make_phantom(
            "abdomen",
            seed=5,
            case=case,
            shape_zyx=(64, 80, 80),
            spacing_mm_zyx=SPACING,
            tumors=TumorSpec((2, 3), organs=("liver",)) if case < 4 else None,
        )
        label = np.where(phantom.label <= 2, phantom.label, 0).astype(np.uint8)
        name = f"p/{case}"
        volumes[name] = phantom.image_hu, label
        provenance = Provenance(
            "made by a test",
            "",
            annotation="tumor" if case < 4 else "organ",
            split="train" if case < 3 else "val",
        )
        write_volume(root, name, phantom.image_hu, label, phantom.grid, phantom.grid, region, provenance)
    index.compact_index(root)
    return open_store(root), volumes


def _true_tumors(label: Any, image: Any) -> list[tuple[int, list[int]]]:
    """Voxels and sorted HU of each component, from the whole volume."""
    parts, count = ndi.label(label == 2, structure=np.ones((3, 3, 3)))
    return sorted((int((parts == n).sum()), sorted(image[parts == n].tolist())) for n in range(1, count + 1))


def _as_numbers(tumors: list[BankTumor]) -> list[tuple[int, list[int]]]:
    return sorted((t.num_voxels, sorted(t.image_hu[t.mask > 0].tolist())) for t in tumors)


@pytest.mark.parametrize("edge_sigma_mm", [0.0, 3.0])
def test_the_bank_holds_the_true_tumors_of_the_phantoms(
    phantoms: tuple[Store, dict[str, tuple[Any, Any]]], edge_sigma_mm: float
) -> None:
    store, volumes = phantoms
    bank = build_bank(_config(synthesis__edge_sigma_mm=edge_sigma_mm), store)
    assert bank is not None
    for case, (image, label) in volumes.items():
        found = [t for t in bank.tumors["liver"] if t.case == case]
        assert _as_numbers(found) == _true_tumors(label, image)
    reach = int(4 * edge_sigma_mm / 3 + 0.5)
    for tumor in bank.tumors["liver"]:
        held = np.argwhere(tumor.mask)
        assert (held.min(axis=0) == reach).all()
        assert (held.max(axis=0) == np.array(tumor.mask.shape) - 1 - reach).all()
        assert tumor.image_hu.dtype == np.int16


def test_the_surroundings_are_the_organ_around_the_tumor(phantoms: tuple[Store, dict[str, tuple[Any, Any]]]) -> None:
    store, volumes = phantoms
    bank = build_bank(_config(), store)
    assert bank is not None
    image, label = volumes["p/0"]
    parts, count = ndi.label(label == 2, structure=np.ones((3, 3, 3)))
    expected = []
    for n in range(1, count + 1):
        distance_mm = ndi.distance_transform_edt(parts != n, sampling=SPACING)
        ring = image[(distance_mm <= 6.0) & (label == 1)]
        expected.append((int((parts == n).sum()), ring.mean()))
    found = sorted((t.num_voxels, t.surround_hu) for t in bank.tumors["liver"] if t.case == "p/0")
    np.testing.assert_allclose(found, sorted(expected), rtol=1e-9)


def test_outside_tumor_and_organ_the_nearest_tumor_voxel_is_held() -> None:
    mask = np.zeros((9, 9, 9), dtype=np.uint8)
    mask[4, 4, 3:5] = 1
    label = np.where(mask, 2, 0).astype(np.uint8)
    label[:, :, :3] = 1
    image = np.arange(729, dtype=np.int16).reshape(9, 9, 9)
    tumor = BankTumor.of(TumorCrop("c", 2, image, label, mask, (0, 0, 0)), 1, SPACING, (0, 1, 1))
    part = image[2:7, 1:8, 1:8]  # cut with the two voxels of the ring's 6 mm, of which the edge needs one along y and x
    assert tumor.mask.shape == (5, 7, 7)
    assert (tumor.image_hu[:, :, :2] == part[:, :, :2]).all()  # organ
    assert tumor.image_hu[2, 3, 2] == image[4, 4, 3]
    assert (tumor.image_hu[:, :, 3:] == image[4, 4, 4]).all()  # neither


def _cases(config: Config, store: Store, **which: Any) -> set[str]:
    bank = build_bank(config, store, **which)
    assert bank is not None
    return {t.case for tumors in bank.tumors.values() for t in tumors}


def test_only_volumes_that_training_draws_from_are_cut(
    phantoms: tuple[Store, dict[str, tuple[Any, Any]]], tmp_path: Path
) -> None:
    store, config = phantoms[0], _config()
    assert _cases(config, store) == {"p/0", "p/1", "p/2", "p/3"}
    assert _cases(config, store, split="train") == {"p/0", "p/1", "p/2"}
    assert _cases(config, store, split="val") == {"p/3"}
    with pytest.raises(ConfigError, match=r"no tumour to paste \(0 annotated volumes"):
        build_bank(_config(loader__dataset_weights={"p": 0.0}), store)
    make_subset(store, tmp_path / "folds.zarr", num_folds=2)
    folded = open_store(tmp_path / "folds.zarr")
    fold_of = dict(zip(folded.cases, folded.column("fold").to_pylist(), strict=True))
    for fold in (0, 1):
        which: dict[str, Any] = {"split": "train", "held_out_fold": fold}
        cut = _cases(config, folded, **which)
        assert cut == {c for c in ("p/0", "p/1", "p/2") if fold_of[c] != fold} != set()
        with build_loader(config, folded, mix="annotated", **which) as loader:
            assert {r.request.case for batch in loader for r in batch.records} <= cut


def test_the_bank_follows_from_rows_and_configuration_alone(phantoms: tuple[Store, dict[str, tuple[Any, Any]]]) -> None:
    store, _ = phantoms

    def content(**keys: Any) -> list[tuple[str, bytes]]:
        bank = build_bank(_config(**keys), store)
        assert bank is not None
        return [(t.case, t.image_hu.tobytes()) for t in bank.tumors["liver"]]

    assert content() == content(loader__reader_threads=1) == content(loader__reader_threads=7)
    assert content() != content(seed=1)
    assert sorted(content()) == sorted(content(seed=1))


def test_the_memory_is_bounded_and_small_components_are_left_out(tmp_path: Path) -> None:
    config = _config(synthesis__bank_mb=1)
    root = create_store(tmp_path / "store.zarr", config.region)
    for number in range(6):
        label = np.ones((80, 80, 80), dtype=np.uint8)
        label[4:64, 4:64, 4:64] = 2  # 0.65 MB: one fits
        label[70, 70, 70] = 2
        image = np.full(label.shape, 50, dtype=np.int16)
        grid = ras_grid_at((80, 80, 80))
        provenance = Provenance("made by a test", "", annotation="tumor", split="train")
        write_volume(root, f"a/{number}", image, label, grid, grid, config.region, provenance)
    index.compact_index(root)
    store = open_store(root)
    bank = build_bank(config.with_overrides({"synthesis.edge_sigma_mm": 0.0}), store)
    assert bank is not None
    assert bank.num_bytes <= 1_000_000
    assert len([t for t in bank.tumors["liver"] if t.num_voxels > 1]) == 1
    large = build_bank(
        config.with_overrides({"synthesis.bank_mb": 100, "synthesis.bank_least_mm3": 30.0}), store
    )  # a voxel has 27 mm3
    assert large is not None
    assert [t.num_voxels for t in large.tumors["liver"]] == [60**3] * 6
    assert large.summary() == f"the bank holds 6 tumours (liver 6) in {large.num_bytes / 1e6:.1f} MB"
    with pytest.raises(ConfigError, match="lower bank_least_mm3 or raise bank_mb"):
        build_bank(config.with_overrides({"synthesis.bank_least_mm3": 1e9}), store)
    # nothing of the organ touches a tumour that fills its surroundings: no contrast to cut
    with pytest.raises(ConfigError, match="paste=contrast"):
        _fills_everything(tmp_path / "full", config.with_overrides({"synthesis.paste": "contrast"}))


def _fills_everything(folder: Path, config: Config) -> None:
    folder.mkdir()
    root = create_store(folder / "store.zarr", config.region)
    label = np.full((20, 20, 20), 2, dtype=np.uint8)
    grid = ras_grid_at((20, 20, 20))
    provenance = Provenance("made by a test", "", annotation="tumor", split="train")
    write_volume(root, "a/0", np.full(label.shape, 50, dtype=np.int16), label, grid, grid, config.region, provenance)
    index.compact_index(root)
    build_bank(config, open_store(root))


@pytest.mark.parametrize("shape", [(40, 70, 33), (32, 32, 32), (65, 64, 96)])
def test_components_are_those_of_the_whole_volume_wherever_chunks_cut_them(shape: IntZYX, tmp_path: Path) -> None:
    """Specks and blobs everywhere, also at chunk corners and the volume's border: each found once, whole."""
    config = _config()
    rng = np.random.default_rng(sum(shape))
    label = np.ones(shape, dtype=np.uint8)
    noise = ndi.gaussian_filter(rng.normal(size=shape), 2.0)
    label[noise > np.quantile(noise, 0.93)] = 2
    image = rng.integers(-100, 200, shape).astype(np.int16)
    root = create_store(tmp_path / "store.zarr", config.region)
    grid = ras_grid_at(shape)
    write_volume(
        root, "a/0", image, label, grid, grid, config.region, Provenance("made by a test", "", annotation="tumor")
    )
    index.compact_index(root)
    store = open_store(root)
    crops = tumors_of_row(store, 0, 2, (1, 2, 3))
    found = sorted((int(c.mask.sum()), sorted(c.image_hu[c.mask > 0].tolist())) for c in crops)
    assert found == _true_tumors(label, image)
    assert len(found) > 3
    assert tumors_of_row(store, 0, 1, (0, 0, 0))[0].value == 1
    assert tumors_of_row(store, 0, 5, (0, 0, 0)) == []


def test_a_store_without_tumors_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    config = _config()
    store = make_store(tmp_path, config, num_annotated=0, num_organs=2)
    with pytest.raises(ConfigError, match=r"no tumour to paste \(0 annotated volumes to cut from"):
        train_segmentation(config, store.path, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_volume_is_named(tmp_path: Path) -> None:
    config = _config()
    store = make_store(tmp_path, config, num_annotated=1)
    for file in (store.path / "volumes" / "a" / "0").rglob("c/0/0/0"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(StoreError, match="a/0"):
        build_bank(config, open_store(store.path))


# in the loader, in training, in pictures

PLAIN = {"synthesis.contrast_factor": (1.0, 1.0), "synthesis.edge_sigma_mm": 0.0}  # of the preset: what not all use
ARMS: dict[str, dict[str, Any]] = {
    "constant": {"synthesis.synthesizer": "constant"},
    "copy-paste": {"synthesis.synthesizer": "copy-paste", **PLAIN},
    "copy-paste, contrast": {"synthesis.synthesizer": "copy-paste", "synthesis.paste": "contrast", **PLAIN},
    "syntumor": {"synthesis.synthesizer": "syntumor", **PLAIN},
    "diverse": {"synthesis.synthesizer": "constant", **DIVERSE},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("arms"), small_config())


@pytest.mark.parametrize("arm", ARMS)
def test_training_paints_with_each_synthesiser_without_a_generator(arm: str, store: Store, tmp_path: Path) -> None:
    config = small_config(training__steps=3, device="cpu").with_overrides(ARMS[arm])
    result = train_segmentation(config, store.path, tmp_path / "run", split="train")
    assert result.steps == 3
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.quality is not None
    assert result.quality["painted"] > 0
    assert result.quality["passed"] == result.quality["painted"]
    judged = train_segmentation(config, store.path, tmp_path / "judged", judge_path=result.checkpoint)
    assert judged.quality is not None
    assert judged.quality["painted"] > 0


def test_freetumor_without_a_generator_stays_the_baseline(store: Store, tmp_path: Path) -> None:
    result = train_segmentation(small_config(training__steps=2, device="cpu"), store.path, tmp_path / "run")
    assert not result.quality
    with pytest.raises(ConfigError, match=r"choose a synthesis\.synthesizer that needs no generator"):
        train_segmentation(
            small_config(training__steps=2, device="cpu"), store.path, tmp_path / "b", judge_path=result.checkpoint
        )


@pytest.mark.parametrize("arm", ["copy-paste", "syntumor"])
def test_the_loader_paints_the_same_whatever_its_threads_and_a_pasted_tumor_is_real(arm: str, store: Store) -> None:
    batches = []
    for threads in (1, 3):
        config = small_config(device="cpu", loader__reader_threads=threads).with_overrides(ARMS[arm])
        bank = build_bank(config, store)
        with build_loader(config, store, stages=(build_synthesis_stage(config, None, None, bank=bank),)) as loader:
            batches.append(list(loader))
    for first, second in zip(*batches, strict=True):
        assert (first.image == second.image).all()
        assert repr(first.records) == repr(second.records)
    assert any(record.painted is not None for batch in batches[0] for record in batch.records)


def test_previews_show_pasted_tumors(store: Store, tmp_path: Path) -> None:
    config = small_config(device="cpu", qc__retries=0).with_overrides(ARMS["copy-paste"])
    bank = build_bank(config, store)
    sheets = preview(config, store, tmp_path, num_sheets=1, bank=bank, width_px=640)
    assert sheets[0].path.exists()
    with pytest.raises(ConfigError, match="without a tumour bank"):
        preview(config, store, tmp_path, num_sheets=1)


def test_the_torch_dataset_paints_where_no_generator_is_needed(store: Store) -> None:
    config = small_config(device="cpu").with_overrides(ARMS["copy-paste"])
    with PatchDataset(store, config) as dataset:
        painted = [patch["painted"] for patch in dataset]
    assert any(painted)
