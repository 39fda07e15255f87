"""Every tunable of ftengine: frozen, validated at birth, one file. Defaults name their origin; adr/0004 has the reasons.

A configuration is a preset (``ftengine/presets/*.yaml``), then a user's YAML file, then ``--set key=value``. A YAML file may start
from a preset with ``preset: abdomen``; a mapping in it replaces only the keys it names, except for the region's tables
(``labels``, ``organs``) and the size tables, which are replaced whole.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Range = tuple[float, float]

# Mappings that are one value: a user's table replaces the preset's, so that an organ can also be taken away.
_WHOLE_TABLES = frozenset(
    {
        "region.labels",
        "region.organs",
        "loader.dataset_weights",
        "synthesis.sizes",
        "synthesis.size_weights",
        "synthesis.realistic_shapes",
    }
)
POOLED_SHAPE = "pooled"  # the law of organs without one of their own in ``synthesis.realistic_shapes``


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class OrganConfig(_Section):
    """One organ that can carry tumours: the label values of its healthy tissue and of its tumour."""

    organ: int = Field(ge=1, le=255)
    tumor: int = Field(ge=1, le=255)


class RegionConfig(_Section):
    """A body region: grid, intensity window, patch and label values. Stores are made for one region."""

    name: str
    spacing_mm_zyx: tuple[Positive, Positive, Positive]  # reference table 1.1
    window_hu: tuple[float, float]  # mapped to [0, 1] and clipped; reference table 1.1
    patch_zyx: tuple[int, int, int]  # voxels; reference table 1.1
    labels: dict[str, int]
    organs: dict[str, OrganConfig]

    @model_validator(mode="after")
    def _values_are_consistent(self) -> Self:
        low, high = self.window_hu
        if not low < high:
            raise ValueError(f"window_hu={self.window_hu}: want low < high, in HU")
        if any(n < 8 for n in self.patch_zyx):
            raise ValueError(f"patch_zyx={self.patch_zyx}: want at least 8 voxels on each axis")
        values = sorted(self.labels.values())
        if values != list(range(len(values))):
            raise ValueError(
                f"labels have the values {values}: want 0, 1, 2, ... without a gap, 0 being the background"
            )
        for name, organ in self.organs.items():
            missing = {organ.organ, organ.tumor} - set(values)
            if missing:
                raise ValueError(f"organs.{name} names label values {sorted(missing)} that labels does not list")
        return self

    @property
    def num_classes(self) -> int:
        """Number of label values, background included."""
        return len(self.labels)

    @property
    def tumor_values(self) -> tuple[int, ...]:
        """Label values of all tumour classes, ascending."""
        return tuple(sorted(o.tumor for o in self.organs.values()))

    @property
    def organ_channel(self) -> dict[str, int]:
        """Output channel of the generator for each organ: the organ's place in ``organs``."""
        return {name: i for i, name in enumerate(self.organs)}


class LoaderConfig(_Section):
    """Which patches are read, and how far ahead."""

    # how fast batches come, never what is in them
    SPEED_ONLY: ClassVar[tuple[str, ...]] = ("reader_threads", "reads_in_flight", "queue_batches", "max_bad_fraction")

    reader_threads: int = Field(default=2, ge=1, le=256)  # that decode chunks
    reads_in_flight: int = Field(default=16, ge=1)  # reads issued ahead of the pipeline; over a network, take many
    queue_batches: int = Field(default=2, ge=1)  # finished batches waiting for the training step
    positive_fraction: Probability = 0.5  # released code, stage 2: pos:neg 1:1
    class_balanced: bool = (
        False  # draw the class of a positive patch first, all alike, as nnU-Net; released code: by voxels
    )
    annotated_fraction: Probability | None = (
        0.5  # patches from tumour-annotated volumes in a mixed batch; few-labels trial: 1:1. None: by dataset_weights
    )
    # visits of each volume of a data set in a pass, on average (the released code's repeat factors); 1 for one that is not named
    dataset_weights: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    # patches, of as many batches in a row, that are cut from one read; measured in bench/results: reads are not what is slow
    crops_per_read: int = Field(default=1, ge=1, le=16)
    patches_per_epoch: int | None = Field(default=None, ge=1)  # None: one patch of each volume in the mix
    small_volumes: Literal["pad", "refuse"] = "pad"  # smaller than the patch; padded with air, as MONAI and nnU-Net do
    absent_classes: Literal["refuse", "allow"] = "refuse"  # classes of the label table that no volume of the run holds
    max_bad_fraction: Probability = 0.01  # of the reads of a run (of at least 100): more that fail stop it


class AugmentConfig(_Section):
    """Random changes of a patch after the crop; order and probabilities of the released code (reference 1.1)."""

    flip_probability: Probability = 0.2  # for each axis on its own
    rot90_probability: Probability = 0.2  # in the axial plane, 1 to 3 quarter turns
    scale_probability: Probability = 0.1
    scale_range: Probability = 0.1  # intensity times 1 +- this
    shift_probability: Probability = 0.1
    shift_range: Probability = 0.1  # intensity +- this, on the [0, 1] scale


class SizeClassConfig(_Section):
    """One size class of tumours, in millimetres."""

    radius_mm: Range  # each of the three radii is drawn uniformly from it
    warp_sigma_mm: Range  # standard deviation of the 3 x 3 displacement grids, drawn uniformly from it

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        if not 0 < self.radius_mm[0] <= self.radius_mm[1]:
            raise ValueError(f"radius_mm={self.radius_mm}: want 0 < low <= high, in mm")
        if not 0 <= self.warp_sigma_mm[0] <= self.warp_sigma_mm[1]:
            raise ValueError(f"warp_sigma_mm={self.warp_sigma_mm}: want 0 <= low <= high, in mm")
        return self


# Table in reference 1.4 (voxels of the released abdomen code) times its 1.5 mm.
_RELEASED_SIZES_MM = {
    "tiny": SizeClassConfig(radius_mm=(4.5, 7.5), warp_sigma_mm=(0.75, 1.5)),
    "small": SizeClassConfig(radius_mm=(9.0, 15.0), warp_sigma_mm=(1.5, 3.0)),
    "medium": SizeClassConfig(radius_mm=(18.0, 30.0), warp_sigma_mm=(4.5, 9.0)),
    "large": SizeClassConfig(radius_mm=(36.0, 60.0), warp_sigma_mm=(7.5, 15.0)),
}


class RealisticShapeConfig(_Section):
    """How the tumours of one organ are drawn by ``synthesis.shape: realistic``; a main ellipsoid and lobes that overlap it, all warped.

    A tumour is drawn in mm and scaled until the ellipsoids together have the drawn volume; r is the radius of the ball of that volume.
    """

    source: str  # which real tumours the numbers were fitted to
    volume_ml: Positive  # median of the log-normal volume
    volume_log_sigma: float = Field(ge=0.0)  # standard deviation of its natural logarithm
    volume_range_ml: Range  # the log-normal is cut to it
    axis_log_sigma_zyx: tuple[float, float, float] = Field()  # main ellipsoid: standard deviation of log(radius / r)
    lobes: float = Field(ge=0.0, le=32.0)  # mean of their Poisson number at r = 20 mm
    lobes_power: float = Field(ge=-3.0, le=3.0)  # that mean grows as (r / 20 mm) ** this
    lobe_offset: Range  # centre of a lobe, 1 being the surface of the main ellipsoid; uniform, in a random direction
    lobe_radius: Range  # of a lobe over that of the main ellipsoid, uniform
    warp_sigma: Range  # standard deviation of the displacements over an ellipsoid's own mean radius, uniform

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        for name in ("volume_range_ml", "lobe_radius"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={low, high}: want 0 < low <= high")
        for name in ("lobe_offset", "warp_sigma"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name}={low, high}: want 0 <= low <= high")
        if not self.volume_range_ml[0] <= self.volume_ml <= self.volume_range_ml[1]:
            raise ValueError(f"volume_ml={self.volume_ml}: want a median inside volume_range_ml={self.volume_range_ml}")
        if min(self.axis_log_sigma_zyx) < 0:
            raise ValueError(f"axis_log_sigma_zyx={self.axis_log_sigma_zyx}: want at least 0")
        return self


def shipped_shapes() -> dict[str, Any]:
    """The laws of ``synthesis.shape: realistic`` that ship with ftengine (``shapes.yaml``), as plain values: {organ or ``pooled``: law}."""
    shapes: dict[str, Any] = yaml.safe_load(
        resources.files("ftengine").joinpath("shapes.yaml").read_text(encoding="utf-8")
    )
    return shapes


# Counts of SyntheticTumors (reference 1.4), which gives three ranges for four classes: that tiny and small share one is ours
MANY_TUMORS = {"tiny": (3, 10), "small": (3, 10), "medium": (2, 5), "large": (1, 3)}


# which synthesisers (and the variant released) use a key that not all do; ``diverse_keys`` are checked on their own
_USED_BY: Mapping[str, frozenset[str]] = {
    "texture_sigma_mm": frozenset({"freetumor", "constant"}),
    "contrast_factor": frozenset({"freetumor", "constant"}),
    "edge_sigma_mm": frozenset({"freetumor", "constant", "copy-paste"}),
    "paste": frozenset({"copy-paste"}),
    "paste_turns": frozenset({"copy-paste"}),
    "syntumor_contrast_hu": frozenset({"syntumor"}),
    "syntumor_edge_mm": frozenset({"syntumor"}),
}


class SynthesisConfig(_Section):
    """How tumours are painted (Eq. 1, or as ``synthesizer`` says; docs/synthesisers.md)."""

    # what paints; freetumor takes a generator, the others take none (Tables A6 and A14 compare it with copy-paste and syntumor)
    synthesizer: Literal["freetumor", "constant", "copy-paste", "syntumor"] = "freetumor"
    variant: Literal["paper", "released"] = "paper"  # of freetumor
    shape: Literal["paper", "realistic"] = (
        "paper"  # realistic: drawn by realistic_shapes, not by sizes (docs/shapes.md)
    )
    fraction: Probability = 1.0  # of the eligible patches; released code: all of them
    num_tumors: int = Field(default=1, ge=1, le=16)  # per painted patch; released code: always 1
    sizes: dict[str, SizeClassConfig] = _RELEASED_SIZES_MM
    size_weights: dict[str, float] = {"tiny": 0.25, "small": 0.25, "medium": 0.25, "large": 0.25}  # released, abdomen
    # an organ that is not named here has the law ``pooled``; a table given by a user replaces the shipped laws of the organs it names
    realistic_shapes: dict[str, RealisticShapeConfig] = Field(
        default_factory=dict
    )  # shapes.yaml, fitted (docs/shapes.md)
    min_organ_voxels: int = Field(
        default=64, ge=1
    )  # an organ with fewer voxels in the patch is not painted: no room for a tiny tumour
    center_margin_mm: float = Field(
        default=3.0, ge=0.0
    )  # erosion of the organ for the centres; released: 5 x 5 voxels of 1.5 mm
    texture_sigma_mm: Range = (0.75, 2.25)  # g(x) of Eq. 1; few-labels trial: U(0.5, 1.5) voxels of 1.5 mm
    edge_sigma_mm: float = Field(
        default=0.0, ge=0.0
    )  # 0: hard mask as in the paper; the few-labels trial gained with 1.2 mm
    contrast_factor: Range = (1.0, 1.0)  # times tanh(G(x)), drawn uniformly; the few-labels trial gained with (0.5, 2)
    fixed_contrast: float = Field(
        default=0.2, gt=-1.0, lt=1.0
    )  # in place of tanh(G(x)) where no generator is given: about -50 HU in liver
    # what G leaves constant (few-labels 4: a narrow, always hypodense contrast); of freetumor, variant paper, and constant; all off by default
    hyperdense_fraction: Probability = 0.0  # of the painted patches are brighter than their organ
    rim_fraction: Probability = 0.0  # of the painted patches have a rim of the other sign around the core
    rim_width_mm: Range = (1.5, 4.5)  # drawn uniformly, cut to a third of the smallest radius; ours, no source
    rim_contrast: Range = (0.5, 1.0)  # the rim's contrast over the core's, drawn uniformly; ours, no source
    # mean contrast inside M, drawn uniformly, in place of contrast_factor: G decides the texture alone. None: G decides both
    target_contrast_hu: Range | None = None
    # deviation of the contrast inside M over its mean, from a noise field; drawn uniformly; ours, no source
    heterogeneity: Range = (0.0, 0.0)
    # copy-paste
    paste: Literal["absolute", "contrast"] = (
        "absolute"  # HU as cut, or over the tissue around; few-labels trial: absolute
    )
    paste_turns: bool = True  # flips, and turns by 90 degrees between axes of one spacing, drawn for each tumour
    bank_mb: int = Field(default=256, ge=1)  # of 10^6 bytes: memory of all cut tumours, in equal parts to the organs
    bank_least_mm3: float = Field(
        default=27.0, ge=0.0
    )  # a smaller component is not cut; few-labels 2: 8 voxels of 1.5 mm
    # syntumor; reference 5.1 (D) and 1.6 (edge, in voxels of 1 mm)
    syntumor_contrast_hu: Range = (65.0, 145.0)  # D, drawn uniformly
    syntumor_edge_mm: Range = (1.0, 2.0)  # standard deviation of the mask's blur, drawn uniformly
    # many: a class or the mix of all, and as many as SyntheticTumors has of it (reference 1.4); one: as num_tumors says
    syntumor_tumors: Literal["one", "many"] = "one"
    # below the cost floor (docs/synthesis-cost.md); the defaults are the paper's way
    box: Literal["full", "auto"] = "full"  # auto: G and S see a box around the tumour
    box_context_mm: float = Field(default=18.0, ge=0.0)  # tissue around it: small tumours at 1.5 mm fit boxes of 64
    box_least_vox: int = Field(default=64, ge=32, multiple_of=32)  # a box's side: SwinUNETR wants 64, a U-Net takes 32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of G and S; auto: bf16 on a GPU that has it, else fp32
    )
    channels_last: bool = False  # G and S with channels last in memory
    compile: bool = False  # G and S through torch.compile
    cuda_graphs: bool = True  # on a GPU: G and S as CUDA graphs, since the host that launches them sets the pace

    @field_validator("realistic_shapes", mode="before")
    @classmethod
    def _over_the_shipped_shapes(cls, value: Any) -> Any:
        return {**shipped_shapes(), **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        if self.box == "auto" and self.variant == "released":
            raise ValueError("box=auto with variant=released: its texture reaches beyond a box; set one of them back")
        if self.shape == "realistic" and self.variant == "released":
            raise ValueError(
                "shape=realistic with variant=released: the released code knows its own shapes only; set one of them to paper"
            )
        unknown = set(self.size_weights) - set(self.sizes)
        if unknown:
            raise ValueError(f"size_weights names {sorted(unknown)}, sizes has {sorted(self.sizes)}")
        foreign = set(self.size_weights) - set(_RELEASED_SIZES_MM)
        if self.variant == "released" and foreign:
            raise ValueError(
                f"size_weights names {sorted(foreign)}; variant released knows {sorted(_RELEASED_SIZES_MM)}"
            )
        if any(w < 0 for w in self.size_weights.values()) or sum(self.size_weights.values()) <= 0:
            raise ValueError(f"size_weights={self.size_weights}: want weights of at least 0 with a positive sum")
        if not 0 <= self.texture_sigma_mm[0] <= self.texture_sigma_mm[1]:
            raise ValueError(f"texture_sigma_mm={self.texture_sigma_mm}: want 0 <= low <= high, in mm")
        if not 0 <= self.contrast_factor[0] <= self.contrast_factor[1]:
            raise ValueError(f"contrast_factor={self.contrast_factor}: want 0 <= low <= high")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_synthesizer(self) -> Self:
        name = self.synthesizer
        if self.variant == "released" and name != "freetumor":
            raise ValueError(
                f"variant=released with synthesizer={name}: it is a variant of freetumor; set one of them back"
            )
        if name == "copy-paste" and self.shape == "realistic":
            raise ValueError(
                "shape=realistic with synthesizer=copy-paste: cut tumours have their own shapes; set shape to paper"
            )
        if self.diverse_keys and (self.variant == "released" or name not in {"freetumor", "constant"}):
            raise ValueError(
                f"{', '.join(self.diverse_keys)} with synthesizer={name}, variant={self.variant}: these keys change what freetumor "
                "(variant paper) and constant paint; set them back"
            )
        if self.target_contrast_hu is not None and self.contrast_factor != (1.0, 1.0):
            raise ValueError(
                f"target_contrast_hu with contrast_factor={self.contrast_factor}: both decide the contrast; set contrast_factor to [1, 1]"
            )
        if self.idle_keys:
            defaults = {key: type(self).model_fields[key].default for key in self.idle_keys}
            raise ValueError(
                f"{', '.join(self.idle_keys)} with synthesizer={name}, variant={self.variant}, which do not use them; set them back: "
                + ", ".join(f"{key}={_as_yaml(value)}" for key, value in defaults.items())
            )
        if self.syntumor_tumors == "many":
            self._many_tumors_fit()
        for key in ("rim_contrast", "heterogeneity", "syntumor_contrast_hu", "syntumor_edge_mm", "target_contrast_hu"):
            _require_ordered(key, getattr(self, key))
        if not 0 < self.rim_width_mm[0] <= self.rim_width_mm[1]:
            raise ValueError(f"rim_width_mm={self.rim_width_mm}: want 0 < low <= high, in mm")
        if self.heterogeneity[1] > 1:
            raise ValueError(
                f"heterogeneity={self.heterogeneity}: want at most 1: beyond, much of a tumour changes its sign"
            )
        return self

    def _many_tumors_fit(self) -> None:
        if self.synthesizer != "syntumor" or self.num_tumors != 1 or self.shape != "paper":
            raise ValueError(
                f"syntumor_tumors=many with synthesizer={self.synthesizer}, num_tumors={self.num_tumors}, shape={self.shape}: want "
                "syntumor, which then draws the number by size class, 1 and paper; set syntumor_tumors to one"
            )
        foreign = set(self.size_weights) - set(MANY_TUMORS)
        if foreign:
            raise ValueError(f"size_weights names {sorted(foreign)}; syntumor_tumors=many knows {sorted(MANY_TUMORS)}")

    @property
    def needs_generator(self) -> bool:
        """Whether a generator decides the contrast; without one, freetumor paints ``fixed_contrast``."""
        return self.synthesizer == "freetumor"

    @property
    def idle_keys(self) -> list[str]:
        """The keys that differ from their default and do nothing with this synthesiser and variant."""
        way = "released" if self.variant == "released" else self.synthesizer
        return [
            key
            for key, ways in _USED_BY.items()
            if way not in ways and getattr(self, key) != type(self).model_fields[key].default
        ]

    @property
    def diverse_keys(self) -> list[str]:
        """The keys that are on of those that vary what G leaves constant."""
        is_on = {
            "hyperdense_fraction": self.hyperdense_fraction > 0,
            "rim_fraction": self.rim_fraction > 0,
            "target_contrast_hu": self.target_contrast_hu is not None,
            "heterogeneity": self.heterogeneity[1] > 0,
        }
        return [key for key, on in is_on.items() if on]


def _as_yaml(value: Any) -> str:
    """As ``--set`` takes it."""
    return str(list(value) if isinstance(value, tuple) else value)


def _require_ordered(key: str, values: Range | None) -> None:
    if values is not None and not 0 <= values[0] <= values[1]:
        raise ValueError(f"{key}={values}: want 0 <= low <= high")


# The diverse variant of freetumor or constant: what G leaves constant is drawn. Ours; the contrasts span those of the few-labels phantoms
DIVERSE: Mapping[str, Any] = {
    "synthesis.edge_sigma_mm": 1.2,
    "synthesis.contrast_factor": (1.0, 1.0),
    "synthesis.target_contrast_hu": (10.0, 60.0),
    "synthesis.hyperdense_fraction": 0.15,
    "synthesis.rim_fraction": 0.15,
    "synthesis.heterogeneity": (0.0, 0.4),
}


class QualityConfig(_Section):
    """Quality control of painted patches (Eq. 4-5)."""

    threshold: float | None = Field(default=0.7, ge=0.0, le=1.0)  # T, Table A15; None: keep every painted patch
    retries: int = Field(default=0, ge=0, le=20)  # redraws of a failed patch; paper: none
    min_pass_rate: Probability = (
        0.1  # a healthy generator passes 0.23 or more (few-labels 4), a failed one 0.12 and falling
    )
    window: int = Field(default=200, ge=1)  # painted patches over which the pass rate is taken


class NetworkConfig(_Section):
    """The segmenter: S, and the student (docs/networks.md)."""

    # swinunetr: paper 4.5; the others: its baselines (Tables A5, A7), as published or as nnU-Net plans them
    name: Literal["swinunetr", "unet", "dynunet", "unetr", "transunet"] = "swinunetr"
    feature_size: int = Field(default=48, ge=12)  # swinunetr; Table A19: 72 M parameters. A multiple of 12
    # unet: channels of its levels; the first works at full resolution, each but the last halves it
    channels: tuple[int, ...] = Field(default=(16, 32, 64, 128), min_length=2)
    width: int = Field(default=32, ge=2)  # dynunet, transunet: channels of the first level; nnU-Net: 32
    # unetr, transunet: size of a token, ViT-B: 768. A multiple of 12, the number of heads
    transformer_width: int = Field(default=768, ge=12)
    transformer_layers: int = Field(default=12, ge=1)  # transunet; ViT-B: 12, which unetr always has
    checkpointing: bool = True  # swinunetr: recompute activations; costs 1.8 % arithmetic (reference 2.2)
    # swinunetr: which of the eight voxels of a 2 x 2 x 2 block make a token of the next stage. all: each once, as published. repeated: two of
    # them twice and two never, as in MONAI before 1.5 (its issue 8284): for weights that were trained with it, all released ones among them
    patch_merging: Literal["all", "repeated"] = "all"
    axes: Literal["zyx", "xyz"] = (
        "zyx"  # swinunetr: order of the axes inside the network; xyz: for weights trained on such arrays
    )

    @field_validator("feature_size", "transformer_width")
    @classmethod
    def _multiple_of_12(cls, value: int, info: ValidationInfo) -> int:
        if value % 12:
            raise ValueError(f"{info.field_name}={value}: want a multiple of 12 (the attention heads)")
        return value

    @model_validator(mode="after")
    def _axes_fit(self) -> Self:
        if self.axes == "xyz" and self.name != "swinunetr":
            raise ValueError(f"axes=xyz with name={self.name}: it is for the weights of others, which are swinunetr's")
        return self


class GeneratorConfig(_Section):
    """G and the classifier C: the same 3-D U-Net (reference 1.2)."""

    width: int = Field(
        default=8, ge=1
    )  # channels of the first convolution; the released network has 32 and costs 2.4 times S
    initial_scale: Positive = 0.05  # standard deviation of G's last layer, so that the first tumours are faint
    # which output paints an organ: its own (paper), or the first for all of them (the released code; reference 1.6 #12)
    channel: Literal["organ", "first"] = "organ"
    axes: Literal["zyx", "xyz"] = "zyx"  # as network.axes


class TrainingConfig(_Section):
    """Segmentation training (paper 4.5 and Table A19)."""

    batch_size: int = Field(
        default=4, ge=1
    )  # Table A19; of each process, and of each batch that ``accumulate`` adds up
    accumulate: int = Field(default=1, ge=1)  # batches of a step whose gradients are added up; paper: 1
    steps: int = Field(default=100_000, ge=1)  # updates of the weights
    learning_rate: Positive = 3e-4  # Table A19
    warmup_steps: int = Field(default=1_000, ge=0)
    weight_decay: float = Field(default=0.01, ge=0.0)  # torch's AdamW default, which the released code ends up with
    amsgrad: bool = False  # released code: true
    clip_norm: Positive | None = None  # released code: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # released code: fp16
    compile: bool = False  # the network through torch.compile
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)  # moving average of the weights; paper: none
    cutmix_probability: Probability = (
        0.0  # of a batch; released code: 1, with image and label cut apart (reference 2.1 #7)
    )
    validate_every: int | None = Field(
        default=None, ge=1
    )  # None: with each checkpoint, if volumes are named (--val-split)
    validate_unit: Literal["steps", "epochs"] = "steps"  # of validate_every; released code: epochs
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)  # the newest of them; each has the weights three times (AdamW)

    @model_validator(mode="after")
    def _cutmix_has_partners(self) -> Self:
        if self.cutmix_probability > 0 and self.batch_size == 1:
            raise ValueError("cutmix_probability > 0 with batch_size=1: a patch has no partner; want at least 2")
        return self


class GeneratorTrainingConfig(_Section):
    """Synthesis training: G against the frozen S and the classifier C (Eq. 2-3)."""

    batch_size: int = Field(default=4, ge=1)  # Table A19; as in training
    accumulate: int = Field(default=1, ge=1)  # as in training
    steps: int = Field(default=20_000, ge=1)
    optimizer: Literal["adamw", "adam"] = "adamw"  # Table A19; released code: adam (reference 1.6 #13)
    schedule: Literal["cosine", "constant"] = "cosine"  # Table A19; released code: constant
    learning_rate: Positive = 1e-4  # Table A19
    betas: tuple[Probability, Probability] = (0.9, 0.999)  # paper: AdamW; the released code has (0, 0.999)
    weight_decay: float = Field(default=0.01, ge=0.0)  # adam adds it to the gradient; released code: 0
    warmup_steps: int = Field(default=0, ge=0)
    clip_norm: Positive | None = None  # of G and of C; released code: none
    lambda_cls: float = Field(default=0.1, ge=0.0)  # Eq. 3; released code: 0.1, chest 0.5
    losses: Literal["both", "seen", "fools"] = (
        "both"  # Table A16; seen: Eq. 2 alone, without C; fools: L_cls of Eq. 3 alone
    )
    loss_form: Literal["paper", "released"] = (
        "paper"  # released: linear, pooled, any tumour class (reference 1.6 #7, #8)
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # released code: fp32, chest fp16
    compile: bool = False  # G, C and S through torch.compile
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)  # moving average of G's weights; paper: none
    pictures_every: int | None = Field(default=None, ge=1)  # steps between pictures of the same few painted patches
    num_pictures: int = Field(default=2, ge=1, le=32)
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)  # the newest of them; each has the weights three times (AdamW)


class EvaluationConfig(_Section):
    """How predictions are scored; every definition: docs/evaluation.md."""

    surface: Literal["elements", "voxels"] = "elements"  # as surface-distance (areas count); voxels: as MONAI
    tolerance_mm: float = Field(default=2.0, ge=0.0)  # of the normalised surface Dice; the paper has none: ours
    connectivity: Literal[6, 18, 26] = 26  # of single lesions, as in the store's index
    match: Literal["any", "overlap", "iou"] = "any"  # which lesions are found; paper: any overlap
    match_fraction: float = Field(default=0.5, gt=0.0, le=1.0)  # least overlap or IoU of the other two rules: ours
    diameter: Literal["axial", "3d", "equivalent"] = "axial"  # WHO; the paper does not say which
    small_mm: Positive = 20.0  # paper: small tumours are those of less than 2 cm
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # of all intervals


class TrackingConfig(_Section):
    """Where a run shows its figures, beside ``metrics.jsonl`` (docs/checkpoints.md)."""

    use: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)  # the others by their extras
    project: str = Field(default="ftengine", min_length=1)  # of wandb; the experiment of mlflow


class InferenceConfig(_Section):
    """Sliding-window prediction."""

    overlap: float = Field(default=0.75, ge=0.0, lt=1.0)  # released validation
    windows_per_call: int = Field(default=4, ge=1)  # released validation
    weighting: Literal["constant", "gaussian"] = "constant"  # released validation


class Config(_Section):
    """The whole configuration. ``Config.preset("abdomen").with_overrides({"training.batch_size": 2})``."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"  # auto: cuda where there is one, else cpu
    region: RegionConfig
    loader: LoaderConfig = LoaderConfig()
    augment: AugmentConfig = AugmentConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    qc: QualityConfig = QualityConfig()
    network: NetworkConfig = NetworkConfig()
    generator: GeneratorConfig = GeneratorConfig()
    training: TrainingConfig = TrainingConfig()
    generator_training: GeneratorTrainingConfig = GeneratorTrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _patch_fits_the_augmentation(self) -> Self:
        _, y, x = self.region.patch_zyx
        if self.augment.rot90_probability > 0 and y != x:
            raise ValueError(
                f"augment.rot90_probability > 0 needs a square axial patch, region.patch_zyx={self.region.patch_zyx}; set it to 0"
            )
        return self

    @classmethod
    def preset(cls, name: str) -> "Config":
        """A configuration that ships with ftengine; ``preset_names`` lists them."""
        return cls.from_dict(_preset_dict(name), where=f"preset {name}")

    @classmethod
    def from_file(cls, path: str | Path, *, default_preset: str = "abdomen") -> "Config":
        """Read a YAML file; ``preset: NAME`` at its top chooses what it starts from. Raises ConfigError naming file and field."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); want a YAML configuration file.") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8 text; want a YAML configuration file saved as UTF-8.") from error
        try:
            given = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise ConfigError(
                f"{path}: holds a {type(given).__name__}; want a mapping of sections, e.g. 'training: {{steps: 100}}'."
            )
        base = _preset_dict(str(given.pop("preset", default_preset)))
        return cls.from_dict(_merge(base, given), where=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "configuration") -> "Config":
        """Validate plain values, as of YAML or JSON. Raises ConfigError with one line a problem."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(error))) from error

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Config":
        """A copy with dotted keys replaced: ``{"loader.reader_threads": 4}``. Raises ConfigError for an unknown key."""
        values = self.model_dump(mode="python")
        for key, value in overrides.items():
            *parents, last = key.split(".")
            target = values
            for parent in parents:
                inner = target.get(parent)
                if not isinstance(inner, dict):
                    raise ConfigError(_unknown_key(key))
                target = inner
            if last not in target and not any(key.startswith(f"{table}.") for table in _WHOLE_TABLES):
                raise ConfigError(_unknown_key(key))
            target[last] = value
        return type(self).from_dict(values, where="--set" if overrides else "configuration")

    def with_assignments(self, assignments: Sequence[str]) -> "Config":
        """A copy with ``key=value`` texts applied; values are read as YAML (``true``, ``3e-4``, ``[1, 2]``)."""
        overrides = {}
        for text in assignments:
            key, separator, value = text.partition("=")
            if not separator or not key:
                raise ConfigError(f"--set {text}: want key=value, e.g. --set training.batch_size=2")
            try:
                overrides[key.strip()] = _number(yaml.safe_load(value))
            except yaml.YAMLError as error:
                raise ConfigError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from error
        return self.with_overrides(overrides)

    def to_yaml(self) -> str:
        """The whole configuration as YAML that ``from_file`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("ftengine").joinpath("presets").iterdir()
        if p.name.endswith(".yaml")
    )


def _preset_dict(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise ConfigError(f"preset {name!r} does not exist; there are {', '.join(preset_names())}.")
    text = resources.files("ftengine").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    parent = values.pop("preset", None)
    return values if parent is None else _merge(_preset_dict(parent), values)


def _merge(base: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in given.items():
        path = f"{prefix}{key}"
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and path not in _WHOLE_TABLES:
            merged[key] = _merge(old, value, f"{path}.")
        else:
            merged[key] = value
    return merged


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 (no dot) as text; users mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterable[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _known_keys(info.annotation, f"{prefix}{name}.")


def _unknown_key(key: str) -> str:
    known = list(_known_keys())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or difflib.get_close_matches(
        key.rsplit(".", maxsplit=1)[-1], [k.rsplit(".", maxsplit=1)[-1] for k in known], n=1, cutoff=0.5
    )
    full = [k for k in known if k == near[0] or k.endswith(f".{near[0]}")] if near else []
    hint = f" Did you mean {full[0]}?" if full else ""
    return f"{key}: there is no such key.{hint} 'ftengine config' lists all keys."


def _explain(error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield _unknown_key(key)
        else:
            text = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], (dict, BaseModel)) else f" (got {problem['input']!r})"
            yield f"{key}: {text}{shown}" if key else f"{text}"


__all__ = [
    "AugmentConfig",
    "Config",
    "FloatZYX",
    "GeneratorConfig",
    "IntZYX",
    "RegionConfig",
    "SynthesisConfig",
    "preset_names",
]
