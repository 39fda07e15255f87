"""Painting a batch with each synthesiser, without networks: what its masks, textures, pastes and blends cost; interleaved, by patch.

The unit is ``constant``: Eq. 1 with ``fixed_contrast``, which is freetumor's way without its G. Sizes are those of ``shape: paper``, the bank
holds warped ellipsoids of the same classes, and the organ fills the patch. Before anything is timed every arm has painted every patch,
inside its mask alone.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ftengine.bench.timing import environment, interleave
from ftengine.config import DIVERSE, Config
from ftengine.geometry import IntZYX
from ftengine.kernels import tumor_mask
from ftengine.synthesis.bank import BankTumor, TumorBank, edge_reach_vox
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.painting import Painting
from ftengine.synthesis.shape import count_labels, draw_patch

SOFT = {"synthesis.edge_sigma_mm": 1.2}
CONSTANT = {"synthesis.synthesizer": "constant"}
# the unit first; "soft" has the edge that diverse has
ARMS: Mapping[str, Mapping[str, Any]] = {
    "constant": CONSTANT,
    "constant, soft edge": {**CONSTANT, **SOFT},
    "copy-paste": {"synthesis.synthesizer": "copy-paste"},
    "copy-paste, soft edge": {"synthesis.synthesizer": "copy-paste", **SOFT},
    "copy-paste, contrast, soft edge": {"synthesis.synthesizer": "copy-paste", "synthesis.paste": "contrast", **SOFT},
    "syntumor": {"synthesis.synthesizer": "syntumor"},
    "syntumor, many": {"synthesis.synthesizer": "syntumor", "synthesis.syntumor_tumors": "many"},
    "hyperdense": {**CONSTANT, **SOFT, "synthesis.hyperdense_fraction": 0.15},
    "target": {**CONSTANT, **SOFT, "synthesis.target_contrast_hu": (10.0, 60.0)},
    "rim": {**CONSTANT, **SOFT, "synthesis.rim_fraction": 0.15},
    "heterogeneity": {**CONSTANT, **SOFT, "synthesis.heterogeneity": (0.0, 0.4)},
    "diverse": {**CONSTANT, **DIVERSE},
}
_TUMORS_IN_BANK = 16
_BATCHES = 8  # different tumours, so that no size class stands for all


def make_bank(config: Config) -> TumorBank:
    """Warped ellipsoids of the configured size classes, cut as tumours of a store are, of noise."""
    reach = edge_reach_vox(config.synthesis.edge_sigma_mm, config.region.spacing_mm_zyx)
    rng = np.random.default_rng(1)
    tumors = []
    for index in range(_TUMORS_IN_BANK):
        drawn = draw_patch(
            ["liver"],
            config.synthesis.model_copy(update={"synthesizer": "freetumor"}),
            config.region.spacing_mm_zyx,
            seed=1,
            epoch=0,
            index=index,
        )
        assert drawn is not None  # noqa: S101 - fraction 1
        tumor = drawn.tumors[0]
        shape = tuple(2 * int(np.ceil(2 * r)) for r in tumor.radii_vox_zyx)
        whole = tumor_mask(
            torch.tensor([[n // 2 for n in shape]]), torch.tensor([tumor.radii_vox_zyx]), tumor.warp[None], shape
        )[0].numpy()
        held = np.argwhere(whole)
        place = tuple(slice(a, b + 1) for a, b in zip(held.min(axis=0), held.max(axis=0), strict=True))
        mask = np.pad(whole[place], [(r, r) for r in reach])
        image = rng.integers(0, 90, mask.shape).astype(np.int16)
        tumors.append(BankTumor(f"case {index}", image, mask, 100.0))
    return TumorBank({"liver": tuple(tumors)}, config.region.spacing_mm_zyx)


class _Arm:
    """Paints one batch after the other."""

    def __init__(self, config: Config, batch: int) -> None:
        bank = make_bank(config) if config.synthesis.synthesizer == "copy-paste" else None
        self._synthesizer = Synthesizer(config.region, config.synthesis, seed=0, bank=bank)
        shape = (batch, 1, *config.region.patch_zyx)
        rng = np.random.default_rng(0)
        self._image = torch.from_numpy(rng.random(shape, dtype=np.float32))
        self._label = torch.ones(shape, dtype=torch.uint8)
        self._voxels = [count_labels(patch) for patch in self._label.numpy()]
        self._calls = 0
        for _ in range(_BATCHES):
            painting = self.paint()
            records = painting.records()
            if any(record is None or record.num_voxels == 0 for record in records):
                raise AssertionError("a patch was not painted")
            if config.synthesis.edge_sigma_mm == 0 and config.synthesis.synthesizer != "syntumor":
                outside = painting.mask == 0
                if not torch.equal(painting.image[outside], self._image[outside]):
                    raise AssertionError("a voxel outside its mask was painted")

    def paint(self) -> Painting:
        """The next batch; after ``_BATCHES`` the first again."""
        first = self._calls % _BATCHES * len(self._image)
        self._calls += 1
        addresses = [Address(0, first + i) for i in range(len(self._image))]
        return self._synthesizer.paint(self._image, self._label, addresses, label_voxels=self._voxels)

    def paint_all(self) -> None:
        """A round."""
        for _ in range(_BATCHES):
            self.paint()


def run(*, patch_zyx: IntZYX, batch: int, rounds: int, threads: int = 1, as_json: bool = False) -> dict[str, Any]:
    """Time every arm, a round being ``_BATCHES`` batches of each; prints a table or JSON and returns the document."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = Config.preset("abdomen").with_overrides({"region.patch_zyx": patch_zyx, "device": "cpu"})
        arms = {name: _Arm(base.with_overrides(dict(keys)), batch) for name, keys in ARMS.items()}

        rows = interleave({name: arm.paint_all for name, arm in arms.items()}, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    unit = rows[0].samples_s
    patches = _BATCHES * batch
    document: dict[str, Any] = {
        "environment": environment() | {"threads": threads},
        "patch_zyx": list(patch_zyx),
        "batch": batch,
        "rows": [
            {
                "name": row.name,
                "ms_per_patch": 1000 * statistics.median(row.samples_s) / patches,
                "of_constant": statistics.median(a / b for a, b in zip(row.samples_s, unit, strict=True)),
                "samples_s": row.samples_s,
            }
            for row in rows
        ],
    }
    if as_json:
        print(json.dumps(document))
    else:
        print(f"patches of {' x '.join(map(str, patch_zyx))}, batches of {batch}, {threads} thread(s), {rounds} rounds")
        print(f"{'synthesiser':<34} ms a patch   of constant")
        for row in document["rows"]:
            print(f"{row['name']:<34} {row['ms_per_patch']:10.2f} {row['of_constant']:13.2f}")
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """``ftengine bench synthesisers``."""
    parser = argparse.ArgumentParser(prog="ftengine bench synthesisers", description=__doc__)
    parser.add_argument("--patch", type=int, default=96, metavar="VOXELS")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run(
        patch_zyx=(options.patch,) * 3,
        batch=options.batch,
        rounds=options.rounds,
        threads=options.threads,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
