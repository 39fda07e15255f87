"""Label maps: value in a file -> value of the region, as a user states them or as the names of a data set settle them."""

import re
from collections.abc import Mapping

from ftengine.errors import ConfigError

_MAX_LISTED = 10


def parse_label_map(text: str, labels: Mapping[str, int], *, option: str = "--label-map") -> dict[int, int]:
    """``1=liver,2=liver_tumor,255=0`` as numbers: left a value of the files, right a label of the region by name or value.

    labels: the region's label names and values. option: where the text came from, for the error. Raises ConfigError for what is no
    pair, a value named twice, and a label that the region does not have.
    """
    names = {_plain(name): value for name, value in labels.items()}
    mapping: dict[int, int] = {}
    for pair in text.split(","):
        left, equals, right = (part.strip() for part in pair.partition("="))
        try:
            key = int(left)
            value = names[_plain(right)] if _plain(right) in names else int(right)
        except ValueError as error:
            raise ConfigError(
                f"{option} {text}: cannot read {pair!r}; want pairs VALUE=LABEL such as 1=1,3=1 with a whole number on the left and one of "
                f"{_listed(labels)} on the right."
            ) from error
        if not equals or value not in labels.values():
            raise ConfigError(
                f"{option} {text}: {pair!r} names no label of the region; want one of {_listed(labels)} on the right."
            )
        if mapping.get(key, value) != value:
            raise ConfigError(f"{option} {text}: {key} is mapped twice; want each value once.")
        mapping[key] = value
    return mapping


def map_by_name(
    names: Mapping[int, str], labels: Mapping[str, int] | None, stated: Mapping[int, int], where: str
) -> dict[int, int]:
    """The map of a data set that names its labels: ``stated`` where the user spoke, else the region's label of the same name.

    names: value in the files -> name ("" where a value has no name of its own). labels: the region's; None maps nothing but
    ``stated``. Background needs no entry. Raises ConfigError, naming them all, where a label's name is not the region's and the user
    did not map it: kept as a number it might become another organ.
    """
    if labels is None:
        return dict(stated)
    known = {_plain(name): value for name, value in labels.items()}
    mapping = dict(stated)
    foreign = []
    for value, name in sorted(names.items()):
        if value in mapping or value == 0:
            continue
        if _plain(name) in known:
            mapping[value] = known[_plain(name)]
        else:
            foreign.append(f"{value} ({name!r})" if name else f"{value} (of several names)")
    if foreign:
        more = f" and {len(foreign) - _MAX_LISTED} more" if len(foreign) > _MAX_LISTED else ""
        raise ConfigError(
            f"{where}: labels {', '.join(foreign[:_MAX_LISTED])}{more} are not labels of the region by name; want {_listed(labels)}. "
            f"Map each with --label-map {foreign[0].split()[0]}=LABEL (0 drops it)."
        )
    return mapping


def _plain(name: str) -> str:
    """A name as it is compared: case, spaces, hyphens and the two spellings of tumour do not count."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").replace("tumour", "tumor")


def _listed(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in sorted(labels.items(), key=lambda item: item[1]))
