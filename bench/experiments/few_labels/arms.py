"""What is compared: the table of generators and the table of arms. An arm whose keys this version lacks is reported as unavailable."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ftengine.bench.step import has_key
from ftengine.config import Config

Judge = Literal["few", "many"]
SOFT_EDGE: Mapping[str, Any] = {"synthesis.edge_sigma_mm": 1.2}  # few-labels trial: about 0.8 voxel
FACTOR: Mapping[str, Any] = {"synthesis.contrast_factor": (0.5, 2.0)}  # few-labels trial
# what the released code paints has radii of its own: of its classes these two fit the phantoms
RELEASED: Mapping[str, Any] = {
    "synthesis.variant": "released",
    "synthesis.size_weights": {"tiny": 0.5, "small": 0.5},
}
# 0.14 is about -37 HU in a liver of 95 HU: the middle of the phantoms' hypodense range
CONSTANT: Mapping[str, Any] = {"synthesis.synthesizer": "constant", "synthesis.fixed_contrast": 0.14}
TRIAL_HU = (33.0, 73.0)  # what the few-labels trial's handcrafted tumours subtracted; the published range is far darker
# kinds that G never paints; the shares are near those of the phantoms, which on real data would have to be known
KINDS: Mapping[str, Any] = {"synthesis.hyperdense_fraction": 0.15, "synthesis.rim_fraction": 0.15}
TARGET: Mapping[str, Any] = {"synthesis.target_contrast_hu": (10.0, 60.0)}
HETEROGENEITY: Mapping[str, Any] = {"synthesis.heterogeneity": (0.0, 0.5)}


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    says: what it is, in a few words. keys: of the configuration. data: what it is trained on. generator: a recipe of ``GENERATORS``, None
    for an arm without one. judge: S of the same seed ("few" volumes), one that was trained on the oracle's volumes ("many"), or none.
    matters: gets more seeds.
    """

    says: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    data: Literal["labelled", "mixed", "oracle"] = "mixed"
    generator: str | None = None
    judge: Judge | None = None
    matters: bool = False

    @property
    def paints(self) -> bool:
        """Whether its student sees painted tumours."""
        return self.data == "mixed" and self.keys.get("synthesis.fraction", 1.0) > 0


def _synthesizer(name: str, **more: Any) -> dict[str, Any]:
    return {"synthesis.synthesizer": name, **{f"synthesis.{key}": value for key, value in more.items()}}


def _freetumor(
    says: str, *keys: Mapping[str, Any], generator: str = "paper", judge: Judge | None = None, matters: bool = False
) -> Arm:
    joined = {key: value for given in keys for key, value in given.items()}
    return Arm(says, joined, generator=generator, judge=judge, matters=matters)


def _judged(threshold: float, retries: int = 0) -> dict[str, Any]:
    return {"qc.threshold": threshold, "qc.retries": retries}


# how a G is trained, over the protocol's own keys
GENERATORS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "released": RELEASED,
    "L_seg only": {"generator_training.losses": "seen"},
    "L_cls only": {"generator_training.losses": "fools"},
}
BASELINE, ORACLE, CONTROL, FREETUMOR = "baseline", "oracle", "unpainted", "FreeTumor"
SYNTUMOR, DIVERSE = "syntumor, mild", "diverse"
ARMS: Mapping[str, Arm] = {
    BASELINE: Arm("continued on the labelled volumes", data="labelled", matters=True),
    CONTROL: _freetumor("the same healthy patches, nothing painted", {"synthesis.fraction": 0.0}, matters=True),
    "copy-paste": Arm("labelled tumours pasted, HU as cut", _synthesizer("copy-paste"), matters=True),
    "copy-paste, contrast": Arm("pasted over the tissue around", _synthesizer("copy-paste", paste="contrast")),
    "syntumor": Arm("handcrafted, published contrast", _synthesizer("syntumor")),
    SYNTUMOR: Arm("handcrafted, -33 to -73 HU", _synthesizer("syntumor", syntumor_contrast_hu=TRIAL_HU), matters=True),
    "constant": Arm("Eq. 1 with a constant for tanh(G(x))", CONSTANT, matters=True),
    "constant, edge + factor": Arm("the same, soft edge and factor", {**CONSTANT, **SOFT_EDGE, **FACTOR}, matters=True),
    FREETUMOR: _freetumor("paper, no quality control", matters=True),
    "FreeTumor T=.5": _freetumor("paper, T = 0.5", _judged(0.5), judge="few", matters=True),
    "FreeTumor T=.7": _freetumor("paper, T = 0.7", _judged(0.7), judge="few", matters=True),
    "FreeTumor T=.9": _freetumor("paper, T = 0.9", _judged(0.9), judge="few", matters=True),
    "T=.7, 5 retries": _freetumor(
        "a failed patch drawn again up to 5 times", _judged(0.7, 5), judge="few", matters=True
    ),
    "T=.7, judge of many": _freetumor("judge trained on the oracle's volumes", _judged(0.7), judge="many"),
    "released": _freetumor("the released code's texture and edge, no quality control", RELEASED, generator="released"),
    "L_seg only": _freetumor("G trained without C", generator="L_seg only"),
    "L_cls only": _freetumor("G trained without S", generator="L_cls only"),
    "soft edge": _freetumor("edge of 1.2 mm", SOFT_EDGE),
    "factor": _freetumor("tanh(G) times U(0.5, 2)", FACTOR),
    "edge + factor": _freetumor("both", SOFT_EDGE, FACTOR, matters=True),
    DIVERSE: _freetumor("both, and 15 % hyperdense, 15 % with a rim", SOFT_EDGE, FACTOR, KINDS, matters=True),
    "diverse, heterogeneous": _freetumor("and an uneven contrast", SOFT_EDGE, FACTOR, KINDS, HETEROGENEITY),
    "target contrast": _freetumor(
        "edge, kinds, mean contrast U(10, 60) HU: G decides the texture", SOFT_EDGE, KINDS, TARGET
    ),
    "diverse without G": Arm("diverse with the constant", {**CONSTANT, **SOFT_EDGE, **FACTOR, **KINDS}, matters=True),
    ORACLE: Arm("and the unlabelled patients, ill and annotated", data="oracle", matters=True),
}
# beside every arm against the baseline
COMPARISONS: tuple[tuple[str, str], ...] = (
    (FREETUMOR, CONTROL),
    (FREETUMOR, "constant"),
    (FREETUMOR, SYNTUMOR),
    ("edge + factor", FREETUMOR),
    ("edge + factor", SYNTUMOR),
    ("edge + factor", "constant, edge + factor"),
    (DIVERSE, FREETUMOR),
    (DIVERSE, SYNTUMOR),
    (DIVERSE, "edge + factor"),
    (DIVERSE, "diverse without G"),
    ("diverse without G", FREETUMOR),
    ("diverse without G", SYNTUMOR),
    ("target contrast", FREETUMOR),
    ("target contrast", SYNTUMOR),
)


def lacking_keys(arm: Arm, config: Config) -> list[str]:
    """Keys of an arm and of its generator that this version's configuration does not have."""
    recipe = {} if arm.generator is None else GENERATORS[arm.generator]
    return sorted(key for key in {*arm.keys, *recipe} if not has_key(config, key))
