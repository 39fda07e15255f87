"""The batch that broke a run, made again."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ftengine.assemble.build import build_bank, build_synthesis_stage, check_region, load_painters, resolve_device
from ftengine.loader.stages import Stage
from ftengine.pictures.replayed import ReplayedPatch, replayed_patches
from ftengine.store.reader import open_store
from ftengine.training.checkpoint import load_checkpoint
from ftengine.training.replay import Replay, read_replay, rebuild
from ftengine.training.run import ignore_warning
from ftengine.training.weight_files import sha256_of


def replay(
    file: str | Path,
    folder: Path | None = None,
    *,
    every_step: bool = False,
    store_path: str | Path | None = None,
    device: str | None = None,
    warn: Callable[[str], None] = ignore_warning,
) -> tuple[Replay, list[ReplayedPatch]]:
    """``ftengine replay``: make the patches of a replay file again, painted as in the run, and draw them into ``folder``.

    every_step: also the batches before the one that broke. A generator's run is painted with its last checkpoint, not with the weights of
    that moment. store_path, device: in place of the run's. warn: told of files that are no longer those of the run. Raises ConfigError or StoreError where a file, painter or volume is gone.
    """
    found = read_replay(file)
    config = found.config if device is None else found.config.with_overrides({"device": device})
    store = open_store(store_path or found.sources.store)
    check_region(config, store)
    sources = found.sources
    for text in _changed_files(found):
        warn(text)
    generator = (sources.generator if found.kind == "segmenter" else found.checkpoint) or None
    stages: tuple[Stage, ...] = ()
    if generator is not None or (found.kind == "segmenter" and not config.synthesis.needs_generator):
        bank = build_bank(config, store, split=sources.split or None, held_out_fold=sources.held_out_fold)
        painters = load_painters(config, generator, sources.judge or None)
        stages = (build_synthesis_stage(config, *painters, with_gate=False, bank=bank),)
    patches: list[ReplayedPatch] = []
    for step in found.steps if every_step else found.steps[-1:]:
        _, batch = rebuild(
            config, store, step, device=resolve_device(config.device), stages=stages, cuts=found.kind == "segmenter"
        )
        patches += replayed_patches(config, step, batch, folder, has_verdicts=found.kind == "segmenter")
    return found, patches


def _changed_files(found: Replay) -> Iterator[str]:
    """What a replay opens and is not what the run had: other painters by SHA-256, a checkpoint of a later step."""
    known = {found.sources.generator: found.sources.generator_sha256, found.sources.judge: found.sources.judge_sha256}
    for path, digest in known.items():
        if path and digest and sha256_of(path) != digest:
            yield f"{path}: is not the file that the run had (sha256 {digest[:12]}...): what is painted may differ"
    if found.kind == "generator" and found.checkpoint:
        saved = load_checkpoint(found.checkpoint, "generator").get("step", 0)
        if saved > found.steps[-1].step:
            yield (
                f"{found.checkpoint}: is of step {saved}, and the run broke at step {found.steps[-1].step}: it went on since; what is "
                "painted differs"
            )
