"""Segmentation training: the baseline S on labelled data, and the student with painted tumours (Eq. 5-6 happen in the loader)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config
from ftengine.loader.loader import Loader
from ftengine.quality.gate import QualityGate
from ftengine.training.checkpoint import Kind, load_weights
from ftengine.training.cutmix import cutmix
from ftengine.training.distributed import ALONE, World
from ftengine.training.init_weights import InitReport, load_initial_weights
from ftengine.training.learner import Learner
from ftengine.training.ledger import PatchLedger
from ftengine.training.losses import segmentation_loss
from ftengine.training.memory import explaining_memory
from ftengine.training.networks import build_segmenter
from ftengine.training.replay import NO_SOURCES, Sources
from ftengine.training.run import Progress, Schedule, TrainingResult, ignore_warning
from ftengine.training.trainer import Done, Frame, Trainer
from ftengine.training.validation import Validation
from ftengine.types import Batch


def train_segmenter(
    config: Config,
    loader: Loader,
    out: str | Path,
    *,
    device: torch.device,
    init: str | Path | None = None,
    resume: bool = False,
    on_step: Progress = lambda _step, _values: None,
    warn: Callable[[str], None] = ignore_warning,
    gate: QualityGate | None = None,
    identity: Mapping[str, str] | None = None,
    allow: Collection[str] = (),
    sources: Sources = NO_SOURCES,
    notes: Sequence[str] = (),
    validation: Validation | None = None,
    world: World = ALONE,
) -> TrainingResult:
    """Train for ``config.training.steps`` steps on the loader's batches; writes ``out/checkpoint.pt`` and, with ``validation``, ``out/best.pt``.

    init: weights to start from (``load_initial_weights``); what of them was of use goes to ``run.json`` and, where something was not, to
    ``warn``. resume: go on from ``out``, to the same losses as without the break (bit for bit on the CPU). ``gate`` counts the verdicts on
    the batches that training takes, where the loader paints; ``warn`` gets its warnings, those of the guards and the loader's. ``identity``
    names what else decides the result (painter files, split): a resumed run must be given the same, and the same configuration, but for
    what ``allow`` names (``training.resume``). sources: for replay files. notes: warnings to begin with. world: the processes of the run; the loader gives this one its
    part. Ctrl-C and SIGTERM finish the step, save and return with ``interrupted``. Raises RejectionError where the gate stops the run,
    DivergedError where a loss is no number, MemoryLimitError and SaveError. Source: FreeTumor 4.5 and Table A19: DiceCE, AdamW, warm-up and
    cosine per iteration.
    """
    frame = Frame(
        Path(out), device, resume, on_step, warn, identity or {}, allow=allow, sources=sources, notes=notes, world=world
    )
    network = build_segmenter(config)
    resumed = frame.resumed("segmenter", config, loader)
    initial: InitReport | None = None
    if resumed is not None:
        load_weights(network, resumed.path, resumed.document)
    elif init is not None:
        initial = load_initial_weights(network, init, config)
    settings = config.training
    with explaining_memory("segmenter", config, frame.out, frame.device):
        procedure = Segmentation(config, network.to(device), device, world)
    trainer = Trainer(
        config,
        procedure,
        loader,
        frame,
        Schedule.of(settings),
        resumed=resumed,
        ledger=None if gate is None else PatchLedger(config.region.tumor_values, gate),
        validation=validation,
        initial=initial,
    )
    return trainer.train()


class Segmentation:
    """The procedure: CutMix where asked, DiceCE, AdamW.

    The loss of a step is the mean over all its batches and processes, and so over all its samples: batches are equally large.
    """

    kind: Kind = "segmenter"
    main_loss = "loss"

    def __init__(self, config: Config, network: nn.Module, device: torch.device, world: World = ALONE) -> None:
        """network: on ``device``."""
        settings = config.training
        self._seed, self._cutmix_probability = config.seed, settings.cutmix_probability
        self._device, self._world = device, world
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            amsgrad=settings.amsgrad,
        )
        self.learner = Learner(
            network,
            optimizer,
            device=device,
            world=world,
            precision=settings.precision,
            clip_norm=settings.clip_norm,
            ema_decay=settings.ema_decay,
            compiled=settings.compile,
        )
        self._loss = segmentation_loss()
        self._parts: list[torch.Tensor] = []

    def add(self, batch: Batch) -> None:
        """Forward and backward of one batch of the step."""
        batch = cutmix(batch, seed=self._seed, probability=self._cutmix_probability)
        loss = self._loss(self.learner(batch.image.to(self._device)), batch.label.to(self._device))
        self.learner.backward(loss)
        self._parts.append(loss.detach())

    def update(self, rate: float) -> Done:
        """Step with the mean of the gradients of all batches and processes."""
        count = len(self._parts) * self._world.size
        self.learner.update(rate, divide_by=float(count))
        total, self._parts = torch.stack(self._parts).sum(), []
        loss = total * self._world.size / count  # of this process
        return Done({"loss": loss}, lambda: {"loss": float(self._world.sum(total)) / count})

    def samples(self) -> dict[str, list[float]]:
        """Nothing."""
        return {}

    @property
    def product(self) -> nn.Module:
        """S or the student."""
        return self.learner.product

    def spread(self) -> None:
        """Give every process the weights of rank 0."""
        self.learner.spread()

    def contents(self) -> dict[str, Any]:
        """Weights, optimiser, loss scale, moving average."""
        return {"model": self.product.state_dict(), "learners": {"segmenter": self.learner.state_dict()}}

    def load_contents(self, document: Mapping[str, Any]) -> None:
        """Go on where ``contents`` was taken."""
        self.learner.load_state_dict(document["learners"]["segmenter"])
