"""The programs of docs/examples run for a few steps, and the Python of docs/adapters.md runs as pasted."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ftengine.config import Config
from ftengine.store import index
from ftengine.store.reader import Store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import build_generator, build_segmenter
from tests.recipes import save_nifti
from tests.support import make_store, organ_volume, ras_grid_at, small_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CONFIG = small_config(device="cpu", loader__patches_per_epoch=4)
RAS_3_MM = np.diag([3.0, 3.0, 3.0, 1.0])


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _save_cases(images: Path, labels: Path, count: int, *, suffix: str = "") -> None:
    """Phantoms of 40 x 44 x 48 voxels of 3 mm, RAS+, every second one with a tumour."""
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(count):
        image, label = organ_volume((40, 44, 48), tumor=number % 2 == 0, seed=number)
        save_nifti(images / f"case_{number}{suffix}.nii.gz", image, RAS_3_MM)
        save_nifti(labels / f"case_{number}.nii.gz", label, RAS_3_MM)


def _save_abdomen_store(path: Path, config: Config) -> None:
    """Two volumes with a liver tumour and two without one, each with all organs of the abdomen."""
    root = create_store(path, config.region)
    for number in range(4):
        image, label = organ_volume((100, 100, 100), tumor=number % 2 == 0, seed=number)
        label[:10, :10, :10], label[-10:, :10, :10] = 3, 5
        grid = ras_grid_at((100, 100, 100), 1.5)
        kind = "tumor" if number % 2 == 0 else "organ"
        provenance = Provenance("made by a test", "", annotation=kind, split="train")
        write_volume(root, f"d/{number}", image, label, grid, grid, config.region, provenance)
    index.compact_index(root)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("examples"), CONFIG)


def test_monai_training(store: Store, painters: tuple[Path, Path]) -> None:
    train = _load("monai_training").train
    torch.manual_seed(0)
    losses = train(store.path, CONFIG.with_overrides({"augment.flip_probability": 0.0}), 12)
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert len(train(store.path, CONFIG, 1, *map(str, painters))) == 1


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")  # LoadImaged registers every reader
def test_monai_transform(tmp_path: Path, painters: tuple[Path, Path]) -> None:
    _save_cases(tmp_path / "images", tmp_path / "labels", 4)
    files = [{key: tmp_path / f"{key}s" / f"case_{n}.nii.gz" for key in ("image", "label")} for n in range(4)]
    example = _load("monai_transform")
    config = CONFIG.with_overrides({"qc.threshold": None})
    batches = list(example.batches(files, config, generator=painters[0], judge=painters[1]))
    assert len(batches) == 4
    for batch in batches:
        assert batch["image"].shape == (2, 1, 16, 16, 16)
        assert 0 <= float(batch["image"].min()) <= float(batch["image"].max())
    passed = torch.cat([batch["synthesis"]["passed"] for batch in batches])
    assert 0 < int(passed.sum()) < 8
    for batch in batches:
        holds_tumour = (batch["label"] == 2).flatten(1).any(1)
        assert bool(holds_tumour[batch["synthesis"]["passed"]].all())
    again = list(example.batches(files, config, generator=painters[0], judge=painters[1]))
    assert all(torch.equal(a["image"].as_tensor(), b["image"].as_tensor()) for a, b in zip(batches, again, strict=True))


_SHORT = """
from nnunet_trainer import FtengineTrainer

class ShortFtengineTrainer(FtengineTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 2
"""


def test_nnunet_trainer(tmp_path: Path, store: Store) -> None:
    """nnU-Net's own programs: plan, preprocess, three steps of training, validation, prediction of its fold."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed; want 'pip install nnunetv2' (2.8)")
    raw = tmp_path / "raw" / "Dataset001_Phantom"
    _save_cases(raw / "imagesTr", raw / "labelsTr", 5, suffix="_0000")
    document = {
        "channel_names": {"0": "CT"},
        "labels": CONFIG.region.labels,
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    (raw / "dataset.json").write_text(json.dumps(document))
    extension = tmp_path / "trainers"
    extension.mkdir()
    shutil.copy(EXAMPLES / "nnunet_trainer.py", extension)
    (extension / "short.py").write_text(_SHORT)
    (tmp_path / "config.yaml").write_text(CONFIG.with_overrides({"augment.rot90_probability": 0.0}).to_yaml())
    environment = os.environ | {
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_extTrainer": str(extension),
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "1",
        "FTENGINE_STORE": str(store.path),
        "FTENGINE_VALIDATION_STORE": str(store.path),
        "FTENGINE_CONFIG": str(tmp_path / "config.yaml"),
    }
    commands = Path(sys.executable).parent
    plan = "nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres -np 1 -npfp 1 -overwrite_target_spacing 3 3 3"
    for line in (plan, "nnUNetv2_train 1 3d_fullres 0 -tr ShortFtengineTrainer -device cpu"):
        name, *arguments = line.split()
        done = subprocess.run(
            [commands / name, *arguments], env=environment, capture_output=True, text=True, timeout=550, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    fold = tmp_path / "results/Dataset001_Phantom/ShortFtengineTrainer__nnUNetPlans__3d_fullres/fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    log = next(fold.glob("training_log_*.txt")).read_text()
    losses = [float(number) for number in re.findall(r"(?:train|val)_loss (-?[\d.]+)", log)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (fold / "validation" / "summary.json").is_file()


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
def test_the_blocks_of_the_documentation_run_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On phantoms at the abdomen's own spacing, patch and labels, with small networks."""
    small = {"network.name": "unet", "network.channels": (4, 8), "generator.width": 4}
    config = Config.preset("abdomen").with_overrides(small)
    monkeypatch.chdir(tmp_path)
    generator, segmenter = build_generator(config), build_segmenter(config)
    save_checkpoint(tmp_path / "G.pt", "generator", config, {"model": generator.state_dict()})
    save_checkpoint(tmp_path / "S.pt", "segmenter", config, {"model": segmenter.state_dict()})
    _save_abdomen_store(tmp_path / "train.zarr", config)
    image, label = organ_volume((60, 64, 68), tumor=False, seed=0)
    grid = np.diag([-2.5, 2.5, 2.5, 1.0])
    save_nifti(tmp_path / "ct.nii.gz", image, grid)
    save_nifti(tmp_path / "label.nii.gz", label, grid)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/adapters.md", "exec"), {})  # noqa: S102 - the text under test
    said = capsys.readouterr().out
    assert said.count("'painted': True") >= 1
    assert said.count("'painted':") == 2
    assert said.count("(2, 1, 96, 96, 96)") == 4
