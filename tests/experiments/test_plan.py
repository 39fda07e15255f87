"""Plans: what is refused, with which words; the shipped ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftengine.errors import ConfigError
from ftengine.experiments.plan import choose, fold_numbers, load_plan, parse_plan, plan_names
from tests.experiments.support import plan_of, plan_values

FREE = plan_values()["methods"]["free"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metods": {}}, "metods: there is no such key here"),
        ({"baseline": "plian"}, "baseline='plian': there is no such name here, did you mean plain"),
        ({"tasks": {"home": {"store": "lung", "datasets": ["a"]}}}, r"tasks.home.store='lung'"),
        ({"tasks": {"home": {"store": "liver", "datasets": []}}}, "tasks.home.datasets"),
        (
            {"tasks": {"home": {"store": "liver", "datasets": ["a"], "tumors": ["livr_tumor"]}}},
            "did you mean liver_tumor",
        ),
        ({"tasks": {"home": {"store": "liver", "datasets": ["a"], "test_split": "test"}}}, "would be trained on"),
        ({"tasks": {"home": {"store": "liver", "datasets": ["a"], "targets": ["away"]}}}, "tasks.home.targets='away'"),
        ({"stores": {"liver": {"preset": "hand"}}}, "stores.liver: preset='hand'"),
        ({"folds": {"number": 1}}, "folds.number"),
        ({"folds": None}, "nothing to score its models on"),
        ({"methods": {"plain": {}, "free": {"paints": "freetumor"}}}, "'freetumor' without generator"),
        ({"methods": {"plain": {}, "c": {"paints": "constant", "generator": {}}}}, "with generator: freetumor alone"),
        ({"methods": {"plain": {"judge": True}}}, "paints='nothing' with judge"),
        ({"methods": {"plain": {}, "c": {"paints": "syntumor", "calibrate": 5}}}, "calibrate without judge"),
        ({"methods": {"plain": {}, "free": {**FREE, "segmenter": "free"}}}, "its S is 'free', which paints"),
        ({"methods": {"plain": {"tasks": []}, "free": FREE}}, "is not trained for all of its tasks"),
        ({"methods": {"plain": {}, "b": {"title": "plain"}}}, "two of them have one title"),
        ({"methods": {"plain": {}, "c": {"paints": "constant", "unlabelled": {"scales": ["9K"]}}}}, "scale 9K"),
        ({"methods": {"plain": {}, "c": {"paints": "constant", "unlabelled": {}}}}, "want scales or datasets"),
        ({"external": {"x": {"note": "n", "predictions": "p"}}}, "predictions and truth"),
        (
            {
                "tasks": {"home": {"store": "liver", "datasets": ["a"], "targets": ["away"]}},
                "targets": {"away": {"store": "liver", "datasets": ["b"]}},
                "folds": None,
                "external": {"x": {"note": "n", "predictions": "p", "truth": "t"}},
            },
            "external.x.predictions: without folds tasks.home is scored on its targets alone",
        ),
        ({"paper": "A99"}, "paper='A99'"),
        ({"measures": ["dise"]}, "measures.0"),
    ],
)
def test_a_bad_plan_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(**changes)
    assert str(caught.value).startswith("test: ")


@pytest.mark.parametrize(("text", "message"), [("- a list", "want a mapping"), ("title: [", "not YAML")])
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_plan(text, where="x.yaml")


def test_a_missing_file_lists_the_shipped_plans(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .* table-a5"):
        load_plan(tmp_path / "none.yaml")


def test_paths_of_stores_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan_values(stores={"liver": {"preset": "demo", "path": "a.zarr"}})))
    assert load_plan(file).stores["liver"].path == str(tmp_path / "a.zarr")


def test_paths_of_predictions_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    external = {"x": {"note": "n", "predictions": "p/{task}/{fold}", "truth": "/t/{task}"}}
    file.write_text(yaml.safe_dump(plan_values(external=external)))
    other = load_plan(file).external["x"]
    assert (other.predictions, other.truth) == (str(tmp_path / "p/{task}/{fold}"), "/t/{task}")


def test_names_that_are_not_there_cannot_be_chosen() -> None:
    plan = plan_of()
    assert choose(plan).folds == fold_numbers(plan) == (0, 1)
    assert choose(plan, methods=["plain"]).methods == ("plain",)
    with pytest.raises(ConfigError, match=r"--task hoem: .* did you mean home"):
        choose(plan, tasks=["hoem"])
    with pytest.raises(ConfigError, match=r"--method x: .*want one of free, plain"):
        choose(plan, methods=["x"])
    with pytest.raises(ConfigError, match="--fold 2: the plan has folds 0 to 1"):
        choose(plan, folds=[2])


def test_every_table_that_was_promised_is_shipped() -> None:
    tables = {f"table-a{n}" for n in (5, 6, 8, 10, 12, 13, 14, 15, 16)}
    assert set(plan_names()) == tables | {"phantoms"}
    for name in tables:
        plan = load_plan(name)
        assert plan.paper == name.removeprefix("table-").upper()
        assert (plan.folds is None) == (name == "table-a8")
        assert plan.repeats == (1 if name in {"table-a5", "table-a6", "table-a10"} else 5)


def test_the_plan_of_the_documentation_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    plan = parse_plan(text, where="docs")
    assert set(plan.methods) == {"swinunetr", "copy-paste", "freetumor", "soft"}
