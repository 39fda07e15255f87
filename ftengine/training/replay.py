"""Replay files: the addresses of the patches on which a run broke, and how to make these very patches again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import Box, IntZYX
from ftengine.loader.counting import count_values
from ftengine.loader.pipeline import PatchPipeline
from ftengine.loader.stages import Stage
from ftengine.training.checkpoint import Kind
from ftengine.training.cutmix import cutmix
from ftengine.types import Augmentation, Batch, Painted, Patch, PatchRecord, PatchRequest

FORMAT = 1


class PatchReader(Protocol):
    """What reads boxes of volumes: a ``Store``."""

    def read(self, case: str, origin_zyx: IntZYX, shape_zyx: IntZYX) -> Patch:
        """Read one box."""
        ...


@dataclass(frozen=True)
class Sources:
    """Where a run's patches come from: the store, which of its rows, the files of generator and judge, and their SHA-256 then.

    Empty where there is none.
    """

    store: str = ""
    generator: str = ""
    judge: str = ""
    split: str = ""
    held_out_fold: int | None = None
    generator_sha256: str = ""
    judge_sha256: str = ""


NO_SOURCES = Sources()


@dataclass(frozen=True)
class ReplayStep:
    """One batch that training took. losses: by name, as read from the device; NaN and infinity as such."""

    step: int
    losses: dict[str, float]
    records: list[PatchRecord]


@dataclass(frozen=True)
class Replay:
    """The last batches before a run stopped, the one that broke it last.

    reason: what was found. checkpoint: the newest one when the run stopped, empty where there was none.
    """

    kind: Kind
    reason: str
    config: Config
    sources: Sources
    checkpoint: str
    steps: list[ReplayStep] = field(default_factory=list)


def write_replay(path: Path, replay: Replay) -> None:
    """Write a replay file: JSON, with texts in place of losses that are not finite."""
    document = {
        "format": FORMAT,
        "engine_version": __version__,
        "kind": replay.kind,
        "reason": replay.reason,
        "sources": asdict(replay.sources),
        "checkpoint": replay.checkpoint,
        "steps": [
            {
                "step": s.step,
                "losses": {name: _number(value) for name, value in s.losses.items()},
                "records": [_plain(asdict(record)) for record in s.records],
            }
            for s in replay.steps
        ],
        "config": replay.config.model_dump(mode="json"),
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_replay(path: str | Path) -> Replay:
    """Read a replay file; ConfigError where it is none, or of another format."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ConfigError(
                f"{path}: has replay format {document['format']!r} of ftengine {document['engine_version']}; this version reads {FORMAT}."
            )
        steps = [
            ReplayStep(
                s["step"],
                {name: float(value) for name, value in s["losses"].items()},
                [_record(r) for r in s["records"]],
            )
            for s in document["steps"]
        ]
        sources, config = Sources(**document["sources"]), document["config"]
        kind, reason, checkpoint = document["kind"], document["reason"], document["checkpoint"]
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); want a replay-STEP.json of a run's folder."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path}: is not a replay file ({type(error).__name__}: {' '.join(str(error).split())[:120]}); want a replay-STEP.json of a run's folder."
        ) from error
    return Replay(
        kind, reason, Config.from_dict(config, where=f"{path} (configuration inside)"), sources, checkpoint, steps
    )


def rebuild(
    config: Config,
    store: PatchReader,
    step: ReplayStep,
    *,
    device: torch.device,
    stages: Sequence[Stage] = (),
    cuts: bool = False,
) -> tuple[Batch, Batch]:
    """The batch of a step as the loader made it, before and behind its stages, by the loader's own reads, graph and kernels.

    config: of the run. stages: those of the run's loader, in order. cuts: then CutMix, as segmentation training does. Raises StoreError where a volume cannot be read.
    """
    requests = [record.request for record in step.records]
    reads = [store.read(r.case, r.read.origin_zyx, r.read.shape_zyx) for r in requests]
    voxels = [
        tuple(count_values(read.label[r.box.moved(read.box.origin_zyx).slices()]).tolist())
        for read, r in zip(reads, requests, strict=True)
    ]
    prepared = PatchPipeline(config, len(requests), device=device)(reads, requests)
    records = [PatchRecord(r, label_voxels=n) for r, n in zip(requests, voxels, strict=True)]
    given = Batch(prepared.image.clone(), prepared.label.clone(), records)
    batch = Batch(
        prepared.image, prepared.label, [PatchRecord(r.request, label_voxels=r.label_voxels) for r in records]
    )
    for stage in stages:
        batch = stage(batch)
    return given, _cut(config, batch) if cuts else batch


def _cut(config: Config, batch: Batch) -> Batch:
    """CutMix in each of the batches whose gradients the step added up."""
    size = config.training.batch_size
    parts = [
        cutmix(
            Batch(
                batch.image[first : first + size],
                batch.label[first : first + size],
                batch.records[first : first + size],
            ),
            seed=config.seed,
            probability=config.training.cutmix_probability,
        )
        for first in range(0, len(batch.records), size)
    ]
    return Batch(torch.cat([p.image for p in parts]), torch.cat([p.label for p in parts]), batch.records)


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _number(value) if isinstance(value, float) else value


def _record(values: Mapping[str, Any]) -> PatchRecord:
    request = dict(values["request"])
    for name in ("box", "read"):
        request[name] = Box(tuple(request[name]["origin_zyx"]), tuple(request[name]["shape_zyx"]))
    drawn = dict(request["augmentation"])
    request["augmentation"] = Augmentation(**{**drawn, "flip_zyx": tuple(drawn["flip_zyx"])})
    painted = values["painted"]
    if painted is not None:
        painted = Painted(
            **{
                **painted,
                "center_zyx": tuple(tuple(c) for c in painted["center_zyx"]),
                "radii_vox_zyx": tuple(tuple(float(x) for x in r) for r in painted["radii_vox_zyx"]),
                "proportion": float(painted["proportion"]),
            }
        )
    voxels = values["label_voxels"]
    return PatchRecord(PatchRequest(**request), painted, None if voxels is None else tuple(voxels))
