"""Where figures go: TensorBoard always at hand, MLflow and Weights & Biases for real where they are installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftengine.assemble import train_segmentation
from ftengine.errors import ConfigError
from ftengine.training import trackers
from ftengine.training.run import Run, read_metrics
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=3, device="cpu")
PICTURE = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)


def test_tensorboard_has_the_configuration_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run", CONFIG, resume=False)
    run.begin(0)
    run.log(0, {"loss": 1.5})
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    run.show_pictures(0, [tmp_path / "picture.png"])
    run.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert board.Tags()["images"] == ["painted/0"]
    assert (board.Images("painted/0")[0].width, board.Images("painted/0")[0].height) == (12, 8)
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate" in text
    assert [event.value for event in board.Scalars("loss")] == [1.5]


def test_no_tracker_is_a_choice_too(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG)
    train_segmentation(CONFIG.with_overrides({"tracking.use": []}), store.path, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    store = make_store(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=rf"tracking\.use names {name}.*pip install 'ftengine\[{name}\]'"):
        train_segmentation(CONFIG.with_overrides({"tracking.use": [name]}), store.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed: pip install 'ftengine[mlflow]'")
@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_gets_figures_configuration_and_pictures_and_one_run_for_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient  # type: ignore[import-not-found,unused-ignore]  # an extra

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # artifacts of a sqlite store lie in ./mlruns
    config = CONFIG.with_overrides(
        {"tracking.use": ["mlflow"], "tracking.project": "tumours", "training.checkpoint_every": 1}
    )
    store = make_store(tmp_path, config)
    train_segmentation(config, store.path, tmp_path / "run")
    longer = config.with_overrides({"training.steps": 5})
    train_segmentation(longer, store.path, tmp_path / "run", resume=True, allow=["training.steps"])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tumours")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in losses) == [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "run")]
    tracker = trackers.MLflow(tmp_path / "run", config)
    tracker.image(1, "patches/0", PICTURE)
    tracker.close()
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"config.yaml"}


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install 'ftengine[wandb]'")
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_gets_figures_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = CONFIG.with_overrides({"tracking.use": ["wandb", "tensorboard"], "tracking.project": "tumours"})
    store = make_store(tmp_path, config)
    train_segmentation(config, store.path, tmp_path / "run")
    assert (tmp_path / "run" / "wandb-run.txt").read_text().strip()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    data = file.read_bytes()
    assert b"learning_rate" in data
