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
CONSTANT_TANH = 0.14  # about -37 HU in a liver of 95 HU: the middle of the phantoms' hypodense range


@dataclass(frozen=True)
class GeneratorRecipe:
    """How a G comes to be: trained with ``keys``, or, where ``constant`` is given, made to give tanh(G(x)) = constant everywhere."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    constant: float | None = None


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
    generator: str | None = "paper"
    judge: Judge | None = None
    matters: bool = False


def _with_threshold(threshold: float, **more: Any) -> dict[str, Any]:
    return {"qc.threshold": threshold, **{key.replace("__", "."): value for key, value in more.items()}}


GENERATORS: Mapping[str, GeneratorRecipe] = {
    "paper": GeneratorRecipe(),
    "released": GeneratorRecipe(RELEASED),
    "L_seg only": GeneratorRecipe({"generator_training.lambda_cls": 0.0}),
    "L_cls only": GeneratorRecipe({"generator_training.use_seen_loss": False}),
    "constant": GeneratorRecipe(constant=CONSTANT_TANH),
}
BASELINE, ORACLE, CONTROL, FREETUMOR, SYNTUMOR = "baseline", "oracle", "unpainted", "FreeTumor", "syntumor"
ARMS: Mapping[str, Arm] = {
    BASELINE: Arm("continued on the labelled volumes", data="labelled", generator=None, matters=True),
    CONTROL: Arm("the same healthy patches, nothing painted", {"synthesis.fraction": 0.0}, matters=True),
    "copy-paste": Arm(
        "real tumours cut out and pasted", {"synthesis.synthesizer": "copy-paste"}, generator=None, matters=True
    ),
    SYNTUMOR: Arm("handcrafted", {"synthesis.synthesizer": "syntumor"}, generator=None, matters=True),
    "constant": Arm("Eq. 1 with a constant for tanh(G(x))", generator="constant", matters=True),
    "constant, edge + factor": Arm("the same, soft edge and factor", {**SOFT_EDGE, **FACTOR}, generator="constant"),
    FREETUMOR: Arm("paper, no quality control", matters=True),
    "FreeTumor T=.5": Arm("paper, T = 0.5", _with_threshold(0.5), judge="few", matters=True),
    "FreeTumor T=.7": Arm("paper, T = 0.7", _with_threshold(0.7), judge="few", matters=True),
    "FreeTumor T=.9": Arm("paper, T = 0.9", _with_threshold(0.9), judge="few", matters=True),
    "T=.7, 5 retries": Arm(
        "failed patches drawn again up to 5 times", _with_threshold(0.7, qc__retries=5), judge="few", matters=True
    ),
    "T=.7, judge of many": Arm("judge trained on the oracle's volumes", _with_threshold(0.7), judge="many"),
    "released": Arm("the released code's texture and edge, no quality control", RELEASED, generator="released"),
    "L_seg only": Arm("G trained without C", generator="L_seg only"),
    "L_cls only": Arm("G trained without S", generator="L_cls only"),
    "soft edge": Arm("edge of 1.2 mm", SOFT_EDGE),
    "factor": Arm("tanh(G) times U(0.5, 2)", FACTOR),
    "edge + factor": Arm("both", {**SOFT_EDGE, **FACTOR}, matters=True),
    "diverse": Arm("our own variant", {"synthesis.synthesizer": "diverse"}, generator=None, matters=True),
    ORACLE: Arm("the unlabelled patients, with annotated tumours", data="oracle", generator=None, matters=True),
}
# beside every arm against the baseline
COMPARISONS: tuple[tuple[str, str], ...] = (
    (FREETUMOR, CONTROL),
    (FREETUMOR, "constant"),
    (FREETUMOR, SYNTUMOR),
    ("edge + factor", SYNTUMOR),
    ("edge + factor", "constant, edge + factor"),
    ("diverse", FREETUMOR),
    ("diverse", SYNTUMOR),
)


def lacking_keys(arm: Arm, config: Config) -> list[str]:
    """Keys of an arm and of its generator that this version's configuration does not have."""
    recipe = GENERATORS[arm.generator] if arm.generator is not None else GeneratorRecipe()
    return sorted(key for key in {*arm.keys, *recipe.keys} if not has_key(config, key))
