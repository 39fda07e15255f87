"""Make a study: draw its cases, give them names that say nothing, write the study and, apart from it, its key."""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.files import sync
from ftengine.rng import Purpose, patch_rng
from ftengine.turing.cases import CaseDrawer, CaseOptions, DrawnCase, datasets_of
from ftengine.turing.study import (
    ANSWERS,
    CASES,
    SECRET_FILE,
    STUDY_FILE,
    Key,
    Mark,
    Reader,
    Showing,
    Study,
    StudyCase,
    Truth,
    commitment,
    make_secret,
    sha256_of_bytes,
)

_FILE_TIME = 946_684_800  # 2000-01-01: of every file of a case


@dataclass(frozen=True)
class ReaderName:
    """A reader as the command line names one."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class StudyOptions:
    """What a study consists of.

    per_type: cases of each type, half of them real. types: {organ: name of the type}. repeats: cases shown a second time, for
    intra-reader agreement. training_cases: further ones, shown first, whose truth is told.
    """

    per_type: int
    types: Mapping[str, str]
    readers: Sequence[ReaderName]
    seed: int = 0
    repeats: int = 0
    training_cases: int = 0


@dataclass(frozen=True)
class Built:
    """What was written. warnings: what may tell real from synthetic beside the tumour."""

    out: Path
    key: Path
    num_cases: int
    num_training: int
    num_showings: int
    case_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Named:
    """A drawn case with its random name."""

    id: str
    type: str
    drawn: DrawnCase


def build_study(
    drawer: CaseDrawer,
    config: Config,
    case_options: CaseOptions,
    options: StudyOptions,
    out: str | Path,
    key_path: str | Path,
    *,
    generator_sha256: str = "",
    judge_sha256: str = "",
    on_case: Callable[[str], None] = lambda _text: None,
) -> Built:
    """Write the study folder ``out`` and its key. Readers see where a tumour lies, as in the paper, where cases are centred on it.

    What is drawn follows from the seed; cases have random names, in whose order the seed shuffles them for each reader, so that nobody who
    knows the seed knows the truth. Nothing is written before all cases are drawn; the folder appears whole or not at all. Raises ConfigError for options that do not
    fit, for a place that is taken, and where there are too few cases.
    """
    out, key_path = Path(out), Path(key_path)
    check_options(options, config)
    check_places(out, key_path)
    named = _draw(drawer, options, on_case)
    main, training = _split(named, options)
    content = {case.id: case.drawn.image_hu.astype("<i2").tobytes() for case in named}
    truth = {case.id: _truth_of(case.drawn) for case in named}
    study_id, nonce = secrets.token_hex(8), secrets.token_hex(32)
    study = Study(
        id=study_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        created_by=f"ftengine {__version__}",
        region=config.region.name,
        spacing_mm_zyx=config.region.spacing_mm_zyx,
        shape_zyx=case_options.shape_zyx,
        window_hu=config.region.window_hu,
        types=tuple(options.types.values()),
        cases=tuple(
            StudyCase(
                id=case.id,
                type=case.type,
                sha256=sha256_of_bytes(content[case.id]),
                mark=_mark_of(case.drawn) if case_options.centered else None,
            )
            for case in named
        ),
        training={case.id: case.drawn.synthetic for case in training},
        readers=_readers(options, [c.id for c in training], main),
        key_sha256=commitment(study_id, nonce, truth),
    )
    study_json = study.model_dump_json(indent=1).encode() + b"\n"
    key = Key(
        study=study_id,
        study_sha256=sha256_of_bytes(study_json),
        nonce=nonce,
        truth=truth,
        seed=options.seed,
        generator_sha256=generator_sha256,
        judge_sha256=judge_sha256,
    )
    _write(out, key_path, study_json, content, key)
    return Built(
        out=out,
        key=key_path,
        num_cases=len(main),
        num_training=len(training),
        num_showings=len(study.readers[0].showings),
        case_bytes=study.case_bytes,
        warnings=_warnings([case.drawn for case in named]),
    )


def check_options(options: StudyOptions, config: Config) -> None:
    """ConfigError for options that do not fit each other or the region."""
    unknown = set(options.types) - set(config.region.organs)
    if unknown or not options.types:
        raise ConfigError(
            f"--type {', '.join(sorted(unknown)) or '(none)'}: region {config.region.name} has {', '.join(config.region.organs)}."
        )
    if len(set(options.types.values())) < len(options.types):
        raise ConfigError(f"--type: two types have one name ({', '.join(options.types.values())}); want a name each.")
    if not all(1 <= len(name) <= 60 for name in options.types.values()):
        raise ConfigError("--type: want names of 1 to 60 characters.")
    if options.per_type < 2 or options.per_type % 2:
        raise ConfigError(
            f"--per-type {options.per_type}: want an even number, half real and half synthetic (the paper: 18)."
        )
    if options.training_cases < 0 or options.training_cases % 2:
        raise ConfigError(f"--training-cases {options.training_cases}: want an even number, half real, half synthetic.")
    num_cases = options.per_type * len(options.types)
    if not 0 <= options.repeats <= num_cases:
        raise ConfigError(f"--repeats {options.repeats}: want 0 to {num_cases}, the cases of the study.")
    names = [reader.name for reader in options.readers]
    if not names or len(set(names)) < len(names) or len(names) > 9999:
        raise ConfigError("--reader: want at least one, at most 9999, and no name twice.")
    for reader in options.readers:
        if not 1 <= len(reader.name) <= 60 or len(reader.group) > 60:
            raise ConfigError(
                f"--reader {reader.name}:{reader.group}: want a name of 1 to 60 characters, a group of up to 60."
            )


def check_places(out: Path, key_path: Path) -> None:
    """ConfigError where a study or key is in the way, and where the key would lie in the study."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is already there; a study is never overwritten. Choose another --out.")
    if key_path.exists():
        raise ConfigError(f"{key_path}: is already there; a key is never overwritten. Choose another --key.")
    if key_path.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"--key {key_path}: lies inside the study folder {out}; want it apart, so that whoever has the study does not have the truth."
        )
    if not key_path.resolve().parent.is_dir():
        raise ConfigError(f"--key {key_path}: the folder {key_path.parent} is not there. Make it first.")


def _draw(drawer: CaseDrawer, options: StudyOptions, on_case: Callable[[str], None]) -> list[_Named]:
    """All cases in the order of their random names. Real ones first: they are scarcer, and take their volumes before painting does."""
    wanted = _counts(options)
    found: list[tuple[str, DrawnCase]] = []
    for synthetic in (False, True):
        for organ, name in options.types.items():
            drawn = drawer.painted(organ, wanted[organ]) if synthetic else drawer.real(organ, wanted[organ])
            found += [(name, case) for case in drawn]
            on_case(f"{name}: {len(drawn)} {'synthetic' if synthetic else 'real'}")
    return sorted((_Named(secrets.token_hex(8), name, case) for name, case in found), key=lambda case: case.id)


def _counts(options: StudyOptions) -> dict[str, int]:
    """Cases of an organ and a truth: half of its cases, and its share of the training cases."""
    half = options.training_cases // 2
    organs = list(options.types)
    return {
        organ: options.per_type // 2 + half // len(organs) + (number < half % len(organs))
        for number, organ in enumerate(organs)
    }


def _split(named: Sequence[_Named], options: StudyOptions) -> tuple[list[_Named], list[_Named]]:
    """The cases that count, and those for training."""
    main: list[_Named] = []
    training: list[_Named] = []
    rng = patch_rng(options.seed, Purpose.READER_STUDY, epoch=6)
    for name in options.types.values():
        for synthetic in (False, True):
            group = [case for case in named if case.type == name and case.drawn.synthetic == synthetic]
            group.sort(key=_source)  # not by their random names: the seed decides
            group = [group[i] for i in rng.permutation(len(group))]
            main += group[: options.per_type // 2]
            training += group[options.per_type // 2 :]
    return main, training


def _readers(options: StudyOptions, training: Sequence[str], main: Sequence[_Named]) -> tuple[Reader, ...]:
    repeated = _repeated(main, options)
    readers = []
    for number, reader in enumerate(options.readers):
        rng = patch_rng(options.seed, Purpose.READER_STUDY, epoch=4, index=number)
        shown = [(case, False, True) for case in rng.permutation(sorted(training)).tolist()]
        shown += [(case, repeat, False) for case, repeat in _order([case.id for case in main], repeated, rng)]
        showings = tuple(
            Showing(item=secrets.token_hex(8), case=case, repeat=repeat, training=is_training)
            for case, repeat, is_training in shown
        )
        readers.append(Reader(id=f"r{number + 1:02d}", name=reader.name, group=reader.group, showings=showings))
    return tuple(readers)


def _order(cases: Sequence[str], repeated: Sequence[str], rng: np.random.Generator) -> list[tuple[str, bool]]:
    """A random order of (case, whether it is the second time). cases: random names, so that the seed alone does not tell which is where.

    What comes twice comes first in the first half, as far as there is room, and again half of the cases later or at the end.
    """
    early = rng.permutation(max(len(repeated), len(cases) // 2))[: len(repeated)].tolist()
    others = iter(rng.permutation(sorted(set(cases) - set(repeated))).tolist())
    at = dict(zip(early, sorted(repeated), strict=True))
    order = [(at.get(place) or next(others), False) for place in range(len(cases))]
    for place in sorted(early):
        earliest = min(order.index((at[place], False)) + 1 + len(cases) // 2, len(order))
        order.insert(int(rng.integers(earliest, len(order) + 1)), (at[place], True))
    return order


def _repeated(main: Sequence[_Named], options: StudyOptions) -> list[str]:
    """The cases that are shown twice: types and truths in turn, so that they are as balanced as their number allows."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for case in sorted(main, key=_source):
        groups.setdefault((case.type, case.drawn.synthetic), []).append(case.id)
    rng = patch_rng(options.seed, Purpose.READER_STUDY, epoch=5)
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in groups.values()]
    in_turn = [group[n] for n in range(max(map(len, shuffled))) for group in shuffled if n < len(group)]
    return in_turn[: options.repeats]


def _source(case: _Named) -> tuple[str, str]:
    return case.drawn.store, case.drawn.case


def _mark_of(case: DrawnCase) -> Mark:
    return Mark(center_zyx=case.center_zyx, radius_mm=round(case.radius_mm, 2))


def _truth_of(case: DrawnCase) -> Truth:
    return Truth(
        synthetic=case.synthetic,
        organ=case.organ,
        mark=_mark_of(case),
        diameter_mm=round(case.diameter_mm, 2),
        store=case.store,
        case=case.case,
        dataset=case.dataset,
        origin_zyx=case.origin_zyx,
        proportion=case.proportion,
    )


def _warnings(cases: Sequence[DrawnCase]) -> tuple[str, ...]:
    """What a reader, or whoever judges the study, should know."""
    found = []
    real, painted = (datasets_of(cases, synthetic=s) for s in (False, True))
    if not real & painted:
        found.append(
            f"real cases come from {', '.join(sorted(real))}, painted ones from {', '.join(sorted(painted))}: a reader who tells the data sets "
            "apart tells the truth apart. Paint on volumes of the same data sets"
        )
    if all(case.proportion is None for case in cases):
        found.append("no judge: painted tumours that quality control would drop are in the study. Add --judge S.pt")
    sizes = [np.median([c.diameter_mm for c in cases if c.synthetic == s]) for s in (False, True)]
    if max(sizes) > 1.5 * min(sizes):
        found.append(
            f"real tumours have a median diameter of {sizes[0]:.0f} mm, painted ones of {sizes[1]:.0f} mm: size alone tells much. Narrow "
            "--min-diameter-mm and --max-diameter-mm, or change synthesis.size_weights"
        )
    return tuple(found)


def _write(out: Path, key_path: Path, study_json: bytes, content: Mapping[str, bytes], key: Key) -> None:
    """The key first, then the folder under its name: a study without a key would be lost work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(mode=0o700)
        (partial / CASES).mkdir()
        (partial / ANSWERS).mkdir(mode=0o700)
        for name in sorted(content):
            _write_file(partial / CASES / f"{name}.i16", content[name], 0o600)
            os.utime(partial / CASES / f"{name}.i16", (_FILE_TIME, _FILE_TIME))
        _write_file(partial / SECRET_FILE, make_secret(), 0o600)
        _write_file(partial / STUDY_FILE, study_json, 0o600)
        for folder in (partial / CASES, partial / ANSWERS, partial):
            sync(folder)
        _write_file(key_path, key.model_dump_json(indent=1).encode() + b"\n", 0o600)
        sync(key_path.resolve().parent)
        try:
            partial.rename(out)  # over an empty folder too
        except OSError:
            key_path.unlink()
            raise
        sync(out.resolve().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_file(path: Path, content: bytes, mode: int) -> None:
    """A new file, on the disk when this returns. Raises FileExistsError, which is an OSError, where it is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
