"""Synthesis training: G against the frozen segmenter S and the classifier C (Eq. 1-3)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config
from ftengine.loader.loader import Loader
from ftengine.synthesis.engine import Address, Placement, Synthesizer
from ftengine.synthesis.painting import take_rows
from ftengine.training.checkpoint import (
    WEIGHTS,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from ftengine.training.guards import Guards, contrast_figures
from ftengine.training.losses import PAINTED, REAL, classified_as_loss, tumor_seen_loss
from ftengine.training.memory import explaining_memory
from ftengine.training.networks import build_classifier, build_generator
from ftengine.training.replay import Sources
from ftengine.training.resume import Change, check_changes, loader_state, resume_notes, run_details
from ftengine.training.run import (
    CHECKPOINT,
    Progress,
    Run,
    TrainingResult,
    ignore_warning,
    learning_rate,
    run_steps,
)
from ftengine.types import Batch


@dataclass(frozen=True)
class _Losses:
    """The figures of one step, still on the device; NaN where the batch had nothing for that loss."""

    seen: torch.Tensor | float = float("nan")  # Eq. 2
    fools: torch.Tensor | float = float("nan")  # L_cls of G's phase
    classifier: torch.Tensor | float = float("nan")  # L_cls of C's phase
    proportion: torch.Tensor | float = float(
        "nan"
    )  # Eq. 4 pooled over the batch: how much of the painted tumours S sees

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that this batch had."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}


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
    sources: Sources | None = None,
) -> TrainingResult:
    """Train G and C for ``config.generator_training.steps`` steps; writes ``out/checkpoint.pt`` with both.

    Phases of a step: (1) G paints the eligible patches; S and C are frozen (no weight of theirs gets a gradient) but pass gradients to
    the painted image; G minimises Eq. 2 + lambda_cls L_cls. (2) C learns to tell real tumours of the batch from the painted ones, which
    are detached. A batch without an eligible patch trains C on its real tumours only. ``identity``, ``allow`` and ``sources``: as in
    ``train_segmenter``; ``warn`` gets the warnings of the loader and the guards.
    """
    settings = config.generator_training
    generator, classifier = build_generator(config), build_classifier(config)
    document: dict[str, Any] | None = None
    changes: tuple[Change, ...] = ()
    if resume:
        path = Path(out) / CHECKPOINT
        document = load_checkpoint(path, "generator")
        changes = check_changes(
            path, document, kind="generator", config=config, loader=loader, identity=identity or {}, allow=allow
        )
        load_weights(generator, path, document)
        load_weights(classifier, path, {"model": document["classifier"]})
    run = Run(out, config, resume=resume)
    generator.to(device).train()
    classifier.to(device).train()
    segmenter.to(device).eval().requires_grad_(requires_grad=False)
    optimizers = [
        torch.optim.AdamW(
            net.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        for net in (generator, classifier)
    ]
    first_step = 0
    losses: list[float] = []
    guards = Guards(
        "generator",
        config,
        run.folder,
        checkpoint=run.checkpoint,
        sources=sources,
        warn=warn,
        main_loss="loss_seen",
    )
    if document is not None:
        for optimizer, state in zip(optimizers, document["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        guards.load_state_dict(document.get("guards"))
        loader.load_state_dict(loader_state(document, loader, changes))
        first_step, losses = document["step"], list(document["losses"])
        for note in resume_notes(document, changes):
            warn(note)
    run.begin(first_step, run_details(run.folder, identity or {}, document, changes))
    trainer = _AdversarialStep(config, generator, classifier, segmenter, optimizers[0], optimizers[1])

    def train_step(batch: Batch, step: int) -> Callable[[], dict[str, float]]:
        rate = learning_rate(
            step, base=settings.learning_rate, warmup_steps=settings.warmup_steps, steps=settings.steps
        )
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = rate
        done = trainer(batch, device)
        guards.arrived(batch)
        guards.step(step, done.tensors())

        def figures() -> dict[str, float]:
            guards.check()
            losses.append(float(done.seen))
            return {
                "loss_seen": losses[-1],
                "loss_fools": float(done.fools),
                "loss_classifier": float(done.classifier),
                "proportion": float(done.proportion),
                "learning_rate": rate,
                **contrast_figures(trainer.contrast, device=device),
            }

        return figures

    def save(step: int) -> None:
        contents = {
            "model": generator.state_dict(),
            "classifier": classifier.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "loader": loader.state_dict(),
            "step": step,
            "losses": losses,
            "guards": guards.state_dict(),
            "identity": dict(identity or {}),
        }
        save_checkpoint(run.checkpoint, "generator", config, contents, keep=settings.keep_checkpoints)

    with explaining_memory("generator", config, run.folder):
        steps_done, speed = run_steps(
            run,
            loader,
            first_step=first_step,
            steps=settings.steps,
            log_every=settings.log_every,
            checkpoint_every=settings.checkpoint_every,
            train_step=train_step,
            save=save,
            on_step=on_step,
            warn=warn,
            guards=guards,
        )
    if steps_done >= settings.steps:
        save_weights(run.folder / WEIGHTS, "generator", config, generator.state_dict())
    return TrainingResult(
        run.checkpoint,
        steps_done,
        losses,
        speed,
        warnings=guards.warnings,
        bad_reads=loader.failures.by_case(),
        interrupted=steps_done < settings.steps,
    )


class _AdversarialStep:
    """One step of both phases."""

    def __init__(
        self,
        config: Config,
        generator: nn.Module,
        classifier: nn.Module,
        segmenter: nn.Module,
        generator_optimizer: torch.optim.Optimizer,
        classifier_optimizer: torch.optim.Optimizer,
    ) -> None:
        self._generator, self._classifier, self._segmenter = generator, classifier, segmenter
        self._generator_optimizer, self._classifier_optimizer = generator_optimizer, classifier_optimizer
        self._lambda_cls = config.generator_training.lambda_cls
        self._tumor_values = config.region.tumor_values
        self._synthesizer = Synthesizer(config.region, config.synthesis, seed=config.seed, generator=generator)
        self.contrast: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the last step: G before tanh, and the masks

    def __call__(self, batch: Batch, device: torch.device) -> _Losses:
        image, label = batch.image.to(device), batch.label.to(device)
        drawn = self._synthesizer.draw(
            label,
            [Address(r.request.epoch, r.request.index) for r in batch.records],
            label_voxels=[r.label_voxels for r in batch.records],
        )
        figures: dict[str, torch.Tensor] = {}
        painted: torch.Tensor | None = None
        placement: Placement | None = None
        self.contrast = []
        if drawn:
            placement = self._synthesizer.place(label, drawn)
            painted, seen = self._generator_phase(take_rows(image, placement.rows), placement)
            figures.update(seen)
        figures.update(self._classifier_phase(image, label, painted, placement))
        return _Losses(**figures)

    def _generator_phase(self, x: torch.Tensor, placement: Placement) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = [self._synthesizer.region.organs[d.organ].tumor for d in placement.draws]
        self._classifier.requires_grad_(requires_grad=False)
        self._generator_optimizer.zero_grad(set_to_none=True)
        g = self._synthesizer.difference(x, placement)
        self.contrast = [(g.detach(), placement.mask)]
        painted = self._synthesizer.blend(x[:, 0], g, placement)
        logits = self._segmenter(painted.unsqueeze(1))
        seen = tumor_seen_loss(logits, placement.mask, values)
        fools = classified_as_loss(self._classifier(painted.unsqueeze(1)), placement.mask, REAL)
        (seen + self._lambda_cls * fools).backward()
        self._generator_optimizer.step()
        self._classifier.requires_grad_(requires_grad=True)
        with torch.no_grad():
            wanted = torch.tensor(values, device=x.device).view(-1, 1, 1, 1)
            inside = placement.mask.bool()
            hits = ((logits.argmax(1) == wanted) & inside).sum() / inside.sum().clamp(min=1)
        return painted.detach(), {
            "seen": seen.detach(),
            "fools": fools.detach(),
            "proportion": hits,
        }

    def _classifier_phase(
        self, image: torch.Tensor, label: torch.Tensor, painted: torch.Tensor | None, placement: Placement | None
    ) -> dict[str, torch.Tensor]:
        real = torch.isin(label[:, 0], torch.tensor(self._tumor_values, dtype=label.dtype, device=label.device))
        rows = [row for row, has in enumerate(real.flatten(1).any(1).tolist()) if has]
        self._classifier_optimizer.zero_grad(set_to_none=True)
        terms = []
        if rows:
            terms.append(classified_as_loss(self._classifier(image[rows]), real[rows], REAL))
        if painted is not None and placement is not None:
            terms.append(classified_as_loss(self._classifier(painted.unsqueeze(1)), placement.mask, PAINTED))
        if not terms:
            return {}
        loss = torch.stack(terms).mean()
        loss.backward()
        self._classifier_optimizer.step()
        return {"classifier": loss.detach()}
