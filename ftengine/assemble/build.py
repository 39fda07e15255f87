"""What every command is built of: loader, painting stage, judge, networks from their checkpoints, bank of tumours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX
from ftengine.loader.loader import Loader
from ftengine.loader.plan import Mix, Plan
from ftengine.loader.stages import Stage
from ftengine.quality.gate import QualityGate
from ftengine.quality.judge import SegmenterJudge
from ftengine.rng import Purpose, patch_rng
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store
from ftengine.store.tumors import tumor_crops
from ftengine.synthesis.bank import TumorBank, cut_margin_vox, edge_reach_vox
from ftengine.synthesis.engine import Address, Generator, Judge, Synthesizer
from ftengine.synthesis.inference import Inference
from ftengine.training.checkpoint import load_generator, load_segmenter
from ftengine.training.weight_files import sha256_of
from ftengine.types import Batch


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name}: want auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: want auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices. 'ftengine doctor' shows why."
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


class SynthesisStage:
    """A loader stage: paints eligible patches, judges them, counts verdicts at the gate.

    gate None: whoever takes the batches counts their verdicts, as training does.
    """

    name = "synthesis + qc"

    def __init__(self, synthesizer: Synthesizer, gate: QualityGate | None) -> None:
        self._synthesizer = synthesizer
        self.gate = gate

    def __call__(self, batch: Batch) -> Batch:
        """Paint a batch; raises RejectionError where almost nothing passes."""
        addresses = [Address(r.request.epoch, r.request.index) for r in batch.records]
        voxels = [r.label_voxels for r in batch.records]
        painting = self._synthesizer.paint(batch.image, batch.label, addresses, label_voxels=voxels)
        for record, painted in zip(batch.records, painting.records(), strict=True):
            record.painted = painted
            if painted is not None and self.gate is not None:
                self.gate.record(painted, record.request.dataset)
        return Batch(painting.image, painting.label, batch.records)


def build_loader(
    config: Config,
    store: Store,
    *,
    mix: Mix = "mixed",
    split: str | None = None,
    fold: int | None = None,
    held_out_fold: int | None = None,
    stages: tuple[Stage, ...] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """A loader of batches from ``store``: iterable of Batch, with ``state_dict`` and ``load_state_dict``.

    mix: "annotated" draws from tumour-annotated volumes only, "mixed" also from organ-labelled ones, ``loader.annotated_fraction`` of a
    batch from the former. split, fold: only rows of that split, of that fold; held_out_fold: all but that fold. stages: run on each batch, e.g. a
    ``SynthesisStage``. rank of world_size processes: whose part of each step's patches; no two ranks get the same.
    Raises ConfigError where store and configuration do not fit each other, before anything is read.
    """
    check_region(config, store)
    device = resolve_device(config.device)
    plan = Plan(
        config,
        store,
        mix=mix,
        split=split,
        fold=fold,
        held_out_fold=held_out_fold,
        rank=rank,
        world_size=world_size,
    )
    return Loader(store, plan, stages, device=device)


def check_region(config: Config, store: Store) -> None:
    """ConfigError where the configuration is for another region, spacing or label table than the store."""
    have = (store.region, store.spacing_mm_zyx, store.labels)
    want = (config.region.name, config.region.spacing_mm_zyx, config.region.labels)
    if have != want:
        raise ConfigError(
            f"{store.location}: holds region {have[0]} at {have[1]} mm with labels {have[2]}; the configuration is for {want[0]} at {want[1]} mm "
            f"with labels {want[2]}. Choose the preset or --config that the store was converted with."
        )


def config_for_store(store: Store) -> Config:
    """The preset of the store's region, spacing and labels; ConfigError where no preset fits (a --config is needed then)."""
    for name in (store.region, "demo"):
        try:
            config = Config.preset(name)
            check_region(config, store)
        except ConfigError:
            continue
        return config
    raise ConfigError(
        f"{store.location}: no preset has region {store.region} at {store.spacing_mm_zyx} mm with labels {store.labels}; give --config FILE."
    )


def build_bank(
    config: Config,
    store: Store,
    *,
    split: str | None = None,
    fold: int | None = None,
    held_out_fold: int | None = None,
) -> TumorBank | None:
    """The tumours that ``synthesizer: copy-paste`` pastes, None for the others. A function of the rows of the store and the configuration.

    split, fold, held_out_fold: as ``build_loader`` takes them; the tumours come from the annotated volumes that it would draw from, and no other
    volume is read. Each organ's volumes are visited in a random order, until ``synthesis.bank_mb`` is full. Raises ConfigError
    where no tumour is found.
    """
    if config.synthesis.synthesizer != "copy-paste":
        return None
    check_region(config, store)
    table = store.select(["split", "fold", "annotation", "dataset", "tumor_values"])
    used = rows_in(table, split=split, fold=fold, held_out_fold=held_out_fold)
    used &= np.array(table.column("annotation").to_pylist(), dtype=str) == "tumor"
    weights = config.loader.dataset_weights
    used &= np.array([weights.get(name, 1.0) > 0 for name in table.column("dataset").to_pylist()], dtype=bool)
    values = table.column("tumor_values").to_pylist()
    spacing = config.region.spacing_mm_zyx
    margin = cut_margin_vox(spacing, edge_reach_vox(config.synthesis.edge_sigma_mm, spacing))
    crops = {}
    for name, organ in config.region.organs.items():
        rows = np.array([row for row in np.flatnonzero(used) if organ.tumor in values[row]], dtype=np.int64)
        order = patch_rng(config.seed, Purpose.TUMOR_BANK, index=organ.tumor).permutation(rows).tolist()
        crops[name] = tumor_crops(store, order, organ.tumor, margin, num_threads=config.loader.reader_threads)
    bank = TumorBank.collect(crops, config.region, config.synthesis)
    if not len(bank):
        where = f" in split {split!r}" if split is not None else ""
        where += f" in fold {fold}" if fold is not None else ""
        where += f" outside fold {held_out_fold}" if held_out_fold is not None else ""
        raise ConfigError(
            f"{store.location}: no tumour to paste{where} ({int(used.sum())} annotated volumes to cut from, "
            f"synthesis.bank_least_mm3={config.synthesis.bank_least_mm3:g}, synthesis.bank_mb={config.synthesis.bank_mb}, paste="
            f"{config.synthesis.paste}). Convert volumes with labelled tumours, choose another --split or --fold, lower bank_least_mm3 or "
            "raise bank_mb; or set synthesis.synthesizer to one that needs no tumours."
        )
    return bank


def build_synthesis_stage(
    config: Config,
    generator: Generator | None,
    judge: Judge | None,
    *,
    with_gate: bool = True,
    bank: TumorBank | None = None,
) -> SynthesisStage:
    """The painting stage of a configuration; generator, judge and bank as ``Synthesizer`` takes them, ``with_gate`` as the stage does."""
    synthesizer = Synthesizer(
        config.region,
        config.synthesis,
        seed=config.seed,
        generator=generator,
        judge=judge,
        retries=config.qc.retries,
        bank=bank,
    )
    return SynthesisStage(synthesizer, QualityGate(config.qc) if with_gate else None)


def build_judge(config: Config, segmenter: nn.Module) -> SegmenterJudge:
    """Quality control with a frozen segmenter; the released variant counts any tumour class and wants P > T."""
    released = config.synthesis.variant == "released"
    return SegmenterJudge(segmenter, config.qc, config.region, any_tumor=released, strict=released)


def load_painters(
    config: Config, generator_path: str | Path | None, judge_path: str | Path | None
) -> tuple[nn.Module | None, SegmenterJudge | None]:
    """Generator and judge from their checkpoints, as ``load_networks`` gives them; None for a path that is not given."""
    generator, segmenter = load_networks(config, generator_path, judge_path)
    return generator, None if segmenter is None else build_judge(config, segmenter)


def load_networks(
    config: Config, generator_path: str | Path | None, segmenter_path: str | Path | None
) -> tuple[nn.Module | None, nn.Module | None]:
    """G and S from their checkpoints: in eval mode, frozen, on the configured device; None for a path that is not given.

    Both are evaluated as ``synthesis.precision``, ``channels_last``, ``compile`` and ``cuda_graphs`` say. Raises ConfigError where one was trained for
    another region than the configuration's.
    """
    device = resolve_device(config.device)
    networks: list[nn.Module | None] = []
    for path, load in ((generator_path, load_generator), (segmenter_path, load_segmenter)):
        if path is None:
            networks.append(None)
            continue
        network, trained = load(path)
        same_region(config, trained, path)
        if load is load_generator:
            check_blend(config, trained, path)
        frozen = network.to(device).requires_grad_(requires_grad=False)
        networks.append(Inference(frozen, config.synthesis, device))
    return networks[0], networks[1]


def build_synthesizer_of_any_size(
    config: Config,
    generator: Generator | None,
    segmenter: nn.Module | None,
    *,
    spacing_mm_zyx: FloatZYX | None = None,
    bank: TumorBank | None = None,
) -> Synthesizer:
    """A Synthesizer whose networks see patches of any size: padded by replication to a multiple of their stride, then cropped.

    generator, segmenter: G and S, on the device of the patches, S in eval mode; None as for ``Synthesizer``. spacing_mm_zyx: of the
    patches, where it is not the region's. bank: as for ``Synthesizer``.
    """
    return Synthesizer(
        config.region,
        config.synthesis,
        seed=config.seed,
        generator=None if generator is None else _AnySize(generator, 8),
        judge=None if segmenter is None else build_judge(config, _AnySize(segmenter, 32)),
        retries=config.qc.retries,
        spacing_mm_zyx=spacing_mm_zyx,
        bank=bank,
    )


def same_region(config: Config, trained: Config, path: str | Path) -> None:
    """ConfigError where a checkpoint was trained for another region than the configuration's."""
    keys = ("name", "spacing_mm_zyx", "window_hu", "labels", "organs")
    for key in keys:
        have, want = getattr(trained.region, key), getattr(config.region, key)
        if have != want:
            raise ConfigError(
                f"{path}: was trained with region.{key}={have}; this run has {want}. Use the checkpoint of this region."
            )


def check_blend(config: Config, trained: Config, path: str | Path) -> None:
    """Released generators are painted as the released code does: in the chest that is a sigmoid and a plus (reference 1.6)."""
    if trained.synthesis.variant == "released" != config.synthesis.variant:
        raise ConfigError(
            f"{path}: was trained for synthesis.variant=released; this run paints with {config.synthesis.variant}. "
            "Add --set synthesis.variant=released."
        )


def fingerprint(path: str | Path | None) -> str:
    """A file's SHA-256; empty for None."""
    return "" if path is None else f"sha256:{sha256_of(path)}"


def selection(split: str | None, fold: int | None) -> str:
    """Which volumes were asked for, as part of a sentence; empty for all."""
    return "".join(f" of {name} {value!r}" for name, value in (("split", split), ("fold", fold)) if value is not None)


def painted_batches(
    config: Config, store: Store, stage: SynthesisStage, split: str | None, fold: int | None, num_batches: int
) -> Iterator[tuple[Batch, Batch]]:
    """Batches before and after painting: of organ-labelled volumes where the store has any, else of the chosen ones."""
    has_organs = "organ" in store.column("annotation").to_pylist()
    rows: dict[str, Any] = {} if has_organs else {"split": split, "fold": fold}
    with build_loader(config, store, **rows) as loader:
        while num_batches > 0:
            for batch in loader:
                yield batch, stage(batch)
                num_batches -= 1
                if num_batches <= 0:
                    return


class _AnySize(nn.Module):
    """Evaluates a network on any size: pads by replication to a multiple of its stride, and crops the result."""

    def __init__(self, network: Any, multiple: int) -> None:
        super().__init__()
        self._network, self._multiple = network, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, y, x_size = x.shape[2:]
        missing = [-n % self._multiple for n in (z, y, x_size)]
        padded = nn.functional.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")
        with torch.no_grad():
            result: torch.Tensor = self._network(padded)
        return result[:, :, :z, :y, :x_size]
