"""A report with something in every part, for the tests of its text and of how a browser shows it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.geometry import Box
from ftengine.pictures.hu_windows import WindowChoice
from ftengine.pictures.panels import Sheet
from ftengine.pictures.samples import PaintedSample
from ftengine.pictures.sheets import Tile
from ftengine.quality.calibrate import Calibration, JudgedTumor
from ftengine.report.data import Introduction, ReportData
from ftengine.report.figures import CasePicture, PaintedFigure, painted_figures
from ftengine.report.run_folder import RunLog, read_run
from ftengine.report.scores import Scores, scores_of
from ftengine.types import Augmentation, Painted, PatchRequest

EVIL = "<img src=x onerror=1>\"'&"
NOTICE = "Made by a test."
SHAPE = (24, 28, 32)


def log_lines(*, painting: bool) -> list[dict[str, float]]:
    """Lines of a run of 200 steps."""
    lines = []
    for step in range(9, 200, 10):
        line: dict[str, float] = {
            "step": step,
            "loss": 2.0 / (step + 1) + 0.1,
            "learning_rate": 1e-3 * (1 - step / 200),
            "step_s": 0.25,
            "loader/wait_fraction": 0.05,
            "loader/busy/reads": 0.2,
            "loader/busy/prepare": 0.3,
            "loader/level/reads": 12.0,
            "loader/level/ready": 1.5,
        }
        if painting:
            rate = step / 400
            line |= {
                "mix/painted": 0.3,
                "qc/pass_rate": rate,
                "qc/window_pass_rate": rate,
                "loader/busy/synthesis + qc": 0.9,
            }
            line |= {f"qc/pass_rate/{kind}": rate for kind in ("size/tiny", "size/small", "organ/liver")}
            line |= {f"qc/p_tenth/{n}": 0.1 for n in range(1, 11)}
        lines.append(line)
    return lines


def write_run(folder: Path, name: str, *, painting: bool = True, finished: bool = True) -> RunLog:
    """A run's folder, read."""
    folder.mkdir(parents=True)
    lines = log_lines(painting=painting)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    validations = [{"step": s, "dice": s / 400, "dice/liver_tumor": s / 400} for s in (100, 200)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(v) + "\n" for v in validations), encoding="utf-8")
    config = {
        "training": {"steps": 200, "batch_size": 2, "accumulate": 1},
        "qc": {"threshold": 0.5, "min_pass_rate": 0.1},
    }
    document = {
        "kind": "segmenter",
        "config": config,
        "versions": {"ftengine": "0.1.0", name: name},
        "given": {name: name},
    }
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "config.yaml").write_text(f"seed: 0\nname: {name}\n" + "long_line: " + "x" * 300 + "\n", encoding="utf-8")
    if finished:
        counts = {"painted": 8, "passed": 6, "draws": 10}
        quality = {"by_organ_and_size": {"liver": {"tiny": counts, name: counts}}, "by_dataset": {name: counts}}
        result = {
            "interrupted": False,
            "quality": quality if painting else {},
            "warnings": [f"beware of {name}"],
            "stall": {"slowest": f"synthesis of {name}", "sentence": f"training waited for {name}"},
            "best": {"step": 200, "dice": 0.5},
        }
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    sheet = Sheet(2.0, width_px=640)
    sheet.text(0.1, 0.1, "picture")
    sheet.save(folder / "pictures" / "step-0000200" / "sheet-000.png")
    return read_run(folder, name)


def evaluation(name: str, cases: dict[str, float]) -> Scores:
    """Dice of the tumour by case, and a liver."""

    def row(dice: float) -> dict[str, Any]:
        lesions = {"truth": [{"diameter_mm": 10 + 30 * dice}], "predicted": []}
        return {"dice": dice, "truth_voxels": 5, "outcome": "tp" if dice else "fn", "lesions": lesions}

    mean = sum(cases.values()) / len(cases)
    size = {"num_truth": 4, "num_found": 3}
    return scores_of(
        name,
        {
            "settings": {"confidence": 0.95},
            "summary": {
                "liver": {"dice": 0.9, "num_volumes_with_truth": 2},
                "liver_tumor": {
                    "dice": mean,
                    "dice_interval": [mean - 0.1, mean + 0.1],
                    "hd95_mm": 12.34,
                    "num_volumes_with_truth": len(cases),
                    "sensitivity": 0.75,
                    "specificity": None,
                    "lesions": {**size, "by_size": {"small": size, "large": size}, "precision": 0.5, "f1": 0.6},
                },
            },
            "cases": [{"case": case, "classes": {"liver_tumor": row(dice)}} for case, dice in cases.items()],
            "failed": {name: f"is lost: {name}"},
            "num_left_out": 3,
        },
    )


def _ball(center: tuple[int, int, int], radius: float) -> NDArray[np.bool_]:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    inside: NDArray[np.bool_] = ((grid - np.reshape(center, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2
    return inside


def painted(name: str, *, proportion: float = 0.8) -> tuple[list[Tile], list[PaintedFigure]]:
    """Two painted patches, one of each of two size classes."""
    config = Config.preset("demo")
    samples = []
    for index, size in enumerate(("tiny", "small")):
        original = np.random.default_rng(index).normal(80, 10, SHAPE).astype(np.float32)
        mask = _ball((12, 14, 16), 3 + 2 * index)
        synthetic = original - np.where(mask, np.float32(40), np.float32(0))
        record = Painted(
            "liver", size, ((12, 14, 16),), ((3.0, 3.0, 3.0),), int(mask.sum()), proportion, proportion >= 0.5
        )
        request = PatchRequest(
            case=name,
            dataset="d",
            box=Box((0, 0, 0), SHAPE),
            augmentation=Augmentation(),
            annotated=False,
            epoch=0,
            index=index,
            row=0,
            read=Box((0, 0, 0), SHAPE),
        )
        samples.append(PaintedSample(request, record, original, synthetic, mask, _ball((12, 14, 17), 3)))
    return painted_figures(config, samples, WindowChoice("organ"), num_figures=2)


def case_html(name: str, *, truth: bool = True, predicted: bool = True) -> str:
    """A case with a true and a predicted tumour, or without one of them."""
    image = np.random.default_rng(3).normal(80, 10, SHAPE).astype(np.float32)
    labels = [np.zeros(SHAPE, dtype=np.uint8) for _ in range(2)]
    for label, there, x in zip(labels, (truth, predicted), (16, 18), strict=True):
        label[_ball((12, 14, x), 4)] = 2 if there else 1
    window = WindowChoice().of(Config.preset("demo").region)
    return CasePicture(
        name,
        "Worst 1 of 2",
        image,
        labels[0],
        {name: labels[1]},
        {name: f"Dice of {name}"},
        (3.0, 3.0, 3.0),
        window,
        (2,),
    ).html()


def calibration(note: str) -> Calibration:
    """Ten real and ten painted tumours."""
    tumors = tuple(
        JudgedTumor(origin, "liver", size, 10.0, -20.0 + number, number / 10)
        for origin in ("real", "painted")
        for number, size in enumerate(["tiny", "small"] * 5)
    )
    return Calibration("a", "b", "store", "test", None, None, 0.5, ("tiny", "small"), tumors, notes=(note,))


def report_data(folder: Path, *, name: str = "a/0") -> ReportData:
    """A report with something in every part; ``name`` is what everything is called."""
    tiles, figures = painted(name)
    return ReportData(
        title=f"Report of {name}",
        runs=[
            write_run(folder / "run", name),
            write_run(folder / "going on", f"{name}, going on", painting=False, finished=False),
        ],
        evaluations=[
            evaluation("baseline", {name: 0.5, "b/1": 0.3, "c/2": 0.2}),
            evaluation(f"with {name}", {name: 0.4, "b/1": 0.7, "c/2": 0.9}),
        ],
        cases=[case_html(name), case_html("b/1", truth=False)],
        case_notes=[f"{name} was not drawn"],
        tiles=tiles,
        painted=figures,
        calibration=calibration(f"note on {name}"),
        introduction=Introduction(NOTICE, "", [f"Did {name}."], {"convert": 12.34, name: 5.0}),
        created="2026-01-01 00:00 UTC",
    )
