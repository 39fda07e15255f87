"""Predict whole volumes by sliding windows, and files back onto their own grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import from_ras, ras_grid
from ftengine.store.reader import Store

if TYPE_CHECKING:
    from ftengine.volume.discover import Source


def check_trained_for(store: Store, config: Config, checkpoint: str | Path) -> None:
    """ConfigError where a checkpoint's ``config`` has other labels or another spacing than the store."""
    if store.labels != config.region.labels or store.spacing_mm_zyx != config.region.spacing_mm_zyx:
        raise ConfigError(
            f"{checkpoint}: was trained for labels {config.region.labels} at {config.region.spacing_mm_zyx} mm; {store.location} has "
            f"{store.labels} at {store.spacing_mm_zyx} mm. Use it on a store of the same region."
        )


def predict_volume(
    network: nn.Module, image_hu: NDArray[np.int16], config: Config, device: torch.device
) -> NDArray[np.uint8]:
    """Label map uint8 [z, y, x] of a volume int16 HU [z, y, x] that is RAS+ at the region's spacing.

    Sliding windows of the patch size with ``config.inference``; a volume smaller than the patch is padded with air by the windowing.
    """
    low, high = config.region.window_hu
    settings = config.inference
    unit = torch.from_numpy(np.clip((image_hu.astype(np.float32) - low) / (high - low), 0.0, 1.0))
    with torch.no_grad():
        logits = sliding_window_inference(
            unit[None, None],
            roi_size=config.region.patch_zyx,
            sw_batch_size=settings.windows_per_call,
            predictor=network.to(device).eval(),
            overlap=settings.overlap,
            mode=settings.weighting,
            sw_device=device,
            device="cpu",  # the volume's logits can be larger than the GPU's memory
        )
    assert isinstance(logits, torch.Tensor)  # noqa: S101 - one network output, not a tuple
    labels: NDArray[np.uint8] = logits.argmax(1)[0].to(torch.uint8).numpy()
    return labels


@dataclass(frozen=True)
class Prediction:
    """One predicted file: voxels of each class on the file's own grid."""

    case: str
    path: Path
    class_voxels: dict[str, int]


def prediction_path(source: "Source", out: Path) -> Path:
    """Where the prediction of a source goes: ``<out>/<name>.nii.gz``."""
    return out / f"{source.case.split('/', maxsplit=1)[1]}.nii.gz"


def check_outputs(sources: "Sequence[Source]", out: Path) -> None:
    """ConfigError where a prediction would replace one of the files that are to be predicted."""
    inputs = {file.resolve() for source in sources for file in source.files}
    for source in sources:
        path = prediction_path(source, out)
        if path.resolve() in inputs:
            raise ConfigError(
                f"{path}: is an input and would be replaced by its prediction; choose another folder for --out."
            )


def predict_file(network: nn.Module, source: "Source", out: Path, config: Config, device: torch.device) -> Prediction:
    """Predict one CT and write ``<out>/<name>.nii.gz`` (uint8) with the shape, affine and axis order of the input.

    The label map is brought back by nearest neighbour. Raises CaseError for a CT that cannot be used, ConfigError where the output
    would replace the input; nothing is left half written.
    """
    # what predicts stores alone need not have what reads CT files
    from ftengine.volume.nifti import write_nifti
    from ftengine.volume.readers import read_volume
    from ftengine.volume.resample import resample, resample_to

    check_outputs([source], out)
    if source.refusal is not None:
        raise source.refusal
    volume = read_volume(
        source.image, None, series_files=source.series_files, label_values=config.region.labels.values()
    )
    stored = resample(volume, config.region.spacing_mm_zyx)
    predicted = predict_volume(network, cast("NDArray[np.int16]", stored.image_hu), config, device)
    native_ras = ras_grid(volume.native)
    label = resample_to(predicted, stored.grid, native_ras, nearest=True, outside=0).astype(np.uint8)
    path = prediction_path(source, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, from_ras(label, volume.native), volume.native)
    counts = np.bincount(label.ravel(), minlength=config.region.num_classes)
    return Prediction(source.case, path, {name: int(counts[value]) for name, value in config.region.labels.items()})
