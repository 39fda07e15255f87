"""The draws of the paper and released shapes do not change by a bit, whatever other shapes exist: every number, as recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftengine.config import Config
from ftengine.synthesis.shape import PatchDraw, draw_patch

GOLDEN = Path(__file__).parents[1] / "golden" / "draws.json"
# preset, overrides, organs of the patch; each at the addresses below
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "abdomen": ("abdomen", {}, ["liver", "kidney"]),
    "abdomen, two tumours": ("abdomen", {"synthesis.num_tumors": 2}, ["pancreas"]),
    "chest": ("chest", {}, ["lung"]),
    "demo": ("demo", {}, ["liver"]),
    "released": ("abdomen", {"synthesis.variant": "released"}, ["liver", "pancreas", "kidney"]),
}
ADDRESSES = ((0, 0, 0, 0), (3, 2, 17, 0), (3, 2, 17, 1), (2**62, 40, 2**40, 0))  # seed, epoch, index, draw


def _numbers(draw: PatchDraw) -> dict[str, Any]:
    """Every number of a draw as hexadecimal, so that JSON rounds nothing."""
    return {
        "organ": draw.organ,
        "tumors": [
            {
                "size_class": t.size_class,
                "radii_vox_zyx": [r.hex() for r in t.radii_vox_zyx],
                "warp": [float(w).hex() for w in t.warp.ravel()],
                "center_draw": [c.hex() for c in t.center_draw],
            }
            for t in draw.tumors
        ],
        "texture_sigma_mm": draw.texture_sigma_mm.hex(),
        "contrast_factor": draw.contrast_factor.hex(),
        "edge_sigma_vox": draw.edge_sigma_vox.hex(),
        "texture_draw": [t.hex() for t in draw.texture_draw],
    }


def _draws(name: str) -> list[dict[str, Any]]:
    preset, overrides, organs = CASES[name]
    config = Config.preset(preset).with_overrides(overrides)
    drawn = []
    for seed, epoch, index, again in ADDRESSES:
        found = draw_patch(
            organs, config.synthesis, config.region.spacing_mm_zyx, seed=seed, epoch=epoch, index=index, draw=again
        )
        assert found is not None
        drawn.append(_numbers(found))
    return drawn


@pytest.mark.parametrize("name", CASES)
def test_draws_are_as_recorded_bit_for_bit(name: str) -> None:
    assert _draws(name) == json.loads(GOLDEN.read_text())[name]
