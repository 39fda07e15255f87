"""Synthesis training: G against the frozen segmenter S and the classifier C (Eq. 1-3)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config, GeneratorTrainingConfig
from ftengine.loader.loader import Loader
from ftengine.quality.gate import tenth_figures
from ftengine.quality.judge import SegmenterJudge
from ftengine.synthesis.engine import Address, Placement, Synthesizer
from ftengine.synthesis.painting import take_rows
from ftengine.training.checkpoint import Kind, load_weights
from ftengine.training.distributed import ALONE, World
from ftengine.training.guards import contrast_figures
from ftengine.training.learner import Learner, autocast, compiled_forward
from ftengine.training.losses import PAINTED, REAL, Form, Total, classified_as_loss, tumor_seen_loss
from ftengine.training.memory import explaining_memory
from ftengine.training.networks import build_classifier, build_generator
from ftengine.training.replay import NO_SOURCES, Sources
from ftengine.training.run import Progress, Schedule, TrainingResult, ignore_warning
from ftengine.training.trainer import Done, Frame, Pictures, Trainer
from ftengine.types import Batch


def train_generator(
    config: Config,
    loader: Loader,
    segmenter: nn.Module,
    out: str | Path,
    *,
    device: torch.device,
    resume: bool = False,
    on_step: Progress = lambda _step, _values: None,
    identity: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = ignore_warning,
    allow: Collection[str] = (),
    sources: Sources = NO_SOURCES,
    notes: Sequence[str] = (),
    pictures: Pictures | None = None,
    world: World = ALONE,
) -> TrainingResult:
    """Train G and C for ``config.generator_training.steps`` steps; writes ``out/checkpoint.pt`` with both.

    ``identity``, ``allow``, ``sources``, ``notes`` and ``world``: as in ``train_segmenter``; ``warn`` gets the warnings of the guards and the loader.
    pictures: draws G's work into a folder every ``generator_training.pictures_every`` steps.
    """
    frame = Frame(
        Path(out), device, resume, on_step, warn, identity or {}, allow=allow, sources=sources, notes=notes, world=world
    )
    generator, classifier = build_generator(config), build_classifier(config)
    resumed = frame.resumed("generator", config, loader)
    if resumed is not None:
        load_weights(generator, resumed.path, resumed.document)
        load_weights(classifier, resumed.path, {"model": resumed.document["classifier"]})
    settings = config.generator_training
    with explaining_memory("generator", config, frame.out, frame.device):
        networks = (generator.to(device), classifier.to(device), segmenter.to(device))
        procedure = Adversarial(config, *networks, device, world)
    trainer = Trainer(
        config,
        procedure,
        loader,
        frame,
        Schedule.of(settings, kind=settings.schedule),
        resumed=resumed,
        pictures=pictures,
        pictures_every=settings.pictures_every,
    )
    return trainer.train()


@dataclass
class _Given:
    """What C's phase gets of a batch: patches with real tumours and their voxels, painted patches (detached) and their masks."""

    real_image: torch.Tensor
    real_mask: torch.Tensor
    painted: torch.Tensor | None = None
    painted_mask: torch.Tensor | None = None


@dataclass
class _Sums:
    """Sums over the samples of the batches of a step, without gradients, on the device; None before the first."""

    totals: dict[str, Total] = field(default_factory=dict)

    def add(self, name: str, value: Total) -> None:
        """Count the samples of a batch."""
        total, count = value.total.detach(), value.count
        before = self.totals.get(name)
        self.totals[name] = Total(total, count) if before is None else Total(before.total + total, before.count + count)


def main_loss_of(settings: GeneratorTrainingConfig) -> str:
    """Name of the figure that stands for a run: the loss of Eq. 2, or L_cls of Eq. 3 where that is trained alone."""
    return "loss_fools" if settings.losses == "fools" else "loss_seen"


class Adversarial:
    """The procedure: two phases a step.

    (1) G paints the eligible patches; S and C are frozen (no weight of theirs gets a gradient) but pass gradients to the painted image; G
    minimises Eq. 2 + lambda_cls L_cls. (2) C learns to tell real tumours of the same batches from the painted ones, which are detached.
    Labels of all organs are told apart by the region's table in both phases. A step without an eligible patch trains C on its real tumours
    only. Means are over the samples of all batches of the step and all processes.
    """

    kind: Kind = "generator"
    main_loss = "loss_seen"

    def __init__(
        self,
        config: Config,
        generator: nn.Module,
        classifier: nn.Module,
        segmenter: nn.Module,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        """The networks are on ``device``; S is set to eval mode and frozen."""
        settings = config.generator_training
        self._settings, self._region, self._device, self._world = settings, config.region, device, world
        self.generator = self._learner(generator, ema_decay=settings.ema_decay)
        self.classifier = self._learner(classifier, ema_decay=None)
        self.main_loss = main_loss_of(settings)
        segmenter.eval().requires_grad_(requires_grad=False)
        self._segmenter = compiled_forward(segmenter, compiled=settings.compile)
        released = config.synthesis.variant == "released"
        self._judge = SegmenterJudge(self._see, config.qc, config.region, any_tumor=released, strict=released)
        self._synthesizer = Synthesizer(config.region, config.synthesis, seed=config.seed, generator=self.generator)
        self._given: list[_Given] = []
        self._sums = _Sums()
        self._contrast: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each batch of the step: G before tanh, masks
        self._num_drawn = 0
        self._proportions: list[torch.Tensor] = []  # P and verdict of each painted patch since the last log line
        self._since_log: list[float] = []

    def _learner(self, network: nn.Module, *, ema_decay: float | None) -> Learner:
        settings = self._settings
        return Learner(
            network,
            _optimizer(network, settings),
            device=self._device,
            world=self._world,
            precision=settings.precision,
            clip_norm=settings.clip_norm,
            ema_decay=ema_decay,
            compiled=settings.compile,
        )

    def _see(self, image: torch.Tensor) -> torch.Tensor:
        """S: logits, float32."""
        with autocast(self._device, self._settings.precision):
            logits: torch.Tensor = self._segmenter(image)
        return logits.float()

    # ---- a step ----

    def add(self, batch: Batch) -> None:
        """Paint a batch, and G's gradients on it; what C needs of it is kept for the second phase."""
        image, label = batch.image.to(self._device), batch.label.to(self._device)
        drawn = self._synthesizer.draw(
            label,
            [Address(r.request.epoch, r.request.index) for r in batch.records],
            label_voxels=[r.label_voxels for r in batch.records],
        )
        given = self._real_tumors(image, label)
        if drawn:
            placement = self._synthesizer.place(label, drawn)
            given.painted = self._generator_phase(take_rows(image, placement.rows), placement)
            given.painted_mask = placement.mask
        self._num_drawn += len(drawn)
        self._given.append(given)

    def update(self, rate: float) -> Done:
        """Update G with the gradients of all batches, then C."""
        given, self._given = self._given, []
        sums, self._sums = self._sums, _Sums()
        contrast, self._contrast = self._contrast, []
        num_drawn, self._num_drawn = self._num_drawn, 0
        counts = self._world.gather((num_drawn, sum(len(g.real_image) for g in given)))
        num_drawn, num_real = (sum(n) for n in zip(*counts, strict=True))
        if num_drawn:
            self.generator.update(rate, divide_by=self._over_processes(sums, "used").count.clamp(min=1.0))
        if self._settings.losses != "seen":
            self._classifier_phase(given, sums, rate, has_real=num_real > 0, has_painted=num_drawn > 0)
        losses = {name: total.mean() for name, total in sums.totals.items() if name != "used"}
        return Done(losses, lambda: self._figures(sums, contrast))

    def _generator_phase(self, x: torch.Tensor, placement: Placement) -> torch.Tensor:
        """Eq. 1, then the gradients of Eq. 2 + lambda_cls L_cls with respect to G; returns the painted patches, detached."""
        settings = self._settings
        values = [self._region.organs[d.organ].tumor for d in placement.draws]
        with frozen(self.classifier.network):
            g = self._synthesizer.difference(x, placement)
            self._contrast.append((g.detach(), placement.mask))
            painted = self._synthesizer.blend(x[:, 0], g, placement)
            seen, fools = self._losses_of_generator(painted.unsqueeze(1), placement.mask, values)
            loss = sum(
                weight * part.total
                for weight, part in ((1.0, seen), (1.0 if settings.losses == "fools" else settings.lambda_cls, fools))
                if part is not None
            )
            assert isinstance(loss, torch.Tensor)  # noqa: S101 - at least one of the two is on
            self.generator.backward(loss)
        for name, part in (("seen", seen), ("fools", fools), ("used", fools if seen is None else seen)):
            if part is not None:
                self._sums.add(name, part)
        return painted.detach()

    def _losses_of_generator(
        self, painted: torch.Tensor, mask: torch.Tensor, values: Sequence[int]
    ) -> tuple[Total | None, Total | None]:
        settings = self._settings
        seen = fools = None
        with torch.set_grad_enabled(settings.losses != "fools"):
            logits = self._see(painted)
        with torch.no_grad():
            self._proportions.append(torch.stack([p.float() for p in self._judge.verdict(logits, mask, values)], dim=1))
        if settings.losses != "fools":
            seen = tumor_seen_loss(
                logits, mask, values, form=settings.loss_form, all_tumor_values=self._region.tumor_values
            )
        if settings.losses != "seen":
            fools = classified_as_loss(self.classifier(painted), mask, REAL, form=settings.loss_form)
        return seen, fools

    def _real_tumors(self, image: torch.Tensor, label: torch.Tensor) -> _Given:
        values = torch.tensor(self._region.tumor_values, dtype=label.dtype, device=label.device)
        real = torch.isin(label[:, 0], values)
        rows = [row for row, has in enumerate(real.flatten(1).any(1).tolist()) if has]
        return _Given(image[rows], real[rows])

    def _classifier_phase(
        self, given: Sequence[_Given], sums: _Sums, rate: float, *, has_real: bool, has_painted: bool
    ) -> None:
        """C's own gradients: the mean of the two L_cls that the step has samples for."""
        num_terms = has_real + has_painted
        if not num_terms:
            return
        form = self._settings.loss_form
        whole = {
            "real": self._num_counted([g.real_mask for g in given], form),
            "painted": self._num_counted([g.painted_mask for g in given], form),
        }
        for g in given:
            terms: list[torch.Tensor] = []
            if len(g.real_image):
                real = classified_as_loss(self.classifier(g.real_image), g.real_mask, REAL, form=form)
                terms.append(real.total / whole["real"])
                sums.add("real", real)
            if g.painted is not None and g.painted_mask is not None:
                painted = classified_as_loss(
                    self.classifier(g.painted.unsqueeze(1)), g.painted_mask, PAINTED, form=form
                )
                terms.append(painted.total / whole["painted"])
                sums.add("painted", painted)
            if terms:
                self.classifier.backward(torch.stack(terms).sum() / num_terms)
        self.classifier.update(rate)

    def _num_counted(self, masks: Sequence[torch.Tensor | None], form: Form) -> torch.Tensor:
        """Samples (paper) or voxels (released) of all processes that a loss counts, at least 1."""
        count = torch.zeros((), device=self._device)
        for mask in masks:
            if mask is not None and len(mask):
                sizes = mask.flatten(1).sum(1)
                count += sizes.sum() if form == "released" else (sizes > 0).sum()
        return self._world.sum(count).clamp(min=1.0)

    def _over_processes(self, sums: _Sums, name: str) -> Total:
        """A sum over all processes; 0 where there is none."""
        zero = torch.zeros((), device=self._device)
        total = sums.totals.get(name, Total(zero, zero))
        both = self._world.sum(torch.stack([total.total, total.count]))
        return Total(both[0], both[1])

    # ---- what is reported ----

    def _figures(self, sums: _Sums, contrast: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Losses and contrast of the step, and of all patches painted since the last log line the pass rate and the tenths of P."""
        means: dict[str, float] = {}
        for name in ("seen", "fools", "real", "painted"):
            whole = self._over_processes(sums, name)
            if float(whole.count) > 0:
                means[name] = float(whole.mean())
        values = {f"loss_{name}": means[name] for name in ("seen", "fools") if name in means}
        of_classifier = [means[name] for name in ("real", "painted") if name in means]
        if of_classifier:
            values["loss_classifier"] = sum(of_classifier) / len(of_classifier)
        values |= contrast_figures(contrast, device=self._device, total=self._world.sum)
        mine = torch.cat(self._proportions).tolist() if self._proportions else []
        self._proportions = []
        judged = [verdict for part in self._world.gather(mine) for verdict in part if not math.isnan(verdict[0])]
        self._since_log = [p for p, _ in judged]
        if judged:
            values["proportion"] = sum(self._since_log) / len(judged)
            values["qc/pass_rate"] = sum(passed for _, passed in judged) / len(judged)
            values |= tenth_figures(self._since_log)
        return values

    def samples(self) -> dict[str, list[float]]:
        """P of all patches painted since the last log line."""
        proportions, self._since_log = self._since_log, []
        return {"qc/p": proportions} if proportions else {}

    # ---- what is kept ----

    @property
    def product(self) -> nn.Module:
        """G."""
        return self.generator.product

    def spread(self) -> None:
        """Give every process the weights of rank 0."""
        self.generator.spread()
        self.classifier.spread()

    def contents(self) -> dict[str, Any]:
        """Weights of G and C, optimisers, loss scales, moving average."""
        return {
            "model": self.product.state_dict(),
            "classifier": self.classifier.product.state_dict(),
            "judged": torch.cat(self._proportions).tolist() if self._proportions else [],
            "learners": {"generator": self.generator.state_dict(), "classifier": self.classifier.state_dict()},
        }

    def load_contents(self, document: Mapping[str, Any]) -> None:
        """Go on where ``contents`` was taken."""
        self._proportions = [torch.tensor(document["judged"], device=self._device)] if document["judged"] else []
        self.generator.load_state_dict(document["learners"]["generator"])
        self.classifier.load_state_dict(document["learners"]["classifier"])


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside the block no weight of the network gets a gradient; gradients pass through it."""
    network.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        network.requires_grad_(requires_grad=True)


def _optimizer(network: nn.Module, settings: GeneratorTrainingConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        network.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
