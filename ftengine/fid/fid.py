"""FID and KID of synthetic against real tumours, per tumour type, over several repeats (Table A4).

The real tumours are the labelled ones of some rows of a store, the same in every repeat; the synthetic ones are painted anew in each. By
default as many are painted as there are real ones, and as many of each size class. ``docs/fid.md`` says how to read the figures.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.evaluation.tables import Cell, ResultTable
from ftengine.fid.feature_networks import FeatureNetwork, NetworkInfo
from ftengine.fid.frechet import frechet_distance, kernel_distance, sample_advice
from ftengine.fid.tumor_images import CropRule, TumorImage, painted_tumors, real_tumors
from ftengine.store.reader import Store
from ftengine.synthesis.shape import size_class_of
from ftengine.types import Batch

FORMAT = 1
Sizes = Literal["matched", "painted"]
OnTumor = Callable[[], None]


@dataclass
class FeatureSet:
    """Features of the tumours of one organ. rows: float64 [samples, D] of each tumour; sizes: tumours by size class; names: volume and diameter."""

    rows: list[NDArray[np.float64]] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, tumor: TumorImage, size: str, rows: NDArray[np.float64]) -> None:
        """One more tumour."""
        self.rows.append(rows)
        self.sizes[size] += 1
        self.names.append(f"{tumor.case} {tumor.diameter_mm:.3f}")

    @property
    def features(self) -> NDArray[np.float64]:
        """All samples below one another."""
        return np.concatenate(self.rows)

    @property
    def num_samples(self) -> int:
        """How many rows ``features`` has."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Repeat:
    """One set of synthetic tumours against the real ones; fid and kid: None for fewer than two samples."""

    seed: int
    num_tumors: int
    num_samples: int
    sizes: Mapping[str, int]
    num_cut: int  # end where their patch ends: painted, and left out
    fid: float | None
    kid: float | None


@dataclass(frozen=True)
class OrganResult:
    """One tumour type. sizes: real tumours by size class."""

    num_tumors: int
    num_samples: int
    num_features: int
    sizes: Mapping[str, int]
    repeats: tuple[Repeat, ...]
    notes: tuple[str, ...]

    def cell(self, metric: Literal["fid", "kid"]) -> Cell:
        """One value a repeat that has one."""
        values = (getattr(r, metric) for r in self.repeats)
        return Cell(tuple(v for v in values if v is not None))


@dataclass(frozen=True)
class FidResult:
    """FID and KID of one way to paint.

    name: of its row in a table. settings: what two results must share to stand in one table. painter: what painted, and where.
    """

    name: str
    settings: Mapping[str, Any]
    painter: Mapping[str, Any]
    organs: Mapping[str, OrganResult]

    def to_json(self) -> dict[str, Any]:
        """Plain values: everything, with mean and standard deviation (N - 1) over the repeats."""
        organs = {}
        for name, organ in self.organs.items():
            summary = {
                metric: {"mean": organ.cell(metric).mean, "deviation": organ.cell(metric).deviation}
                for metric in ("fid", "kid")
            }
            organs[name] = {**summary, **asdict(organ)}
        return {
            "format": FORMAT,
            "name": self.name,
            "settings": dict(self.settings),
            "painter": dict(self.painter),
            "organs": organs,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "FidResult":
        """Read what ``to_json`` gave. Raises KeyError, TypeError or ValueError for anything else."""
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, want {FORMAT}")
        organs = {}
        for name, organ in document["organs"].items():
            values = {key: organ[key] for key in OrganResult.__dataclass_fields__}
            repeats = tuple(Repeat(**r) for r in values["repeats"])
            organs[str(name)] = OrganResult(**{**values, "repeats": repeats, "notes": tuple(values["notes"])})
        return cls(str(document["name"]), dict(document["settings"]), dict(document["painter"]), organs)


def read_result(path: Path) -> FidResult:
    """Read the JSON of a run. Raises ConfigError where the file is none."""
    try:
        return FidResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is no result of 'ftengine fid' of this version ({type(error).__name__}: {error}). Make it again."
        ) from error


def check_rows(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Names and settings of the rows of one table. Raises ConfigError where two were not measured in the same way, or have one name."""
    names = [name for name, _ in rows]
    if len(set(names)) < len(names):
        raise ConfigError(f"two rows are named alike ({', '.join(names)}); want a --name for each.")
    first_name, first = rows[0]
    for name, settings in rows[1:]:
        for key in sorted(first.keys() | settings.keys()):
            have, want = settings.get(key), first.get(key)
            if have != want:
                raise ConfigError(
                    f"{name}: was measured with {key}={have}, and {first_name} with {want}; want one setting for all rows of a table. Measure one "
                    "of them again."
                )


def compared(results: Sequence[FidResult], metric: Literal["fid", "kid"]) -> ResultTable:
    """Results as a table in the shape of Table A4: ways to paint down, tumour types across, mean and standard deviation over the repeats.

    KID is multiplied by 1000. The notes have those of the results. Raises ConfigError as ``check_rows``.
    """
    check_rows([(r.name, r.settings) for r in results])
    first = results[0]
    names = [r.name for r in results]
    organs = list(dict.fromkeys(name for r in results for name in r.organs))
    cells = {(r.name, organ): r.organs[organ].cell(metric) for r in results for organ in r.organs}
    num = max((len(o.repeats) for r in results for o in r.organs.values()), default=0)
    title, scale = ("FID", 1.0) if metric == "fid" else ("KID x 1000", 1000.0)
    network = first.settings["network"]
    return ResultTable(
        f"{title} of synthetic against real tumours ({network['name']}, one sample: {network['sample']})",
        "method",
        tuple(names),
        tuple(organs),
        cells,
        scale=scale,
        notes=(
            f"Lower is better. Mean and standard deviation of {num} repeats, each with newly painted tumours.",
            *(f"{r.name}: {note}" for r in results for o in r.organs.values() for note in o.notes),
        ),
        spread="deviation",
        order="lower",
    )


class Quota:
    """How many tumours of which organ and size class are still wanted of the painter."""

    def __init__(self, wanted: Mapping[str, Mapping[str, int]], sizes: Sequence[str], matched: Sizes) -> None:
        """wanted: by organ, then by size class; matched: whether the classes count, or the organ's sum alone."""
        self._is_matched = matched == "matched"
        self._sizes = sizes
        self._left = {
            organ: dict(counts) if self._is_matched else {"": sum(counts.values())} for organ, counts in wanted.items()
        }

    def wants(self, organ: str, size: str) -> bool:
        """Whether one more is wanted."""
        return self._left.get(organ, {}).get(size if self._is_matched else "", 0) > 0

    def take(self, organ: str, size: str) -> None:
        """One is there."""
        self._left[organ][size if self._is_matched else ""] -= 1

    @property
    def num_left(self) -> int:
        """How many are missing in all."""
        return sum(sum(counts.values()) for counts in self._left.values())

    def missing(self, organ: str) -> str:
        """What is missing of an organ, in words; empty where nothing is."""
        left = {size: n for size, n in self._left.get(organ, {}).items() if n}
        if not left:
            return ""
        return ", ".join(f"{left[size]} {size}".strip() for size in ("", *self._sizes) if size in left)


def ordered_sizes(config: Config) -> list[str]:
    """The names of the size classes, small ones first."""
    sizes = config.synthesis.sizes
    return sorted(sizes, key=lambda name: sum(sizes[name].radius_mm))


def shares_of(sizes: Mapping[str, int], num: int | None) -> dict[str, int]:
    """``num`` tumours in the size classes as ``sizes`` has them, by largest remainders; None: as many as there are."""
    total = sum(sizes.values())
    if num is None or not total:
        return dict(sizes)
    exact = {name: num * count / total for name, count in sizes.items()}
    result = {name: math.floor(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_rest[: num - sum(result.values())]:
        result[name] += 1
    return result


def collect_real(
    config: Config,
    store: Store,
    rows: Mapping[str, Sequence[int]],
    network: FeatureNetwork,
    *,
    on_tumor: OnTumor = lambda: None,
) -> dict[str, FeatureSet]:
    """Features of the labelled tumours, by organ; rows: of the index, by organ. An organ without any tumour is left out."""
    found: dict[str, FeatureSet] = {}
    for organ, numbers in rows.items():
        collected = FeatureSet()
        tumors = real_tumors(
            store, numbers, organ, config.region, network.box, num_threads=config.loader.reader_threads
        )
        for tumor in tumors:
            collected.add(tumor, _size(config, tumor.diameter_mm), network.features(tumor))
            on_tumor()
        if collected.rows:
            found[organ] = collected
    return found


def collect_painted(
    config: Config,
    store: Store,
    batches: Iterable[tuple[Batch, Batch]],
    network: FeatureNetwork,
    quota: Quota,
    *,
    on_tumor: OnTumor = lambda: None,
) -> tuple[dict[str, FeatureSet], Counter[str]]:
    """Features of painted tumours by organ, until the quota is full or the batches (before and after painting) end; and how many were cut."""
    found: defaultdict[str, FeatureSet] = defaultdict(FeatureSet)
    num_cut: Counter[str] = Counter()
    if not quota.num_left:
        return dict(found), num_cut

    def wants(organ: str, diameter_mm: float) -> bool:
        return quota.wants(organ, _size(config, diameter_mm))

    for before, after in batches:
        painted = painted_tumors(store, before, after, config.region, network.box, wants=wants)
        num_cut.update(painted.cut)
        for tumor in painted.tumors:
            size = _size(config, tumor.diameter_mm)
            if quota.wants(tumor.organ, size):  # a batch can hold more of a class than are left to take
                quota.take(tumor.organ, size)
                found[tumor.organ].add(tumor, size, network.features(tumor))
                on_tumor()
        if not quota.num_left:
            break
    return dict(found), num_cut


def organ_result(
    organ: str,
    real: FeatureSet,
    painted: Sequence[tuple[int, FeatureSet, int, str]],
) -> OrganResult:
    """One tumour type. painted: of each repeat the seed, the features, how many were cut, and what the quota misses."""
    repeats = []
    notes: dict[str, None] = {}
    for seed, synthetic, num_cut, missing in painted:
        enough = real.num_samples > 1 and synthetic.num_samples > 1
        a, b = (real.features, synthetic.features) if enough else (None, None)
        repeats.append(
            Repeat(
                seed,
                len(synthetic.rows),
                synthetic.num_samples,
                dict(synthetic.sizes),
                num_cut,
                None if a is None or b is None else frechet_distance(a, b),
                None if a is None or b is None else kernel_distance(a, b),
            )
        )
        if missing:
            notes[f"{organ}: could not be painted in the patches of a repeat: {missing}."] = None
        if not enough:
            notes[f"{organ}: fewer than two samples; no FID."] = None
    size = real.rows[0].shape[1]
    least = min((r.num_samples for r in repeats), default=0)
    advice = sample_advice(real.num_samples, least, size)
    if advice is not None:
        notes[f"{organ}: {advice}"] = None
    return OrganResult(len(real.rows), real.num_samples, size, dict(real.sizes), tuple(repeats), tuple(notes))


def settings_of(
    config: Config, network: NetworkInfo, rule: CropRule, real: Mapping[str, FeatureSet], sizes: Sizes, num: int | None
) -> dict[str, Any]:
    """What two results must share to stand in one table; ``real_sha256`` is of the volumes and diameters of the real tumours."""
    names = sorted(f"{organ} {name}" for organ, tumors in real.items() for name in tumors.names)
    return {
        "network": asdict(network),
        **asdict(rule),
        "window_hu": list(config.region.window_hu),
        "spacing_mm_zyx": list(config.region.spacing_mm_zyx),
        "sizes": sizes,
        "num": num,
        "radius_mm": {name: list(size.radius_mm) for name, size in config.synthesis.sizes.items()},
        "real_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }


def _size(config: Config, diameter_mm: float) -> str:
    return size_class_of(diameter_mm / 2, config.synthesis.sizes)
