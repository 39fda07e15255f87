"""The data scales of Table A11: which data sets each holds, with how many volumes, as printed."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from ftengine.errors import ConfigError


@dataclass(frozen=True)
class Subset:
    """One scale. volumes: data set -> volumes as printed. printed_total: of the table, None where it prints none."""

    name: str
    region: str
    volumes: dict[str, int]
    printed_total: int | None

    @property
    def num_volumes(self) -> int:
        """The sum over its data sets; the name of a scale is only rounded."""
        return sum(self.volumes.values())


def load_subsets() -> dict[str, Subset]:
    """All scales by name, each with everything that the scales it extends hold."""
    text = resources.files("ftengine.datasets").joinpath("subsets.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    subsets: dict[str, Subset] = {}
    for name, row in table.items():  # a scale stands below the one it extends
        base = subsets[row["extends"]].volumes if "extends" in row else {}
        subsets[name] = Subset(name, row["region"], base | row["volumes"], row.get("printed_total"))
    return subsets


def get_subset(name: str) -> Subset:
    """The scale of a name, whatever its case. Raises ConfigError listing all names."""
    subsets = load_subsets()
    found = {key.lower(): subset for key, subset in subsets.items()}.get(name.lower())
    if found is None:
        raise ConfigError(f"--subset {name}: there is no such scale; want one of {', '.join(subsets)} (Table A11).")
    return found
