"""A refactoring of the synthesis paints the same tumours: checksums of what is exact on every machine (masks, labels, draws)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ftengine.config import Config
from ftengine.synthesis.engine import Address, Synthesizer

GOLDEN = Path(__file__).parents[1] / "golden" / "synthesis.json"


def _checksums(variant: str) -> dict[str, str]:
    config = Config.preset("abdomen").with_overrides({"synthesis.variant": variant, "synthesis.num_tumors": 2})
    synthesizer = Synthesizer(config.region, config.synthesis, seed=11)
    label = torch.zeros((4, 1, 48, 52, 56), dtype=torch.uint8)
    label[0, 0, 6:42, 6:46, 6:50] = 1
    label[1, 0, 12:36, 20:26, 20:26] = 3
    label[2, 0, 6:42, 6:30, 6:30] = 5
    label[3, 0, 10:20, 10:20, 10:20] = 1
    label[3, 0, 30:40, 30:40, 30:40] = 5
    placement = synthesizer.place(label, synthesizer.draw(label, [Address(5, i) for i in range(4)]))
    draws = [
        [d.organ, [[t.size_class, t.radii_vox_zyx, np.round(t.warp, 9).tolist()] for t in d.tumors]]
        for d in placement.draws
    ]
    return {
        "mask": hashlib.sha256(placement.mask.numpy().tobytes()).hexdigest(),
        "centers": hashlib.sha256(json.dumps(placement.centers.tolist()).encode()).hexdigest(),
        "draws": hashlib.sha256(json.dumps(draws).encode()).hexdigest(),
    }


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_equal_draws_paint_equal_tumors_in_every_version(variant: str) -> None:
    assert _checksums(variant) == json.loads(GOLDEN.read_text())[variant]
