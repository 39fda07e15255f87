"""``ftengine bench few-labels``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ftengine.bench.experiments.few_labels.arms import ARMS, lacking_keys
from ftengine.bench.experiments.few_labels.protocol import Protocol, load_protocol
from ftengine.bench.experiments.few_labels.report import write_report
from ftengine.bench.experiments.few_labels.schedule import run_units
from ftengine.bench.experiments.few_labels.units import Unit, plan
from ftengine.errors import ConfigError, FtengineError
from ftengine.experiments.schedule import Outcome

PROTOCOL = "protocol.yaml"


class UnitsFailedError(FtengineError):
    """Some units failed; the others are done and reported."""


def parse_seeds(text: str) -> list[int]:
    """``0-4`` or ``0,2,5-7`` as numbers, in the given order. Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ConfigError(f"--seeds {text}: want numbers and ranges, e.g. 0-4 or 0,2,5-7.")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def choose_arms(names: Sequence[str] | None, protocol: Protocol) -> tuple[list[str], dict[str, list[str]]]:
    """The arms that this version can run of those asked for (None: all), and the others with the keys they lack."""
    unknown = [name for name in names or () if name not in ARMS]
    if unknown:
        raise ConfigError(f"--arms {', '.join(unknown)}: no such arm; want some of {'; '.join(ARMS)}.")
    config = protocol.config({})
    lacking = {name: lacking_keys(ARMS[name], config) for name in names or ARMS}
    return [n for n, keys in lacking.items() if not keys], {n: keys for n, keys in lacking.items() if keys}


def keep_protocol(folder: Path, protocol: Protocol) -> None:
    """Write the protocol into a new experiment's folder. Raises ConfigError where the folder holds one of another protocol."""
    file = folder / PROTOCOL
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty and holds no experiment; choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(protocol.to_yaml(), encoding="utf-8")
        return
    before, now = load_protocol(file).model_dump(mode="json"), load_as_written(protocol)
    changed = sorted(
        f"{section}.{key}" if isinstance(now[section], dict) else section
        for section in now
        for key in (now[section] if isinstance(now[section], dict) else [section])
        if before[section] != now[section] and before[section].get(key) != now[section].get(key)
    )
    if before != now:
        raise ConfigError(
            f"{folder}: was begun with other values of {', '.join(changed) or 'its keys'}; units of two protocols cannot be compared. "
            "Choose another --out, or leave --config and --quick as they were."
        )


def load_as_written(protocol: Protocol) -> dict[str, dict[str, object]]:
    """The protocol as it reads once it has been a file: YAML knows no tuples."""
    import yaml

    values: dict[str, dict[str, object]] = yaml.safe_load(protocol.to_yaml())
    return Protocol.model_validate(values).model_dump(mode="json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done yet, then report what is."""
    parser = argparse.ArgumentParser(
        prog="ftengine bench few-labels",
        description="Does painting on unlabelled volumes help a segmenter that has few labels? Paired seeds on phantoms, hours, resumable.",
    )
    parser.add_argument("--out", type=Path, help="folder of the experiment; one that was begun there goes on")
    parser.add_argument("--config", type=Path, help="YAML file of sizes over protocol.yaml (docs/few-labels.md)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="default: all; --list names them")
    parser.add_argument("--seeds", default="0-4", help="e.g. 0-4 or 0,2,5-7; default: 0-4")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; default: 1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each; default: 1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, for every process")
    parser.add_argument("--quick", action="store_true", help="seconds: every part runs, the figures mean nothing")
    parser.add_argument(
        "--stop-after", type=float, metavar="SECONDS", help="begin nothing that would not be done by then"
    )
    parser.add_argument("--data-only", action="store_true", help="only make the phantoms' store, to carry elsewhere")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report what is done")
    parser.add_argument("--list", action="store_true", help="list the arms")
    parser.add_argument("--json", action="store_true", help="print summary.json")
    options = parser.parse_args(arguments)
    if options.out is None:
        if not options.list:
            raise ConfigError("few-labels: want --out DIR, the folder of the experiment.")
        _list(load_protocol(options.config, quick=options.quick))
        return
    saved = options.out / PROTOCOL
    is_as_begun = saved.exists() and options.config is None and not options.quick
    protocol = load_protocol(saved if is_as_begun else options.config, quick=options.quick)
    arms, lacking = choose_arms(options.arms, protocol)
    if options.list:
        _list(protocol)
        return
    keep_protocol(options.out, protocol)
    outcome = Outcome()
    if not options.report_only:
        units = [Unit("data")] if options.data_only else plan(arms, _seeds(options.seeds, protocol), protocol.seeds)
        outcome = run_units(
            options.out,
            units,
            jobs=options.jobs,
            device=options.device,
            threads=options.threads,
            stop_after_s=options.stop_after,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    document = write_report(options.out, protocol, lacking)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print((options.out / "results.md").read_text(encoding="utf-8"))
    if outcome.num_left:
        print(f"{outcome.num_left} units are left; the same command goes on", file=sys.stderr)
    if outcome.failed:
        reasons = "\n".join(f"{slug}: {reason}" for slug, reason in outcome.failed.items())
        raise UnitsFailedError(f"{len(outcome.failed)} units failed, the others are done:\n{reasons}")


def _seeds(text: str, protocol: Protocol) -> list[int]:
    seeds = parse_seeds(text)
    if max(seeds) >= protocol.phantoms.num_seeds:
        raise ConfigError(
            f"--seeds {text}: the protocol has labelled volumes for seeds 0 to {protocol.phantoms.num_seeds - 1} (phantoms.num_seeds)."
        )
    return seeds


def _list(protocol: Protocol) -> None:
    config, counts = protocol.config({}), protocol.seeds
    for name, arm in ARMS.items():
        lacking = lacking_keys(arm, config)
        state = (
            f"  [this version lacks {', '.join(lacking)}]"
            if lacking
            else f"  [{counts.matters if arm.matters else counts.others} seeds]"
        )
        print(f"{name:<24} {arm.says}{state}")
