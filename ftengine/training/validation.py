"""Validation while training: volumes are shared out over the processes, each scored whole by sliding windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from ftengine.training.distributed import World

# network and case -> Dice of each tumour class that the volume's truth holds
Score = Callable[[nn.Module, str], Mapping[str, float]]
DICE = "dice"


@dataclass(frozen=True)
class Validation:
    """What is validated on. The volumes are never trained on; ``score`` may use the device of training."""

    cases: Sequence[str]
    score: Score


def validate(validation: Validation, network: nn.Module, world: World) -> dict[str, float]:
    """``dice/CLASS``, the mean over the volumes that hold the class, and ``dice``, the mean over classes. The same on every rank.

    A class that no volume holds is left out; without any, ``dice`` is 0, as in the released code.
    """
    with _evaluating(network):
        mine = {case: dict(validation.score(network, case)) for case in validation.cases[world.rank :: world.size]}
    scores: dict[str, Mapping[str, float]] = {}
    for part in world.gather(mine):
        scores.update(part)
    by_class: dict[str, list[float]] = {}
    for case in validation.cases:  # in one order, so that sums have the same bits for any number of processes
        for name, dice in scores[case].items():
            by_class.setdefault(name, []).append(dice)
    means = {name: float(np.mean(dice)) for name, dice in sorted(by_class.items())}
    whole = float(np.mean(list(means.values()))) if means else 0.0
    return {DICE: whole, **{f"{DICE}/{name}": mean for name, mean in means.items()}}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
