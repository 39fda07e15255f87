"""Every size of the experiment: ``protocol.yaml``, then the user's file, frozen and checked."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX, float_zyx

_PACKAGE = "ftengine.bench.experiments.few_labels"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Phantoms(_Section):
    """What is drawn; a scanner is an index into ``volume.phantom.SCANNERS``."""

    seed: int = Field(ge=0)
    shape_zyx: IntZYX
    num_tumors: tuple[int, int]
    diameter_mm: tuple[float, float]
    contrast_factor: float = Field(gt=0)
    seen_scanners: tuple[int, ...] = Field(min_length=1)
    num_labelled: int = Field(ge=1)
    num_seeds: int = Field(ge=1, le=100)
    num_unlabelled: int = Field(ge=1, le=1000)
    num_test: int = Field(ge=1, le=1000)
    num_test_healthy: int = Field(ge=0, le=1000)


class Steps(_Section):
    """Training steps of S and the judges, of a student, of G."""

    segmenter: int = Field(ge=1)
    student: int = Field(ge=1)
    generator: int = Field(ge=1)


class LearningRates(_Section):
    """Of S from scratch, and of a student that goes on from S."""

    segmenter: float = Field(gt=0)
    student: float = Field(gt=0)


class Scoring(_Section):
    """What counts as small, as found, as false, and how many batches are painted to measure an arm's painting."""

    small_mm: float = Field(gt=0)
    half_overlap: float = Field(gt=0, le=1)
    min_false_voxels: int = Field(ge=1)
    measured_batches: int = Field(ge=1)


class SeedCounts(_Section):
    """How many of the asked seeds an arm gets: one that matters, and any other."""

    matters: int = Field(ge=1)
    others: int = Field(ge=1)


class Protocol(_Section):
    """The whole experiment; ``engine`` holds dotted keys of ``ftengine.config`` over the preset demo."""

    phantoms: Phantoms
    steps: Steps
    learning_rates: LearningRates
    scoring: Scoring
    seeds: SeedCounts
    engine: dict[str, Any]

    @property
    def spacing_mm_zyx(self) -> FloatZYX:
        """The grid of phantoms and store."""
        return float_zyx(self.config({}).region.spacing_mm_zyx)

    def config(self, keys: Mapping[str, Any]) -> Config:
        """The engine's configuration with ``keys`` on top. Raises ConfigError for a key that does not exist."""
        return Config.preset("demo").with_overrides({**self.engine, **keys})

    def to_yaml(self) -> str:
        """The whole protocol, as ``load_protocol`` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_protocol(file: Path | None = None, *, quick: bool = False) -> Protocol:
    """The shipped protocol, with the quick sizes where asked, then the keys of ``file``. Raises ConfigError naming file and key."""
    values = _shipped("protocol.yaml")
    if quick:
        values = _over(values, _shipped("quick.yaml"))
    if file is not None:
        values = _over(values, _read(file))
    where = "protocol.yaml" if file is None else str(file)
    try:
        protocol = Protocol.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    protocol.config({})  # refuses an unknown engine key before anything is drawn
    return protocol


def _shipped(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8"))
    return values


def _read(file: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); want a YAML file of the experiment.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{file}: holds a {type(given).__name__}; want sections, e.g. 'steps: {{student: 2000}}'.")
    return given


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``given``, section by section."""
    merged = dict(base)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged
