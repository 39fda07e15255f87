"""The results of the units that are done, as a JSON document, a Markdown page and pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ftengine.bench.experiments.few_labels.arms import ARMS, BASELINE, COMPARISONS, FREETUMOR, GENERATORS, ORACLE
from ftengine.bench.experiments.few_labels.pictures import draw_differences, draw_outcomes
from ftengine.bench.experiments.few_labels.protocol import Protocol
from ftengine.bench.experiments.few_labels.statistics import Comparison, compare, sd
from ftengine.bench.experiments.few_labels.units import Unit, is_done, read_result
from ftengine.bench.timing import environment

NOTICE = (
    "Phantoms are drawn from formulas and show no patient. The figures compare methods with one another on this task; none of them is "
    "evidence about real CT."
)
_START = "S, where all start"


def write_report(folder: Path, protocol: Protocol, lacking: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write ``summary.json``, ``results.md`` and the pictures into ``folder``; returns what ``summary.json`` holds.

    lacking: arms that this version cannot run, with the keys it lacks.
    """
    document = summarize(folder, protocol) | {"unavailable": {name: list(keys) for name, keys in lacking.items()}}
    (folder / "summary.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    names = [name for name in document["arms"] if name != _START]
    if BASELINE in names:
        draw_differences(folder / "differences.png", document["comparisons"], BASELINE)
        draw_outcomes(folder / "outcomes.png", {name: document["arms"][name] for name in names})
    (folder / "results.md").write_text(as_markdown(document, protocol), encoding="utf-8")
    return document


def summarize(folder: Path, protocol: Protocol) -> dict[str, Any]:
    """All figures as plain values: by arm, by comparison, by generator and by judge."""
    seeds = range(protocol.phantoms.num_seeds)
    results: dict[str, dict[int, dict[str, Any]]] = {
        _START: _results(folder, [Unit("segmenter", seed=seed) for seed in seeds]),
        **{name: _results(folder, [Unit("student", name, seed) for seed in seeds]) for name in ARMS},
    }
    results = {name: by_seed for name, by_seed in results.items() if by_seed}
    dice = {name: _figure_of(by_seed, "dice") for name, by_seed in results.items() if name != _START}
    pairs = [(name, BASELINE) for name in dice if name != BASELINE]
    comparisons = compare(dice, [*pairs, *COMPARISONS])
    one = next((r for by_seed in results.values() for r in by_seed.values()), {})
    return {
        "notice": NOTICE,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
        "device": one.get("device"),
        "num_tumors": one.get("num_tumors"),
        "arms": {name: _arm_document(by_seed) for name, by_seed in results.items()},
        "comparisons": [_comparison_document(c) for c in comparisons],
        "generators": {
            name: {
                seed: result["painting"]
                for seed, result in _results(folder, [Unit("generator", name, seed) for seed in seeds]).items()
                if "painting" in result
            }
            for name in GENERATORS
        },
        "judges": {
            kind: {seed: _real_passes(result) for seed, result in _results(folder, units).items()}
            for kind, units in (
                ("few", [Unit("segmenter", seed=seed) for seed in seeds]),
                ("many", [Unit("judge", seed=seed) for seed in seeds]),
            )
        },
        "acceptance": {
            f"{name} above {BASELINE}": next(
                (c.mean > 0 for c in comparisons if (c.first, c.second) == (name, BASELINE)), None
            )
            for name in (ORACLE, FREETUMOR)
        },
        "protocol": protocol.model_dump(mode="json"),
    }


def _results(folder: Path, units: Sequence[Unit]) -> dict[int, dict[str, Any]]:
    return {unit.seed: read_result(folder, unit) for unit in units if is_done(folder, unit)}


def _figure_of(by_seed: Mapping[int, dict[str, Any]], name: str) -> dict[int, float]:
    values = {seed: result["figures"][name] for seed, result in by_seed.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _arm_document(by_seed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(by_seed.values()))
    rates = [r["quality"]["qc/pass_rate"] for r in by_seed.values() if r.get("quality", {}).get("painted")]
    contrasts = [r["painting"]["contrast_hu"] for r in by_seed.values() if "painting" in r]
    return {
        "seeds": sorted(by_seed),
        "figures": {name: _spread(list(_figure_of(by_seed, name).values())) for name in first["figures"]},
        "dice_by_seed": _figure_of(by_seed, "dice"),
        "pass_rate": _spread(rates),
        "painted_share": _spread([r["mix"]["painted"] for r in by_seed.values() if r.get("mix", {}).get("painted")]),
        "contrast_hu": _mean_contrast(contrasts),
        "train_s": _median([r["train_s"] for r in by_seed.values() if not r["resumed"]]),
    }


def _mean_contrast(contrasts: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Percentiles and deviation of what is painted, mean over seeds."""
    known = [c for c in contrasts if c["sd"] is not None]
    if not known:
        return None
    percentiles = {p: float(np.mean([c["percentiles"][p] for c in known])) for p in known[0]["percentiles"]}
    return {**percentiles, "sd": float(np.mean([c["sd"] for c in known]))}


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {"mean": float(np.mean(values)), "sd": sd(values), "n": len(values)}


def _median(values: Sequence[float]) -> float | None:
    """For seconds of wall time, which one paused run would spoil."""
    return float(np.median(values)) if values else None


def _comparison_document(c: Comparison) -> dict[str, Any]:
    return {**asdict(c), "mean": c.mean, "sd": c.sd, "n": len(c.seeds)}


def _real_passes(result: Mapping[str, Any]) -> dict[str, Any]:
    """Share of the real (test) tumours of which S sees at least T of the voxels, by T; all, and hypodense alone."""
    tumors = [t for v in result["volumes"] for t in v["tumors"]]
    return {
        kind: {str(t): float(np.mean([x["overlap"] >= t for x in chosen])) if chosen else None for t in (0.5, 0.7, 0.9)}
        for kind, chosen in (("all", tumors), ("hypo", [t for t in tumors if t["kind"] == "hypo"]))
    }


def as_markdown(document: Mapping[str, Any], protocol: Protocol) -> str:
    """The page for ``bench/results``."""
    where = document["environment"]
    steps, phantoms = protocol.steps, protocol.phantoms
    parts = [
        f"# Few labels on phantoms, {document['date']}",
        "",
        document["notice"],
        "",
        (
            f"Report by commit {where['commit']}, Python {where['python']}, torch {where['torch']}, {where['cores']} cores {where['machine']}, device "
            f"{document['device']}. `ftengine bench few-labels`, protocol and words: `docs/few-labels.md`."
        ),
        "",
        (
            f"{phantoms.num_labelled} labelled volumes a seed, {phantoms.num_unlabelled} unlabelled, {phantoms.num_test} test volumes with tumours and "
            f"{phantoms.num_test_healthy} without ({_tumor_counts(document['num_tumors'])}). S: {steps.segmenter} steps from scratch; every arm goes on "
            f"from S of its seed for {steps.student} steps; G: {steps.generator} steps."
        ),
        "",
        *_main_table(document),
        *_comparison_table(document),
        *_detail_table(document),
        *_painting_table(document),
        *_generator_table(document),
        *_judge_table(document),
    ]
    if document.get("unavailable"):
        parts += ["", "## Not run", ""]
        parts += [f"- {name}: this version lacks {', '.join(keys)}" for name, keys in document["unavailable"].items()]
    verdicts = {True: "yes", False: "no", None: "not run"}
    parts += ["", "## Acceptance", ""]
    parts += [f"- {text}, mean of the paired differences: {verdicts[v]}" for text, v in document["acceptance"].items()]
    return "\n".join(parts) + "\n"


def _main_table(document: Mapping[str, Any]) -> list[str]:
    against = {c["first"]: c for c in document["comparisons"] if c["second"] == BASELINE}
    lines = [
        "## Arms",
        "",
        (
            "Dice in the organ, mean ± sd over seeds; difference: to the baseline of the same seed, by seed, then its mean ± sd; small: under "
            f"{document['protocol']['scoring']['small_mm']:g} mm, share found by any overlap / by half of its voxels; false positives a volume; passed: "
            "share of the painted patches that quality control let through."
        ),
        "",
        "| arm | n | Dice | difference by seed | mean ± sd | p | p (Holm) | small any / half | false, ill | false, healthy | passed | train s, median |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in document["arms"].items():
        c, f = against.get(name), arm["figures"]
        by_seed = " ".join(f"{d:+.3f}" for d in c["differences"]) if c else ""
        lines.append(
            f"| {name} | {len(arm['seeds'])} | {_text(f['dice'])} | {by_seed} | {_signed(c)} | {_p(c, 'p')} | {_p(c, 'p_holm')} "
            f"| {_mean(f['small_any'])} / {_mean(f['small_half'])} | {_text(f['false_per_tumor_volume'], 2)} | {_text(f['false_per_healthy_volume'], 2)} "
            f"| {_mean(arm['pass_rate'])} | {_seconds(arm['train_s'])} |"
        )
    return lines


def _comparison_table(document: Mapping[str, Any]) -> list[str]:
    others = [c for c in document["comparisons"] if c["second"] != BASELINE]
    lines = [
        "",
        (
            f"Two-sided paired t-tests on Dice; Holm's correction over all {sum(c['p'] is not None for c in document['comparisons'])} of them, those of "
            "the next table included. Test and unlabelled volumes are shared by the seeds, so p describes the labelled set and the initialisation alone."
        ),
    ]
    if not others:
        return lines
    lines += [
        "",
        "| difference of Dice | n | by seed | mean ± sd | 95 % interval | p | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in others:
        by_seed = " ".join(f"{d:+.3f}" for d in c["differences"])
        interval = "" if c["interval"] is None else f"{c['interval'][0]:+.3f} to {c['interval'][1]:+.3f}"
        lines.append(
            f"| {c['first']} - {c['second']} | {c['n']} | {by_seed} | {_signed(c)} | {interval} | {_p(c, 'p')} | {_p(c, 'p_holm')} |"
        )
    return lines


def _detail_table(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## Kinds, sizes, scanners",
        "",
        "Share of tumours found by any overlap / by half of their voxels. Dice everywhere: predictions outside the organ count too.",
        "",
        "| arm | hypodense | hyperdense | rim | large | Dice, seen scanners | unseen | Dice everywhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in document["arms"].items():
        f = arm["figures"]
        kinds = " | ".join(
            f"{_mean(f[f'{kind}_any'])} / {_mean(f[f'{kind}_half'])}" for kind in ("hypo", "hyper", "rim", "large")
        )
        lines.append(
            f"| {name} | {kinds} | {_mean(f['dice_seen_scanners'], 3)} | {_mean(f['dice_unseen_scanners'], 3)} | {_text(f['dice_anywhere'])} |"
        )
    return lines


def _painting_table(document: Mapping[str, Any]) -> list[str]:
    painting = {name: arm["contrast_hu"] for name, arm in document["arms"].items() if arm["contrast_hu"]}
    if not painting:
        return []
    names = [key for key in next(iter(painting.values())) if key != "sd"]
    lines = [
        "",
        "## What is painted",
        "",
        "Contrast of the painted tumours before any verdict, HU: mean inside minus mean of the organ 1.5 to 6 mm around it; percentiles, mean over seeds.",
        "",
        f"| arm | {' | '.join(f'{n} %' for n in names)} | sd |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, values in painting.items():
        lines.append(f"| {name} | {' | '.join(f'{values[n]:+.0f}' for n in names)} | {values['sd']:.1f} |")
    return lines


def _generator_table(document: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, by_seed in document["generators"].items():
        for seed, painting in by_seed.items():
            contrast = painting["contrast_hu"]
            if contrast["sd"] is not None:
                shown = " | ".join(f"{contrast['percentiles'][p]:+.0f}" for p in ("5", "50", "95"))
                rows.append(f"| {name} | {seed} | {shown} | {contrast['sd']:.1f} |")
    if not rows:
        return []
    return [
        "",
        "The same of each G as it was trained, without soft edge, factor or kinds, seed by seed.",
        "",
        "| G | seed | 5 % | 50 % | 95 % | sd |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _judge_table(document: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "## What the judge passes",
        "",
        "Share of the real test tumours (whole volume predicted) and of what G paints (few-volume judge) of which S sees at least T.",
        "",
        "| judge, on | seed | T = .5 | T = .7 | T = .9 |",
        "|---|---|---|---|---|",
    ]
    for kind, by_seed in document["judges"].items():
        for seed, real in by_seed.items():
            for group, passes in real.items():
                lines.append(
                    f"| {kind}, real {group} | {seed} | {' | '.join(_share(passes[t]) for t in ('0.5', '0.7', '0.9'))} |"
                )
    for name, by_seed in document["generators"].items():
        for seed, painting in by_seed.items():
            shares = " | ".join(_share(painting["passes"][t]) for t in ("0.5", "0.7", "0.9"))
            lines.append(f"| few, painted by G ({name}) | {seed} | {shares} |")
    return lines


def _tumor_counts(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "not scored yet"
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("hypo", "hyper", "rim"))
    return f"{counts['all']} tumours, {counts['small']} small; {kinds}"


def _text(spread: Mapping[str, Any] | None, digits: int = 3) -> str:
    if spread is None:
        return ""
    return _mean(spread, digits) + ("" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}")


def _mean(spread: Mapping[str, Any] | None, digits: int = 2) -> str:
    return "" if spread is None else f"{spread['mean']:.{digits}f}"


def _signed(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return ""
    deviation = comparison["sd"]
    return f"{comparison['mean']:+.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _p(comparison: Mapping[str, Any] | None, key: str) -> str:
    value = None if comparison is None else comparison[key]
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
