"""Segmentation training: the baseline S on labelled data, and the student with painted tumours (Eq. 5-6 happen in the loader)."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config
from ftengine.loader.loader import Loader
from ftengine.quality.gate import QualityGate
from ftengine.training.checkpoint import (
    WEIGHTS,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from ftengine.training.guards import Guards
from ftengine.training.ledger import PatchLedger
from ftengine.training.losses import segmentation_loss
from ftengine.training.memory import explaining_memory
from ftengine.training.networks import build_segmenter
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
    sources: Sources | None = None,
) -> TrainingResult:
    """Train for ``config.training.steps`` steps on the loader's batches; writes ``out/checkpoint.pt``.

    init: a segmenter's checkpoint to start from (weights only). resume: go on from ``out``, to the same losses as without the break
    (bit for bit on the CPU). ``gate`` counts the verdicts on the batches that training takes, where the loader paints; ``warn`` gets
    its warnings and the loader's. ``identity`` names what else decides the result (painter files, split): a resumed run
    must be given the same, and the same configuration, but for what ``allow`` names (``training.resume``). ``sources``: for replay files. Ctrl-C and
    SIGTERM finish the step, save and return with ``interrupted``. Raises RejectionError where the gate stops
    the run, DivergedError where a loss is no number, MemoryLimitError and SaveError. Source: FreeTumor 4.5 and Table A19: DiceCE, AdamW, warm-up and cosine per iteration.
    """
    settings = config.training
    network = build_segmenter(config)
    document: dict[str, Any] | None = None
    changes: tuple[Change, ...] = ()
    if resume:
        path = Path(out) / CHECKPOINT
        document = load_checkpoint(path, "segmenter")
        changes = check_changes(
            path, document, kind="segmenter", config=config, loader=loader, identity=identity or {}, allow=allow
        )
        load_weights(network, path, document)
    elif init is not None:
        load_weights(network, init, load_checkpoint(init, "segmenter"))
    run = Run(out, config, resume=resume)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first_step = 0
    losses: list[float] = []
    ledger = None if gate is None else PatchLedger(config.region.tumor_values, gate)
    guards = Guards("segmenter", config, run.folder, checkpoint=run.checkpoint, sources=sources, gate=gate, warn=warn)
    if document is not None:
        optimizer.load_state_dict(document["optimizer"])
        if ledger is not None and document.get("ledger") is not None:  # a checkpoint may be older than the ledger
            ledger.load_state_dict(document["ledger"])
        guards.load_state_dict(document.get("guards"))
        loader.load_state_dict(loader_state(document, loader, changes))
        first_step, losses = document["step"], list(document["losses"])
        for note in resume_notes(document, changes):
            warn(note)
    run.begin(first_step, run_details(run.folder, identity or {}, document, changes))
    loss_function = segmentation_loss()

    def train_step(batch: Batch, step: int) -> Callable[[], dict[str, float]]:
        rate = learning_rate(
            step, base=settings.learning_rate, warmup_steps=settings.warmup_steps, steps=settings.steps
        )
        loss = _step(network, optimizer, loss_function, batch.image.to(device), batch.label.to(device), rate, config)

        guards.arrived(batch)
        guards.step(step, {"loss": loss})

        def figures() -> dict[str, float]:
            guards.check()
            losses.append(float(loss))
            return {"loss": losses[-1], "learning_rate": rate}

        return figures

    def save(step: int) -> None:
        contents = {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(),
            "step": step,
            "losses": losses,
            "ledger": None if ledger is None else ledger.state_dict(),
            "guards": guards.state_dict(),
            "identity": dict(identity or {}),
        }
        save_checkpoint(run.checkpoint, "segmenter", config, contents, keep=settings.keep_checkpoints)

    with explaining_memory("segmenter", config, run.folder):
        done, speed = run_steps(
            run,
            loader,
            first_step=first_step,
            steps=settings.steps,
            log_every=settings.log_every,
            checkpoint_every=settings.checkpoint_every,
            train_step=train_step,
            save=save,
            on_step=on_step,
            ledger=ledger,
            warn=warn,
            guards=guards,
        )
    if done >= settings.steps:
        save_weights(run.folder / WEIGHTS, "segmenter", config, network.state_dict())
    return TrainingResult(
        run.checkpoint,
        done,
        losses,
        speed,
        quality={} if ledger is None else ledger.gate.summary(),
        mix={} if ledger is None else ledger.summary(),
        warnings=[*([] if ledger is None else ledger.warnings), *guards.warnings],
        bad_reads=loader.failures.by_case(),
        interrupted=done < settings.steps,
    )


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: nn.Module,
    image: torch.Tensor,
    label: torch.Tensor,
    rate: float,
    config: Config,
) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=config.training.precision == "bf16"):
        loss: torch.Tensor = loss_function(network(image), label)
    loss.backward()
    if config.training.clip_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), config.training.clip_norm)
    optimizer.step()
    return loss.detach()
