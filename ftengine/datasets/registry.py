"""The registry of data sets: one YAML file a source (``sources/*.yaml``, Table A17 of the paper), and a user's own folder of such files.

Adding a data set is adding a YAML file. A field that nobody knows for sure is null (or left out), and a note says why: nothing here is
guessed. ``volumes`` is the number that the paper uses, which may be fewer than a source publishes.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ftengine.config import Config, RegionConfig
from ftengine.errors import ConfigError

Layout = Literal["folder", "nnunet", "msd", "dicom", "csv"]
RegionName = Literal["abdomen", "chest"]
LabelValue = Annotated[int, Field(ge=0, le=255)]
BACKGROUND = "background"
REGIONS: tuple[RegionName, ...] = ("abdomen", "chest")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OrganLabels(_Model):
    """A second label file of each volume, with organs: where it lies and what its values mean."""

    file: str  # a pattern like DatasetEntry.label
    label_map: dict[LabelValue, str]


class DatasetEntry(_Model):
    """One source of CT volumes.

    name: the data set's name in a store (``convert --dataset``). title: as Table A17 prints it. tumor: the class of ours that its
    labels hold, None without annotated tumours. volumes: how many the paper uses. image, label: where the files of a volume lie below
    the data set's folder, without extension, ``{id}`` standing for what changes (``imagesTr/{id}``); None: by the rules of the layout.
    label_map: value in the label file -> name of a label of the region, None where nobody knows; values that the file may hold and we
    do not use are named ``background``, so that an unknown value stays an error. overlaps: other entry -> what the two share.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    aliases: tuple[str, ...] = ()
    region: Literal["abdomen", "chest", "both"]
    tumor: str | None = None
    volumes: Annotated[int, Field(ge=1)] | None = None
    layout: Layout | None = None
    image: str | None = None
    label: str | None = None
    label_map: dict[LabelValue, str] | None = None
    organ_labels: tuple[OrganLabels, ...] = ()
    link: str | None = None
    overlaps: dict[str, str] = {}
    licence: str | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_ours(self) -> Self:
        known = {name for region in self.regions for name in _preset_region(region).labels}
        tumors = {name for region in self.regions for name in _tumor_names(_preset_region(region))}
        if self.tumor is not None and self.tumor not in tumors:
            raise ValueError(f"tumor={self.tumor!r}: want one of {', '.join(sorted(tumors))}, or null")
        for field, table in (
            ("label_map", self.label_map or {}),
            *(("organ_labels", o.label_map) for o in self.organ_labels),
        ):
            for value, name in table.items():
                if name not in known:
                    raise ValueError(
                        f"{field}.{value}={name!r}: want a label of the region: {', '.join(sorted(known))}"
                    )
        if self.label is not None and self.image is None:
            raise ValueError("label without image: want both patterns or none")
        for pattern in (self.image, self.label, *(o.file for o in self.organ_labels)):
            if pattern is not None and pattern.count("{id}") != 1:
                raise ValueError(f"pattern {pattern!r}: want {{id}} in it, once")
        return self

    @property
    def regions(self) -> tuple[RegionName, ...]:
        """The regions whose stores may hold this data set."""
        return REGIONS if self.region == "both" else (self.region,)

    @property
    def names(self) -> frozenset[str]:
        """Everything the data set is called, as ``plain_name`` writes it."""
        return frozenset(map(plain_name, (self.name, self.title, *self.aliases)))

    def label_values(self, region: RegionConfig) -> tuple[tuple[int, int], ...]:
        """``label_map`` with the values of a region, as ``Source.label_map`` takes it; a label that the region lacks is background.

        Raises ConfigError where the map is not known.
        """
        if self.label_map is None:
            raise ConfigError(
                f"data set {self.name}: its label values are not known; see 'ftengine datasets show {self.name}' and give --label-map."
            )
        return values_of(self.label_map, region)

    def to_yaml(self) -> str:
        """The entry as YAML that ``read_entry`` reads back; fields at their default are left out."""
        return yaml.safe_dump(self.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)


def values_of(label_map: Mapping[int, str], region: RegionConfig) -> tuple[tuple[int, int], ...]:
    """Pairs (value in the file, value in the region), ascending; a name that the region lacks becomes 0."""
    return tuple((value, region.labels.get(name, 0)) for value, name in sorted(label_map.items()))


def plain_name(text: str) -> str:
    """A name without case, spaces and signs, for comparing: ``MSD07-Pancreas`` and ``msd07_pancreas`` are one."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


class Registry:
    """All known data sets, ours and, where a folder is given, the user's."""

    def __init__(self, entries: Iterable[DatasetEntry]) -> None:
        """A later entry replaces an earlier one of its name. Raises ConfigError where two entries share a title or alias."""
        self.entries: dict[str, DatasetEntry] = dict(sorted({e.name: e for e in entries}.items()))
        self._by_name: dict[str, DatasetEntry] = {}
        for entry in self.entries.values():
            for name in entry.names:
                other = self._by_name.setdefault(name, entry)
                if other is not entry:
                    raise ConfigError(
                        f"data sets {other.name!r} and {entry.name!r} are both called {name!r}; want names, titles and aliases of their own."
                    )

    def get(self, name: str) -> DatasetEntry:
        """The entry of a name, title or alias, whatever its case. Raises ConfigError with the nearest name."""
        entry = self._by_name.get(plain_name(name))
        if entry is None:
            near = difflib.get_close_matches(plain_name(name), self._by_name, n=1, cutoff=0.5)
            hint = f" Did you mean {self._by_name[near[0]].name}?" if near else ""
            raise ConfigError(
                f"data set {name!r} is not in the registry.{hint} 'ftengine datasets list' shows all; --registry DIR adds your own."
            )
        return entry

    def find(self, name: str) -> DatasetEntry | None:
        """The entry of a name, title or alias; None for an unknown one."""
        return self._by_name.get(plain_name(name))

    def overlaps(self, name: str) -> dict[str, str]:
        """What an entry shares with others, whichever of the two says so."""
        entry = self.get(name)
        said_by_others = {e.name: e.overlaps[entry.name] for e in self.entries.values() if entry.name in e.overlaps}
        return dict(sorted((said_by_others | entry.overlaps).items()))


def load_registry(folder: Path | None = None) -> Registry:
    """The shipped entries and those of ``folder`` (``*.yaml``), which replace shipped ones of the same name.

    Raises ConfigError naming the file for anything that is not an entry, and where a folder holds none.
    """
    shipped = [
        _entry(file.read_text(encoding="utf-8"), file.name)
        for file in sorted(resources.files("ftengine.datasets").joinpath("sources").iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    ]
    if folder is None:
        return Registry(shipped)
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"--registry {folder}: holds no *.yaml; want a folder with one file a data set.")
    return Registry([*shipped, *map(read_entry, files)])


def read_entry(file: Path) -> DatasetEntry:
    """One entry from its file. Raises ConfigError naming the file and the key."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text; want YAML.") from error
    return _entry(text, str(file))


def _entry(text: str, where: str) -> DatasetEntry:
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: want a mapping with name, title, region and so on, one data set a file.")
    try:
        entry = DatasetEntry.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{where}: {line}" for line in _explain(error))) from error
    if Path(where).stem != entry.name:
        raise ConfigError(
            f"{where}: describes the data set {entry.name!r}; want the file to be named {entry.name}.yaml."
        )
    return entry


def _explain(error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, DatasetEntry.model_fields, n=1, cutoff=0.5)
            yield f"{key}: there is no such key." + (f" Did you mean {near[0]}?" if near else "")
        else:
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")


@cache
def _preset_region(name: RegionName) -> RegionConfig:
    return Config.preset(name).region


def _tumor_names(region: RegionConfig) -> set[str]:
    return {name for name, value in region.labels.items() if value in region.tumor_values}
