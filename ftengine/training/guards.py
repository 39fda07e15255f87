"""Guards of a run: they stop it where a loss is no number, and warn by name where it learns nothing.

On steps that are not logged they only hold on to the loss, still on the device, and to the addresses of the patches: nothing waits. On
logged steps all losses since the last one are read in one copy, so the step that broke is known, however seldom a run logs.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftengine.config import Config
from ftengine.errors import DivergedError
from ftengine.quality.gate import QualityGate
from ftengine.training.checkpoint import SECTION, Kind
from ftengine.training.replay import NO_SOURCES, Replay, ReplayStep, Sources, write_replay
from ftengine.types import Batch, PatchRecord

CONTRAST_MEAN, CONTRAST_SD = "generator/contrast_mean", "generator/contrast_sd"
MOST_OVERFLOWS = 10  # in a row, with fp16: GradScaler halves its scale at each, and starts at 2**16
WINDOW = 50  # logged steps over which a warning is decided
REPLAY_STEPS = 4  # batches in a replay file: the one that broke, and those before it
# Between the halves of the first window the loss has moved if their means differ by more than two standard errors and by 1 %; by 5 % always
_STANDARD_ERRORS, _MOVED_LEAST, _MOVED_SURELY = 2.0, 0.01, 0.05
_FROZEN = 1e-4  # spread over a window, as a share of the loss, below which it stands still
# Standard deviation of tanh(G(x)) inside masks: healthy runs of the few-labels trial painted 6 to 8 HU of 400 in a liver (x about 0.6), which is
# 0.025 to 0.033; a tenth of that is noise of the texture, not contrast
_COLLAPSED = 0.003
_SATURATED = 0.999


@dataclass(frozen=True)
class _Pending:
    """A step whose losses nobody has read yet."""

    step: int
    losses: dict[str, torch.Tensor]
    records: list[PatchRecord]


class Guards:
    """Watches one run: ``step`` for every step, ``check`` before anything of a logged step is used, ``watch`` with its figures."""

    def __init__(
        self,
        kind: Kind,
        config: Config,
        folder: Path,
        *,
        checkpoint: Path,
        sources: Sources = NO_SOURCES,
        gate: QualityGate | None = None,
        warn: Callable[[str], None] = lambda _text: None,
        gather: Callable[[int], list[int]] = lambda step: [step],
        rank: int = 0,
        main_loss: str = "loss",
    ) -> None:
        """folder: where a replay file goes. sources: where the patches come from, for it. gate: counts verdicts, where the run paints.

        gather: what each process of the run was given, in all of them, by rank; all call ``check`` alike. rank: of this one. main_loss: the figure that
        should fall.
        """
        self.warnings: list[str] = []
        self._kind: Kind = kind
        self._config, self._folder, self._checkpoint = config, folder, checkpoint
        self._main_loss = main_loss
        self._sources, self._gate, self._warn, self._gather = sources, gate, warn, gather
        self._rank = rank
        # a step that overflows in fp16 is left out by the loss scaler, and the weights stay sound
        self._tolerated = MOST_OVERFLOWS if getattr(config, SECTION[kind]).precision == "fp16" else 0
        self._num_in_a_row = 0
        self._arrived: list[PatchRecord] = []
        self._pending: list[_Pending] = []
        self._before: deque[ReplayStep] = deque(maxlen=REPLAY_STEPS - 1)
        self._warned: set[str] = set()
        self._first: list[float] = []  # losses of the first window, from the end of the warm-up on
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._contrasts: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def arrived(self, batch: Batch) -> None:
        """Note the addresses of a batch; a step may take several."""
        self._arrived += batch.records

    def step(self, step: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Note the losses of a step on what has arrived since the last one: detached, of one element. Waits for nothing."""
        records, self._arrived = self._arrived, []
        self._pending.append(_Pending(step, dict(losses), records))

    def check(self) -> None:
        """Read the losses since the last call; DivergedError, in all processes, naming the first step with one that is no number."""
        pending, self._pending = self._pending, []
        flat = [loss.reshape(()).to(torch.float64) for p in pending for loss in p.losses.values()]
        values = iter(torch.stack(flat).tolist() if flat else [])
        broken: ReplayStep | None = None
        for p in pending:
            done = ReplayStep(p.step, {name: next(values) for name in p.losses}, p.records)
            is_finite = all(map(math.isfinite, done.losses.values()))
            self._num_in_a_row = 0 if is_finite else self._num_in_a_row + 1
            if self._num_in_a_row > self._tolerated:
                broken = done
                break
            self._before.append(done)
        by_rank = self._gather(-1 if broken is None else broken.step)
        steps = [step for step in by_rank if step >= 0]
        if steps:
            raise self._diverged(broken, min(steps), writes=by_rank.index(min(steps)) == self._rank)

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Look at the figures of a logged step, and warn once of each thing that is wrong with them."""
        self._watch_loss(step, values.get(self._main_loss, math.nan))
        self._watch_quality()
        if CONTRAST_SD in values:
            self._watch_contrast(values[CONTRAST_MEAN], values[CONTRAST_SD])

    def state_dict(self) -> dict[str, Any]:
        """What has been seen and warned of: numbers, texts and lists."""
        return {
            "num_in_a_row": self._num_in_a_row,
            "warnings": list(self.warnings),
            "warned": sorted(self._warned),
            "first": list(self._first),
            "recent": list(self._recent),
            "contrasts": [list(pair) for pair in self._contrasts],
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where ``state`` was taken; None, of an older checkpoint, begins anew."""
        if state is None:
            return
        self._num_in_a_row = state.get("num_in_a_row", 0)
        self.warnings, self._warned, self._first = list(state["warnings"]), set(state["warned"]), list(state["first"])
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._contrasts = deque(((mean, sd) for mean, sd in state["contrasts"]), maxlen=WINDOW)

    def _diverged(self, broken: ReplayStep | None, step: int, *, writes: bool) -> DivergedError:
        """The error. broken: the first bad step of this process, if it has one. writes: whether its patches go to the replay file."""
        section = SECTION[self._kind]
        path = self._folder / f"replay-{step}.json"
        has_checkpoint = self._checkpoint.exists()
        found = "a loss is no number in another process"
        if broken is not None and broken.step == step:
            found = " and ".join(f"{name} is {x}" for name, x in broken.losses.items() if not math.isfinite(x))
            if writes:
                saved = str(self._checkpoint.resolve()) if has_checkpoint else ""
                steps = [*self._before, broken]
                reason = f"{found} at step {step}"
                write_replay(path, Replay(self._kind, reason, self._config, self._sources, saved, steps))
        kept = f"{self._checkpoint} is kept" if has_checkpoint else "There is no checkpoint yet"
        return DivergedError(
            f"{self._folder}: {found} at step {step}: training diverged. {kept}. Look at the patches with 'ftengine replay {path}'; where "
            f"they are sound, lower {section}.learning_rate or set {section}.clip_norm.",
            str(path),
        )

    def _watch_loss(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self._recent.append(loss)
        size = max(abs(statistics.fmean(self._recent)), 1e-12)
        if len(self._recent) == WINDOW and max(self._recent) - min(self._recent) <= _FROZEN * size:
            self._say(
                "frozen loss",
                f"the loss stood still at {loss:.4g} for {WINDOW} logged steps: no weight changes, or none matters. Look at the learning rate in "
                "metrics.jsonl and at the patches with 'ftengine preview'",
            )
        settings = getattr(self._config, SECTION[self._kind])
        if step < settings.warmup_steps or len(self._first) >= WINDOW:
            return
        self._first.append(loss)
        if len(self._first) == WINDOW:
            half = WINDOW // 2
            began, ended = statistics.fmean(self._first[:half]), statistics.fmean(self._first[half:])
            error = math.sqrt(
                (statistics.variance(self._first[:half]) + statistics.variance(self._first[half:])) / half
            )
            enough = min(max(_MOVED_LEAST * abs(began), _STANDARD_ERRORS * error), _MOVED_SURELY * abs(began))
            if abs(began - ended) <= enough:
                self._say(
                    "loss does not move",
                    f"over the first {WINDOW} logged steps behind the warm-up the loss was {began:.4g} in the first half and {ended:.4g} in the second, "
                    f"within its noise: the network learns nothing yet. Check the labels ('ftengine preview'), then try another {SECTION[self._kind]}.learning_rate (now "
                    f"{settings.learning_rate:g})",
                )

    def _watch_quality(self) -> None:
        quality = self._config.qc
        if self._gate is None or quality.threshold is None or self._gate.total().painted < quality.window:
            return
        rate = self._gate.window_pass_rate
        if rate == 1.0:
            self._say(
                "quality control passes everything",
                f"all of the last {quality.window} painted tumours passed at T={quality.threshold}: it filters nothing. Raise qc.threshold, or leave "
                "the judge out (qc.threshold=null) and save its time",
            )
        elif rate == 0.0 and quality.min_pass_rate == 0.0:  # above 0 the gate itself warns
            self._say(
                "quality control passes nothing",
                f"none of the last {quality.window} painted tumours passed at T={quality.threshold}: training sees no painted tumour. Look at them "
                "('ftengine preview'), train the generator longer, or lower qc.threshold",
            )

    def _watch_contrast(self, mean: float, sd: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(sd)):
            return
        self._contrasts.append((mean, sd))
        if len(self._contrasts) < WINDOW:
            return
        means = [m for m, _ in self._contrasts]
        overall = statistics.fmean(means)
        spread = math.sqrt(statistics.fmean(s * s for _, s in self._contrasts) + statistics.pvariance(means))
        if spread < _COLLAPSED or abs(overall) > _SATURATED:
            low, high = self._config.region.window_hu
            self._say(
                "generator collapsed to a constant",
                f"tanh(G(x)) is {overall:+.3f} in all masks of the last {WINDOW} logged steps, with a standard deviation of {spread:.4f} (at most "
                f"{spread * (high - low):.1f} HU): every tumour gets one contrast, and a network learns to find that contrast. Train G anew with "
                "a lower generator_training.learning_rate, or paint with a spread of contrasts (synthesis.contrast_factor)",
            )

    def _say(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self.warnings.append(f"{name}: {text}.")
            self._warn(self.warnings[-1])


def contrast_figures(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    device: torch.device,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> dict[str, float]:
    """Mean and standard deviation of tanh(G(x)) over the voxels of the masks of a step.

    parts: of each batch G before tanh, float [R, z, y, x], and the masks, uint8, alike. total: sums a tensor over the processes of a run.
    Waits for the device: for logged steps. NaN where the masks are empty.
    """
    with torch.no_grad():
        moments = torch.zeros(3, dtype=torch.float64, device=device)  # voxels, sum, sum of squares
        for g, mask in parts:
            inside = mask.bool()
            values = torch.where(inside, torch.tanh(g.detach().float()), 0.0).to(torch.float64)
            moments += torch.stack([inside.sum().to(torch.float64), values.sum(), values.square().sum()])
        count, first, second = total(moments).tolist()
    if not count:
        return {CONTRAST_MEAN: math.nan, CONTRAST_SD: math.nan}
    mean = first / count
    return {CONTRAST_MEAN: mean, CONTRAST_SD: math.sqrt(max(0.0, second / count - mean * mean))}
