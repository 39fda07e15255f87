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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class SynthesisConfig(_Section):
    """How tumours are painted (Eq. 1)."""

    variant: Literal["paper", "released"] = "paper"
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
    # below the cost floor (docs/synthesis-cost.md); the defaults are the paper's way
    box: Literal["full", "auto"] = "full"  # auto: G and S see a box around the tumour
    box_context_mm: float = Field(default=18.0, ge=0.0)  # tissue around it: small tumours at 1.5 mm fit boxes of 64
    box_least_vox: int = Field(default=64, ge=32, multiple_of=32)  # a box's side: SwinUNETR wants 64, a U-Net takes 32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of G and S; auto: bf16 on a GPU that has it, else fp32
    )
    channels_last: bool = False  # G and S with channels last in memory
    compile: bool = False  # G and S through torch.compile

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


class QualityConfig(_Section):
    """Quality control of painted patches (Eq. 4-5)."""

    threshold: float | None = Field(default=0.7, ge=0.0, le=1.0)  # T, Table A15; None: keep every painted patch
    retries: int = Field(default=0, ge=0, le=20)  # redraws of a failed patch; paper: none
    min_pass_rate: Probability = (
        0.1  # a healthy generator passes 0.23 or more (few-labels 4), a failed one 0.12 and falling
    )
    window: int = Field(default=200, ge=1)  # painted patches over which the pass rate is taken


class NetworkConfig(_Section):
    """The segmenter: S, and the student."""

    name: Literal["swinunetr", "unet"] = "swinunetr"  # paper 4.5
    feature_size: int = Field(default=48, ge=12)  # swinunetr; Table A19: 72 M parameters. A multiple of 12
    # unet: channels of its levels; the first works at full resolution, each but the last halves it
    channels: tuple[int, ...] = Field(default=(16, 32, 64, 128), min_length=2)
    checkpointing: bool = True  # swinunetr: recompute activations; costs 1.8 % arithmetic (reference 2.2)

    @field_validator("feature_size")
    @classmethod
    def _multiple_of_12(cls, value: int) -> int:
        if value % 12:
            raise ValueError(f"feature_size={value}: want a multiple of 12 (SwinUNETR's attention heads)")
        return value


class GeneratorConfig(_Section):
    """G and the classifier C: the same 3-D U-Net (reference 1.2)."""

    width: int = Field(
        default=8, ge=1
    )  # channels of the first convolution; the released network has 32 and costs 2.4 times S
    initial_scale: Positive = 0.05  # standard deviation of G's last layer, so that the first tumours are faint


class TrainingConfig(_Section):
    """Segmentation training (paper 4.5 and Table A19)."""

    batch_size: int = Field(default=4, ge=1)  # Table A19
    steps: int = Field(default=100_000, ge=1)
    learning_rate: Positive = 3e-4  # Table A19
    warmup_steps: int = Field(default=1_000, ge=0)
    weight_decay: float = Field(default=0.01, ge=0.0)  # torch's AdamW default, which the released code ends up with
    clip_norm: Positive | None = None  # released code: none
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)  # the newest of them; each has the weights three times (AdamW)


class GeneratorTrainingConfig(_Section):
    """Synthesis training: G against the frozen S and the classifier C (Eq. 2-3)."""

    batch_size: int = Field(default=4, ge=1)  # Table A19
    steps: int = Field(default=20_000, ge=1)
    learning_rate: Positive = 1e-4  # Table A19
    betas: tuple[Probability, Probability] = (0.9, 0.999)  # paper: AdamW; the released code has (0, 0.999)
    weight_decay: float = Field(default=0.01, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    lambda_cls: float = Field(default=0.1, ge=0.0)  # Eq. 3
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=1_000, ge=1)
    keep_checkpoints: int = Field(default=1, ge=1)  # the newest of them; each has the weights three times (AdamW)


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
        """A configuration that ships with ftengine: abdomen, chest or demo."""
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
