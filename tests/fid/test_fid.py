"""FID end to end on phantoms, its bookkeeping, and the table of several results."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ftengine.assemble import build_bank, measure_fid
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.fid.feature_networks import SliceNetwork
from ftengine.fid.fid import FeatureSet, FidResult, Quota, compared, organ_result, read_result, shares_of
from ftengine.fid.frechet import frechet_distance, kernel_distance
from ftengine.fid.tumor_images import CropRule, TumorImage
from ftengine.geometry import Box
from ftengine.store import index
from ftengine.store.reader import Store, open_store
from ftengine.store.subset import make_subset
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.volume.phantom import LABELS, TumorSpec, make_phantom

CONFIG = Config.preset("demo").with_overrides(
    {
        "device": "cpu",
        "network.channels": (4, 8),
        "synthesis.synthesizer": "constant",
        "synthesis.contrast_factor": (0.7, 1.3),
        "qc.retries": 0,
    }
)
SHAPE = (56, 72, 72)
SPEC = TumorSpec(num_tumors=(2, 3), diameter_mm=(12.0, 26.0), organs=("liver",), contrast_factor=2.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Abdomen phantoms: eight with labelled liver tumours in two folds, four without tumours."""
    folder = tmp_path_factory.mktemp("fid")
    root = create_store(folder / "all.zarr", CONFIG.region)
    for case in range(12):
        has_tumors = case < 8
        phantom = make_phantom(
            "abdomen",
            seed=4,
            case=case,
            shape_zyx=SHAPE,
            spacing_mm_zyx=(3.0, 3.0, 3.0),
            tumors=SPEC if has_tumors else None,
        )
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[phantom.label == LABELS["abdomen"]["liver"]] = 1
        label[phantom.label == LABELS["abdomen"]["liver_tumor"]] = 2
        provenance = Provenance("p", "", annotation="tumor" if has_tumors else "organ", split="train")
        write_volume(root, f"p/{case}", phantom.image_hu, label, phantom.grid, phantom.grid, CONFIG.region, provenance)
    index.compact_index(root)
    make_subset(open_store(folder / "all.zarr"), folder / "folds.zarr", num_folds=2)
    return open_store(folder / "folds.zarr")


class SmallNetwork(nn.Module):
    """Random convolutions, fixed by a seed, and moments of their maps: blind to nothing that a tumour's grey values and edges show."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.body(x).flatten(2)
        return torch.cat([maps.mean(2), maps.std(2), x[:, :1].mean(dim=(2, 3))], dim=1)


def _network(rule: CropRule | None = None) -> SliceNetwork:
    return SliceNetwork(
        SmallNetwork().eval(),
        name="small",
        side=32,
        prepare=lambda x: 2 * x - 1,
        rule=rule or CropRule(),
        device=torch.device("cpu"),
    )


def test_a_painter_like_the_real_tumors_is_nearer_than_one_unlike_them(store: Store) -> None:
    """Pasted tumours of the other fold, as dark ones as the phantoms', and bright ones that no phantom has."""
    told: list[str] = []
    num_seen = 0

    def seen() -> None:
        nonlocal num_seen
        num_seen += 1

    def measured(**keys: Any) -> FidResult:
        config = CONFIG.with_overrides({f"synthesis.{k}": v for k, v in keys.items()})
        return measure_fid(
            config,
            store,
            features=_network(),
            fold=0,
            repeats=2,
            num=24,
            name=str(keys),
            on_tumor=seen,
            warn=told.append,
        )

    pasted = measured(synthesizer="copy-paste", contrast_factor=(1.0, 1.0), edge_sigma_mm=0.0)
    dark = measured(fixed_contrast=0.2)
    bright = measured(fixed_contrast=-0.6)
    real = bright.organs["liver"]
    assert real.num_tumors >= 8
    assert real.num_samples > real.num_tumors  # all slices of each
    assert real.num_features == 13
    for result in (pasted, dark, bright):
        organ = result.organs["liver"]
        assert organ.sizes == real.sizes
        assert [r.seed for r in organ.repeats] == [0, 1]
        assert all(r.fid is not None and r.fid > 0 for r in organ.repeats)
        assert organ.repeats[0].fid != organ.repeats[1].fid  # painted anew
        assert organ.repeats[0].num_tumors <= 24
    for metric in ("fid", "kid"):
        means = [r.organs["liver"].cell(metric).mean or 0.0 for r in (pasted, dark, bright)]
        assert means[0] < means[2]
        assert means[1] < means[2]
    assert num_seen == sum(r.organs["liver"].num_tumors + sum(x.num_tumors for x in r.organs["liver"].repeats) for r in (pasted, dark, bright))  # fmt: skip
    assert any("fewer than 2048" in text for text in told)
    assert json.loads(json.dumps(bright.to_json(), allow_nan=False))["organs"]["liver"]["fid"]["deviation"] > 0


def test_sizes_are_those_of_the_real_tumors(store: Store) -> None:
    matched = measure_fid(CONFIG, store, features=_network(), repeats=1).organs["liver"]
    assert matched.num_tumors >= 16
    assert matched.repeats[0].sizes == matched.sizes or matched.notes  # all were found, or it is said
    assert all(matched.repeats[0].sizes.get(k, 0) <= n for k, n in matched.sizes.items())
    as_painted = measure_fid(CONFIG, store, features=_network(), repeats=1, sizes="painted").organs["liver"]
    assert as_painted.repeats[0].num_tumors == as_painted.num_tumors
    assert as_painted.repeats[0].sizes != as_painted.sizes


def test_the_same_call_gives_the_same_figures(store: Store) -> None:
    given: dict[str, Any] = {"repeats": 1, "num": 4, "fold": 1}
    first, second = (measure_fid(CONFIG, store, features=_network(), **given) for _ in range(2))
    assert first == second
    other = measure_fid(CONFIG, store, features=_network(), repeats=2, num=4, fold=1)
    assert other.organs["liver"].repeats[0] == first.organs["liver"].repeats[0]  # a longer run begins alike
    largest = measure_fid(CONFIG, store, features=_network(CropRule(slices="largest")), **given).organs["liver"]
    assert largest.num_samples == largest.num_tumors


def test_pasted_tumors_come_from_other_folds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    told: list[str] = []

    def noting(config: Config, opened: Store, **which: Any) -> Any:
        asked.append(which)
        return build_bank(config, opened, **which)

    monkeypatch.setattr("ftengine.assemble.fid.build_bank", noting)
    keys = {"synthesis.synthesizer": "copy-paste", "synthesis.contrast_factor": (1.0, 1.0)}
    given: dict[str, Any] = {"repeats": 1, "num": 2, "warn": told.append}
    held_out = measure_fid(CONFIG.with_overrides(keys), store, features=_network(), fold=1, **given)
    assert asked == [{"split": None, "held_out_fold": 1}]
    assert not held_out.painter["pastes_real"]
    assert not any("very tumours" in text for text in told)
    whole = measure_fid(CONFIG.with_overrides(keys), store, features=_network(), **given)
    assert whole.painter["pastes_real"]
    assert any("very tumours" in text for text in told)


def test_what_cannot_be_measured(store: Store) -> None:
    with pytest.raises(ConfigError, match="no labelled tumour of split 'nowhere'"):
        measure_fid(CONFIG, store, features=_network(), split="nowhere")
    with pytest.raises(ConfigError, match="repeats=0"):
        measure_fid(CONFIG, store, features=_network(), repeats=0)
    with pytest.raises(ConfigError, match="num=0"):
        measure_fid(CONFIG, store, features=_network(), num=0)
    no_room = CONFIG.with_overrides({"synthesis.min_organ_voxels": 10**6})
    with pytest.raises(ConfigError, match="not one tumour of liver could be painted"):
        measure_fid(no_room, store, features=_network(), repeats=1, num=1)


def test_largest_remainders() -> None:
    assert shares_of({"tiny": 3, "small": 1}, None) == {"tiny": 3, "small": 1}
    assert shares_of({"tiny": 3, "small": 1}, 8) == {"tiny": 6, "small": 2}
    assert shares_of({"a": 1, "b": 1, "c": 1}, 5) == {"a": 2, "b": 2, "c": 1}
    assert shares_of({"a": 5, "b": 1}, 2) == {"a": 2, "b": 0}


def test_the_quota() -> None:
    wanted = {"liver": {"tiny": 1, "large": 2}, "kidney": {"tiny": 1}}
    quota = Quota(wanted, ("tiny", "large"), "matched")
    assert quota.num_left == 4
    assert not quota.wants("lung", "tiny")
    assert not quota.wants("kidney", "large")
    quota.take("liver", "tiny")
    assert not quota.wants("liver", "tiny")
    assert quota.missing("liver") == "2 large"
    assert quota.missing("kidney") == "1 tiny"
    free = Quota(wanted, ("tiny", "large"), "painted")
    for _ in range(3):
        assert free.wants("liver", "large")
        free.take("liver", "large")
    assert not free.wants("liver", "tiny")
    assert (free.missing("liver"), free.missing("kidney"), free.num_left) == ("", "1", 1)
    assert wanted["liver"] == {"tiny": 1, "large": 2}


def _set(features: np.ndarray, sizes: list[str]) -> FeatureSet:
    tumor = TumorImage("c", "liver", 10.0, np.zeros((1, 1, 1), np.float32), np.ones((1, 1, 1), bool), *[Box((0, 0, 0), (1, 1, 1))] * 2)  # fmt: skip
    found = FeatureSet()
    for size, rows in zip(sizes, np.array_split(features, len(sizes)), strict=True):
        found.add(tumor, size, rows)
    return found


def test_one_organ_by_hand() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) + 1
    result = organ_result(
        "liver",
        _set(real, ["tiny", "tiny", "large"]),
        [(7, _set(synthetic, ["tiny", "large"]), 3, ""), (8, _set(synthetic[:1], ["tiny"]), 0, "1 large")],
    )
    assert (result.num_tumors, result.num_samples, result.num_features) == (3, 40, 5)
    assert result.sizes == Counter(tiny=2, large=1)
    first, second = result.repeats
    assert (first.seed, first.num_tumors, first.num_samples, first.num_cut) == (7, 2, 30, 3)
    assert first.fid == frechet_distance(real, synthetic)
    assert first.kid == kernel_distance(real, synthetic)
    assert (second.fid, second.kid) == (None, None)
    assert result.cell("fid").values == (first.fid,)
    assert any("1 large" in note for note in result.notes)
    assert any("fewer than two samples" in note for note in result.notes)
    assert any("1 synthetic samples" in note for note in result.notes)


def _result(name: str, fids: list[float], **settings: Any) -> FidResult:
    rng = np.random.default_rng(len(name))
    samples = _set(rng.normal(size=(30, 5)), ["tiny"])
    organ = organ_result("liver", samples, [(k, samples, 0, "") for k in range(len(fids))])
    repeats = tuple(dataclasses.replace(r, fid=f, kid=f / 1000) for r, f in zip(organ.repeats, fids, strict=True))
    shared = {"network": {"name": "small", "sample": "axial slice"}, "slices": "all"}
    return FidResult(name, {**shared, **settings}, {}, {"liver": dataclasses.replace(organ, repeats=repeats)})


def test_the_table_of_several_results(tmp_path: Path) -> None:
    """Table A4's own row: 45.1 +- 6.5 beside 23.5 +- 1.2."""
    spread = np.array([-1.0, -1.0, 0.0, 1.0, 1.0])
    syntumor = _result("SynTumor", list(45.1 + 6.5 * spread))
    freetumor = _result("FreeTumor", list(23.5 + 1.2 * spread))
    table = compared([syntumor, freetumor], "fid")
    assert table.text("SynTumor", "liver") == "45.1 \N{PLUS-MINUS SIGN} 6.5"
    assert "**23.5**" in table.to_markdown()
    assert "5 repeats" in table.to_markdown()
    assert compared([freetumor], "kid").text("FreeTumor", "liver") == "23.5 \N{PLUS-MINUS SIGN} 1.2"

    (tmp_path / "r.json").write_text(json.dumps(freetumor.to_json()))
    assert read_result(tmp_path / "r.json") == freetumor
    with pytest.raises(ConfigError, match="named alike"):
        compared([freetumor, freetumor], "fid")
    with pytest.raises(ConfigError, match="slices=largest"):
        compared([freetumor, _result("other", [1.0], slices="largest")], "fid")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "name": "x", "organs": []}'])
def test_a_file_that_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match="is no result of 'ftengine fid'"):
        read_result(tmp_path / "r.json")
