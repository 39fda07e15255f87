"""What tests of training share: gradients as updates see them, batches made by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

from ftengine.geometry import Box, int_zyx
from ftengine.training.learner import Learner
from ftengine.types import Augmentation, Batch, PatchRecord, PatchRequest

Gradients: TypeAlias = dict[str, torch.Tensor]


@contextmanager
def recorded() -> Iterator[list[Gradients]]:
    """Inside the block, the gradients that each update of a ``Learner`` steps with, in order."""
    update, gradients = Learner.update, list[Gradients]()

    def spy(learner: Learner, rate: float, *, divide_by: torch.Tensor | float = 1.0) -> None:
        step = learner.optimizer.step

        def keep() -> None:
            named = learner.network.named_parameters()
            gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            step()

        learner.optimizer.step = keep  # type: ignore[method-assign,assignment]  # for this call
        update(learner, rate, divide_by=divide_by)
        learner.optimizer.step = step  # type: ignore[method-assign]

    Learner.update = spy  # type: ignore[method-assign,assignment]
    try:
        yield gradients
    finally:
        Learner.update = update  # type: ignore[method-assign]


def assert_alike(gradients: Sequence[Gradients], joint: Sequence[Gradients]) -> None:
    """Equal to 1e-5 of the network's largest gradient, update by update."""
    assert len(gradients) == len(joint) > 0
    for got, want in zip(gradients, joint, strict=True):
        assert set(got) == set(want)
        scale = max(float(g.abs().max()) for g in want.values())
        assert scale > 0
        for name, gradient in want.items():
            assert float((got[name] - gradient).abs().max()) < 1e-5 * scale, name


def hand_made(image: torch.Tensor, label: torch.Tensor, *, epoch: int = 0, first_index: int = 0) -> Batch:
    """A batch of patches with addresses that follow one another. image, label: as in ``Batch``."""
    box = Box((0, 0, 0), int_zyx(image.shape[2:]))
    records = [
        PatchRecord(
            PatchRequest(
                epoch, first_index + n, n, f"a/{n}", "a", annotated=True, box=box, augmentation=Augmentation(), read=box
            )
        )
        for n in range(len(image))
    ]
    return Batch(image, label, records)


def part(batch: Batch, first: int, last: int) -> Batch:
    """Some patches of a batch."""
    return Batch(batch.image[first:last], batch.label[first:last], batch.records[first:last])
