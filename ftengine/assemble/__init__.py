"""The one place that knows all stages: wires store, plan, pipeline, synthesis, quality control and training together."""

from ftengine.assemble.build import (
    SynthesisStage,
    build_bank,
    build_judge,
    build_loader,
    build_synthesis_stage,
    build_synthesizer_of_any_size,
    check_region,
    config_for_store,
    load_networks,
    load_painters,
    resolve_device,
)
from ftengine.assemble.calibrate import calibrate_judge
from ftengine.assemble.fid import PATCHES_PER_TUMOR, measure_fid
from ftengine.assemble.replays import replay
from ftengine.assemble.single_volume import SynthesisResult, synthesize, working_box
from ftengine.assemble.train import train_segmentation, train_synthesis

__all__ = [
    "PATCHES_PER_TUMOR",
    "SynthesisResult",
    "SynthesisStage",
    "build_bank",
    "build_judge",
    "build_loader",
    "build_synthesis_stage",
    "build_synthesizer_of_any_size",
    "calibrate_judge",
    "check_region",
    "config_for_store",
    "load_networks",
    "load_painters",
    "measure_fid",
    "replay",
    "resolve_device",
    "synthesize",
    "train_segmentation",
    "train_synthesis",
    "working_box",
]
