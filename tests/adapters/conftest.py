"""Checkpoints of untrained networks, and the GPU."""

from pathlib import Path

import pytest
import torch

from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import build_generator, build_segmenter
from tests.support import small_config


@pytest.fixture(scope="session")
def painters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """G.pt and S.pt for ``small_config``."""
    folder = tmp_path_factory.mktemp("painters")
    config = small_config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator, segmenter = build_generator(config), build_segmenter(config)
    save_checkpoint(folder / "G.pt", "generator", config, {"model": generator.state_dict()})
    save_checkpoint(folder / "S.pt", "segmenter", config, {"model": segmenter.state_dict()})
    return folder / "G.pt", folder / "S.pt"


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; its absence is no fault."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use (torch.cuda.is_available() is False)")
    pytest.importorskip("cupy", reason="CuPy is not installed; want cupy-cuda13x beside the GPU")
    return torch.device("cuda", torch.cuda.current_device())
