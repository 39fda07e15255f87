"""Where a run shows its figures while it goes: TensorBoard beside the run, and MLflow or Weights & Biases by their extras."""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.writer import SummaryWriter

from ftengine.config import Config
from ftengine.errors import ConfigError

_EXTRAS = {"mlflow": "mlflow", "wandb": "wandb"}  # module to import, extra that brings it


class Tracker(Protocol):
    """One place that figures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, by name."""
        ...

    def histogram(self, step: int, name: str, numbers: Sequence[float]) -> None:
        """Show how numbers are distributed."""
        ...

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture: uint8 [rows, columns, 3]."""
        ...

    def close(self) -> None:
        """Flush, and end the run there."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``, with the configuration as text."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._board.add_text("config", "".join(f"    {line}\n" for line in config.to_yaml().splitlines()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, by name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, numbers: Sequence[float]) -> None:
        """Show how numbers are distributed."""
        self._board.add_histogram(name, np.asarray(numbers), step)

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture: uint8 [rows, columns, 3]."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush."""
        self._board.close()


class MLflow:
    """A run of the experiment ``tracking.project`` at the server that MLFLOW_TRACKING_URI names, else in ``RUN/mlflow.db``.

    A resumed run goes on in the same run of MLflow: its id is in ``RUN/mlflow-run.txt``. Pictures and the configuration are artifacts.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.environment_variables import MLFLOW_TRACKING_URI

        uri = MLFLOW_TRACKING_URI.get() or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        name = config.tracking.project
        known = self._client.get_experiment_by_name(name)
        artifacts = None if MLFLOW_TRACKING_URI.get() else (folder / "mlflow-artifacts").resolve().as_uri()
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name, artifacts)
        note = folder / "mlflow-run.txt"
        if note.exists():
            self._run: str = note.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            note.write_text(self._run + "\n", encoding="utf-8")
        self._client.log_text(self._run, config.to_yaml(), "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, by name; MLflow's names have no ``+`` and the like, ours are kept where they can be."""
        from mlflow.entities import Metric

        stamp = _milliseconds()
        metrics = [Metric(_plain_name(name), float(value), stamp, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def histogram(self, step: int, name: str, numbers: Sequence[float]) -> None:
        """Show how numbers are distributed."""
        counts = np.histogram(numbers, bins=10)[0]  # MLflow knows no histograms
        self.scalars(step, {f"{name}/{tenth + 1}_of_10": float(count) for tenth, count in enumerate(counts)})

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture: uint8 [rows, columns, 3]."""
        self._client.log_image(self._run, picture, key=_plain_name(name).replace("/", "."), step=step)

    def close(self) -> None:
        """End the run there."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of the project ``tracking.project``; WANDB_MODE=offline keeps it in ``RUN/wandb``."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        note = folder / "wandb-run.txt"
        known = note.read_text(encoding="utf-8").strip() if note.exists() else None
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            id=known,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        note.write_text(f"{self._run.id}\n", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, by name."""
        self._run.log({"step": step, **values})

    def histogram(self, step: int, name: str, numbers: Sequence[float]) -> None:
        """Show how numbers are distributed."""
        self._run.log({"step": step, name: self._wandb.Histogram(list(numbers))})

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture: uint8 [rows, columns, 3]."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        """Flush, and end the run there."""
        self._run.finish()


def check_trackers(config: Config) -> None:
    """ConfigError where a tracker's extra is not installed; called before a run writes anything."""
    for name in config.tracking.use:
        if name in _EXTRAS and find_spec(name) is None:
            raise ConfigError(
                f"tracking.use names {name}, which is not installed here. Install it with: pip install 'ftengine[{_EXTRAS[name]}]', or take it out."
            )


def open_trackers(folder: Path, config: Config) -> list[Tracker]:
    """The trackers that ``tracking.use`` names, for the run in ``folder``, which exists."""
    check_trackers(config)
    makers: dict[str, Callable[[Path, Config], Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
        "wandb": WandB,
    }
    return [makers[name](folder, config) for name in dict.fromkeys(config.tracking.use)]


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, by name."""
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def histogram(self, step: int, name: str, numbers: Sequence[float]) -> None:
        """Show how numbers are distributed."""
        for tracker in self._trackers:
            tracker.histogram(step, name, numbers)

    def image(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture: uint8 [rows, columns, 3]."""
        for tracker in self._trackers:
            tracker.image(step, name, picture)

    def close(self) -> None:
        """Flush all."""
        for tracker in self._trackers:
            tracker.close()


def _plain_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _milliseconds() -> int:
    return int(time.time() * 1000)
