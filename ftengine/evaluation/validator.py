"""Validation during training, with the figures of ``ftengine evaluate``."""

import torch
from torch import nn

from ftengine.config import Config
from ftengine.errors import CaseError, ConfigError, DivergedError
from ftengine.evaluation.metrics import score_case
from ftengine.prediction.infer import predict_volume
from ftengine.store.folds import cases_of_kind
from ftengine.store.reader import Store
from ftengine.training.validation import Validation


def build_validation(
    config: Config, store: Store, *, device: torch.device, split: str | None = None, fold: int | None = None
) -> Validation:
    """Validation on the tumour-annotated volumes of a split or a fold: sliding windows with ``config.inference``, as ``ftengine predict``.

    A volume's score is the Dice of each tumour class that its truth holds; a network that gives NaN or infinity for one has none, and is a
    DivergedError. Raises ConfigError where no volume is left.
    """
    cases = cases_of_kind(store, "tumor", split, fold)
    if not cases:
        where = f"split {split!r}" if split is not None else f"fold {fold}"
        raise ConfigError(
            f"{store.location}: {where} holds no tumour-annotated volume to validate on. Choose another, or leave validation out."
        )
    tumors = {name: value for name, value in config.region.labels.items() if value in config.region.tumor_values}

    def score(network: nn.Module, case: str) -> dict[str, float]:
        patch = store.read_volume(case)
        try:
            predicted = predict_volume(network, patch.image, config, device, case=case)
        except CaseError as error:
            raise DivergedError(f"validation: {error} The last checkpoint, if there is one, is kept.") from error
        scored = score_case(case, predicted, patch.label, tumors).classes
        return {
            name: of_class.dice
            for name, of_class in scored.items()
            if of_class.truth_voxels and of_class.dice is not None
        }

    return Validation(cases, score)
