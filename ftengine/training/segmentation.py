"""Segmentation training: the baseline S on labelled data, and the student with painted tumours (Eq. 5-6 happen in the loader)."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.loader.loader import Loader
from ftengine.quality.gate import QualityGate
from ftengine.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from ftengine.training.init_weights import InitReport, load_initial_weights
from ftengine.training.ledger import PatchLedger
from ftengine.training.losses import segmentation_loss
from ftengine.training.networks import build_segmenter
from ftengine.training.run import (
    CHECKPOINT,
    Progress,
    Run,
    TrainingResult,
    check_identity,
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
) -> TrainingResult:
    """Train for ``config.training.steps`` steps on the loader's batches; writes ``out/checkpoint.pt``.

    init: weights to start from (``load_initial_weights``); what of them was of use goes to ``run.json`` and, where something was not, to ``warn``. resume: go on from ``out``, to the same losses as without the break
    (bit for bit on the CPU). ``gate`` counts the verdicts on the batches that training takes, where the loader paints; ``warn`` gets
    its warnings and the loader's. ``identity`` names what else decides the result (painter files, split): a resumed run must be given the same. Ctrl-C and
    SIGTERM finish the step, save and return with ``interrupted``. Raises RejectionError where the gate stops the run. Source: FreeTumor 4.5 and Table A19: DiceCE, AdamW, warm-up and cosine per iteration.
    """
    settings = config.training
    network = build_segmenter(config)
    document: dict[str, Any] | None = None
    report: InitReport | None = None
    if resume:
        document = load_checkpoint(Path(out) / CHECKPOINT, "segmenter")
        check_identity(document["identity"], identity or {})
        load_weights(network, Path(out) / CHECKPOINT, document)
    elif init is not None:
        report = load_initial_weights(network, init, config)
    run = Run(out, config, resume=resume)
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    first_step = 0
    losses: list[float] = []
    ledger = None if gate is None else PatchLedger(config.region.tumor_values, gate)
    if document is not None:
        optimizer.load_state_dict(document["optimizer"])
        if ledger is not None and document.get("ledger") is not None:  # a checkpoint may be older than the ledger
            ledger.load_state_dict(document["ledger"])
        loader.load_state_dict(document["loader"])
        first_step, losses = document["step"], list(document["losses"])
    run.begin(first_step)
    if report is not None:
        report.record(run.folder / "run.json")
        if report.skipped or report.missing:
            warn(f"--init {report.line()}")
    loss_function = segmentation_loss()

    def train_step(batch: Batch, step: int) -> Callable[[], dict[str, float]]:
        rate = learning_rate(
            step, base=settings.learning_rate, warmup_steps=settings.warmup_steps, steps=settings.steps
        )
        loss = _step(network, optimizer, loss_function, batch.image.to(device), batch.label.to(device), rate, config)

        def figures() -> dict[str, float]:
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise ConfigError(
                    f"{out}: the loss is {losses[-1]} at step {step}: training diverged. The last checkpoint is kept; lower "
                    "training.learning_rate or set training.clip_norm."
                )
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
            "identity": dict(identity or {}),
        }
        save_checkpoint(run.checkpoint, "segmenter", config, contents)

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
    )
    return TrainingResult(
        run.checkpoint,
        done,
        losses,
        speed,
        quality={} if ledger is None else ledger.gate.summary(),
        mix={} if ledger is None else ledger.summary(),
        warnings=[] if ledger is None else ledger.warnings,
        bad_reads=loader.failures.by_case(),
        init="" if report is None else report.line(),
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
