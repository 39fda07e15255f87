"""Painted tumours measured against real ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from ftengine.assemble.build import (
    build_bank,
    build_synthesis_stage,
    check_region,
    fingerprint,
    load_painters,
    painted_batches,
    resolve_device,
    selection,
)
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.fid.feature_networks import FeatureNetwork, load_features
from ftengine.fid.fid import (
    FeatureSet,
    FidResult,
    OnTumor,
    Quota,
    Sizes,
    check_rows,
    collect_painted,
    collect_real,
    ordered_sizes,
    organ_result,
    settings_of,
    shares_of,
)
from ftengine.fid.tumor_images import CropRule
from ftengine.quality.judge import SegmenterJudge
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store
from ftengine.training.run import ignore_warning
from ftengine.types import Batch

PATCHES_PER_TUMOR = 40  # looked at for each synthetic tumour that is wanted: a size class can be rare


def measure_fid(
    config: Config,
    store: Store,
    *,
    features: str | Path | FeatureNetwork,
    rule: CropRule | None = None,
    generator_path: str | Path | None = None,
    judge_path: str | Path | None = None,
    split: str | None = None,
    fold: int | None = None,
    repeats: int = 5,
    num: int | None = None,
    sizes: Sizes = "matched",
    name: str | None = None,
    beside: Sequence[FidResult] = (),
    on_tumor: OnTumor = lambda: None,
    warn: Callable[[str], None] = ignore_warning,
) -> FidResult:
    """``ftengine fid``: FID and KID of painted tumours against the labelled ones of a split or fold, by tumour type.

    features: a file of weights, as ``load_features`` takes it with ``rule``, or a network. Repeat k paints with seed + k; ``num`` tumours of
    each type (None: as many as there are real ones), of the real ones' size classes where ``sizes`` is "matched". With a judge, those that
    pass. Painted on organ-labelled volumes where the store has any, else on free patches of the chosen ones; copy-paste takes its
    tumours from outside ``fold``, without one from the chosen volumes. beside: results for one table with this one. Raises ConfigError where
    there is no real tumour or nothing could be painted, and before anything is painted where ``beside`` does not fit (``check_rows``).
    """
    check_region(config, store)
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: want at least 1.")
    if num is not None and num < 1:
        raise ConfigError(f"num={num}: want at least 1 synthetic tumour of each type.")
    rule = rule or CropRule()
    name = name or _painter_name(config, generator_path)
    check_rows([(n, {}) for n in (*(r.name for r in beside), name)])  # settings: once the real tumours are known
    device = resolve_device(config.device)
    network = (
        load_features(features, config.region, rule=rule, device=device)
        if isinstance(features, str | Path)
        else features
    )
    real = collect_real(config, store, _tumor_rows(config, store, split, fold), network, on_tumor=on_tumor)
    if not real:
        raise ConfigError(
            f"{store.location}: no labelled tumour{selection(split, fold)}; want real tumours to compare with. Choose another --split or --fold."
        )
    settings = settings_of(config, network.info, rule, real, sizes, num)
    check_rows([*((r.name, r.settings) for r in beside), (name, settings)])
    wanted = {organ: shares_of(tumors.sizes, num) for organ, tumors in real.items()}
    painters = load_painters(config, generator_path, judge_path)
    pastes_real = config.synthesis.synthesizer == "copy-paste" and fold is None
    if pastes_real:
        warn(
            "copy-paste pastes the very tumours that it is compared with; give --fold, and it takes those of the other folds"
        )
    painted = []
    for repeat in range(repeats):
        quota = Quota(wanted, ordered_sizes(config), sizes)
        batches = _batches_for_fid(config, store, painters, split, fold, repeat, quota.num_left)
        painted.append(
            (config.seed + repeat, *collect_painted(config, store, batches, network, quota, on_tumor=on_tumor), quota)
        )
    if not any(found for _, found, _, _ in painted):
        raise ConfigError(
            f"{store.location}: not one tumour of {' or '.join(real)} could be painted. 'ftengine preview' shows why; a judge that passes nothing is "
            "one reason."
        )
    organs = {
        organ: organ_result(
            organ,
            tumors,
            [
                (seed, found.get(organ, FeatureSet()), num_cut[organ], quota.missing(organ))
                for seed, found, num_cut, quota in painted
            ],
        )
        for organ, tumors in real.items()
    }
    for result in organs.values():
        for note in result.notes:
            warn(note)
    return FidResult(
        name=name,
        settings=settings,
        painter={
            "generator_sha256": fingerprint(generator_path),
            "judge_sha256": fingerprint(judge_path),
            "store": str(store.location),
            "split": split or "",
            "fold": fold,
            "pastes_real": pastes_real,
            "synthesis": config.synthesis.model_dump(
                mode="json", exclude=None if config.synthesis.shape == "realistic" else {"realistic_shapes"}
            ),
            "qc": config.qc.model_dump(mode="json"),
        },
        organs=organs,
    )


def _tumor_rows(config: Config, store: Store, split: str | None, fold: int | None) -> dict[str, list[int]]:
    """The tumour-annotated rows of the index that hold each organ's tumour."""
    table = store.select(["split", "fold", "annotation", "tumor_values"])
    used = rows_in(table, split=split, fold=fold)
    used &= np.array(table.column("annotation").to_pylist(), dtype=str) == "tumor"
    values = table.column("tumor_values").to_pylist()
    return {
        name: [int(row) for row in np.flatnonzero(used) if organ.tumor in values[row]]
        for name, organ in config.region.organs.items()
    }


def _batches_for_fid(
    config: Config,
    store: Store,
    painters: tuple[nn.Module | None, SegmenterJudge | None],
    split: str | None,
    fold: int | None,
    repeat: int,
    num_tumors: int,
) -> Iterator[tuple[Batch, Batch]]:
    """Batches of one repeat, as the volumes lie: flips, turns and changes of intensity are for training."""
    augment = {f"augment.{key}": 0.0 for key in type(config.augment).model_fields if key.endswith("_probability")}
    chosen = config.with_overrides(
        {
            "seed": config.seed + repeat,
            "loader.annotated_fraction": 0.0,
            "loader.positive_fraction": 1.0,
            "synthesis.fraction": 1.0,
            **augment,
        }
    )
    bank = build_bank(chosen, store, split=split, held_out_fold=fold)
    stage = build_synthesis_stage(chosen, *painters, with_gate=False, bank=bank)
    num_batches = math.ceil(PATCHES_PER_TUMOR * num_tumors / config.training.batch_size)
    yield from painted_batches(chosen, store, stage, split, fold, num_batches)


def _painter_name(config: Config, generator_path: str | Path | None) -> str:
    name = config.synthesis.synthesizer
    return f"{name} (fixed contrast)" if generator_path is None and config.synthesis.needs_generator else name
