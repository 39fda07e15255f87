"""What ``ftengine bench loader`` prints: the figures that the goals are about, Markdown, a chart."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GOALS = {
    "crops, times nnU-Net": 2.0,
    "painted, times MONAI PersistentDataset augmented": 10.0,
    "painted, times nnU-Net augmented": 10.0,
    "read cost of blosc2": 1.25,
    "share of the undelayed rate": 0.8,
    "memory growth": 0.05,
    "peak_gb": 1.5,
    "first_batch_s": 5.0,
    "plan_s": 60.0,
    "wait_share": 0.01,
}


def figures(document: Mapping[str, Any]) -> dict[str, float]:
    """The figures that the goals are about, by the goal's name; what was not measured is left out."""
    found: dict[str, float] = {}
    rows = document.get("rates", {}).get("rows", {})

    def times(goal: str, ours: str, theirs: str) -> None:
        if ours in rows and theirs in rows:
            found[goal] = rows[ours]["patches_per_s"] / rows[theirs]["patches_per_s"]

    times("crops, times nnU-Net", "ftengine, crops", "nnunet, crops")
    times("painted, times MONAI PersistentDataset augmented", "ftengine, painted", "monai-persistent, augmented")
    times("painted, times nnU-Net augmented", "ftengine, painted", "nnunet, augmented")
    if "reads" in document:
        cost = read_medians(document["reads"])
        found["read cost of blosc2"] = max(
            cost[f"ftengine store | {n}"] / cost[f"blosc2, arrays kept open | {n}"] for n in (1, 2)
        )
    if "slow_storage" in document:
        found["share of the undelayed rate"] = max(document["slow_storage"]["share_of_undelayed"].values())
    if "soak" in document:
        found["memory growth"], found["peak_gb"] = document["soak"]["growth"], document["soak"]["peak_gb"]
    if "first_batch" in document:
        found["first_batch_s"] = document["first_batch"]["s"]
    if "plan" in document:
        found["plan_s"] = document["plan"]["s"]
    return found


def read_medians(reads: Mapping[str, Any], what: str = "cpu_ms") -> dict[str, float]:
    """Median of a patch by reader and threads."""
    return {name: statistics.median(s[what] for s in kept) for name, kept in reads["samples"].items()}


def as_text(document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"### {document['title']}", ""]
    if "rates" in document:
        lines += ["| candidate | patches/s | CPU ms a patch | painted |", "|---|---|---|---|"]
        for name, row in document["rates"]["rows"].items():
            painted = f"{row['painted_share']:.0%}" if "painted_share" in row else ""
            lines.append(f"| {name} | {row['patches_per_s']:.1f} | {row['cpu_ms_a_patch']:.1f} | {painted} |")
        for name, tried in document["rates"]["workers_tried"].items():
            shown = ", ".join(f"{workers} workers {rate:.1f}" for workers, rate in tried.items())
            lines += ["", f"{name}: patches/s with {shown}; the fastest ran."]
    if "reads" in document:
        cpu, wall = read_medians(document["reads"]), read_medians(document["reads"], "wall_ms")
        lines += ["", "| image and label of one patch, threads | CPU ms | ms |", "|---|---|---|"]
        lines += [f"| {name.replace(' | ', ', ')} | {cpu[name]:.2f} | {wall[name]:.2f} |" for name in cpu]
    for mode, part in document.get("step_ms", {}).items():
        shown = ", ".join(f"{ms} ms {share:.1%}" for ms, share in part["shares"].items())
        lines += ["", f"Waiting by length of the step, {mode}: {shown}; shortest under 1 %: {part['shortest_ms']} ms."]
    if "slow_storage" in document:
        part = document["slow_storage"]
        shown = ", ".join(
            f"{name.replace(' | ', ', ')} in flight: {rate:.1f}" for name, rate in part["patches_per_s"].items()
        )
        lines += ["", f"S3, delay of each request, patches/s: {shown}."]
    if "first_batch" in document:
        part = document["first_batch"]
        lines += [
            "",
            f"First batch {part['s']:.2f} s after opening began, {part['since_process_start_s']:.2f} s after the process did.",
        ]
    if "plan" in document:
        part = document["plan"]
        lines += ["", f"Plan of {part['patches']:,} patches over {document['num_rows']:,} rows: {part['s']:.1f} s."]
    if "soak" in document:
        part = document["soak"]
        lines += [
            "",
            (
                f"{part['batches']:,} batches over {document['num_rows']:,} rows in {part['s']:.0f} s: {part['early_mb']:.0f} MB resident after "
                f"{part['early']}, {part['late_mb']:.0f} MB at the end, peak {part['peak_gb']:.2f} GB."
            ),
        ]
    lines += ["", "| figure | measured | goal |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3g} | {GOALS[name]:g} |" for name, value in document["figures"].items()]
    return "\n".join(lines)


def draw_chart(document: Mapping[str, Any], file: Path) -> None:
    """Patches a second of every candidate as bars, ours dark."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib.figure import Figure

    rows = document["rates"]["rows"]
    names = sorted(rows, key=lambda name: rows[name]["patches_per_s"])
    values = [rows[name]["patches_per_s"] for name in names]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["#0072b2" if n.startswith("ftengine") else "#b0b0b0" for n in names])
    axes.bar_label(bars, labels=[f"{v:.1f}" for v in values], padding=3)
    axes.set_xlabel(f"patches a second, {document['environment']['cores']} cores, no GPU")
    axes.set_title(document["title"], fontsize=9)
    axes.margins(x=0.12)
    figure.savefig(file, dpi=120)
