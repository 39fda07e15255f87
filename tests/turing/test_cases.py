"""Real and painted cases differ in the tumour and in nothing else."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ftengine.errors import ConfigError
from ftengine.store.index import compact_index
from ftengine.store.reader import Store, open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from ftengine.turing.cases import CaseDrawer, CaseOptions, DrawnCase, shape_of, to_hu, to_window
from tests.support import organ_volume, ras_grid_at
from tests.turing.support import SHAPE, drawer_of, study_config

WINDOW = study_config().region.window_hu


@given(
    image=arrays(np.int16, (3, 4), elements=st.integers(-1024, 3071)),
    window=st.sampled_from([(-175.0, 250.0), (-1000.0, 500.0), (-1024.0, 3071.0)]),
)
def test_what_goes_through_the_window_unpainted_is_only_clipped(image: Any, window: tuple[float, float]) -> None:
    back = to_hu(to_window(image, window), window)
    assert back.dtype == np.int16
    np.testing.assert_array_equal(back, np.clip(image, *window))


def _in_store(store: Store, case: DrawnCase) -> tuple[Any, Any]:
    patch = store.read(case.case, case.origin_zyx, SHAPE)
    return np.clip(patch.image, *WINDOW).astype(np.int16), patch.label


def test_a_real_case_is_the_store_inside_the_window(turing_store: Store) -> None:
    for case in drawer_of(turing_store, CaseOptions(SHAPE)).real("liver", 5):
        image, label = _in_store(turing_store, case)
        np.testing.assert_array_equal(case.image_hu, image)
        assert label[case.center_zyx] == 2
        assert case.center_zyx == tuple(n // 2 for n in SHAPE)
        assert not case.synthetic


def test_a_painted_case_is_the_store_but_for_one_tumour_around_the_middle(turing_store: Store) -> None:
    cases = drawer_of(turing_store, CaseOptions(SHAPE)).painted("liver", 5)
    for case in cases:
        image, label = _in_store(turing_store, case)
        changed = np.argwhere(case.image_hu != image)
        assert len(changed) > 20
        assert (label[tuple(changed.T)] == 1).all()  # a soft edge ends at the organ too
        reach_mm = np.linalg.norm((changed - np.array(case.center_zyx)) * turing_store.spacing_mm_zyx, axis=1)
        edge_mm = 4 * study_config().synthesis.edge_sigma_mm
        assert reach_mm.max() <= case.radius_mm + edge_mm
        assert case.image_hu.min() >= WINDOW[0]
        assert case.image_hu.max() <= WINDOW[1]
    assert len({c.case for c in cases}) == 5


def test_a_volume_gives_one_case_and_the_seed_decides_which(turing_store: Store) -> None:
    drawer = drawer_of(turing_store, CaseOptions(SHAPE), seed=3)
    cases = [*drawer.real("liver", 3), *drawer.painted("liver", 5)]
    assert len({c.case for c in cases}) == 8
    again = drawer_of(turing_store, CaseOptions(SHAPE), seed=3)
    same = [*again.real("liver", 3), *again.painted("liver", 5)]
    assert [c.case for c in same] == [c.case for c in cases]
    assert all((a.image_hu == b.image_hu).all() for a, b in zip(cases, same, strict=True))
    other = drawer_of(turing_store, CaseOptions(SHAPE), seed=4).painted("liver", 5)
    assert any(o.image_hu.tobytes() != c.image_hu.tobytes() for o, c in zip(other, cases[3:], strict=False))


@pytest.mark.parametrize("known", [True, False], ids=["by its source", "by its name"])
def test_a_volume_in_two_stores_gives_one_case(tmp_path: Path, known: bool) -> None:
    source = "one" if known else ""
    real = _store(tmp_path / "real", "a/case", 3, source=source, annotation="tumor")
    paint = _store(tmp_path / "paint", "b/renamed" if known else "a/case", 3, source=source, annotation="organ")
    drawer = CaseDrawer(study_config(), real, paint, CaseOptions(SHAPE), seed=0)
    shown = [*drawer.real("liver", 2), *drawer.painted("liver", 1)]
    assert {case.case[-1] for case in shown} == {"0", "1", "2"}
    with pytest.raises(ConfigError, match=r"only 0 painted tumours of liver .*no volume is left"):
        drawer.painted("liver", 1)


def test_volumes_of_one_name_and_two_sources_are_two(tmp_path: Path) -> None:
    real = _store(tmp_path / "real", "a/case", 1, source="here", annotation="tumor")
    paint = _store(tmp_path / "paint", "a/case", 1, source="there", annotation="organ")
    drawer = CaseDrawer(study_config(), real, paint, CaseOptions(SHAPE), seed=0)
    assert [len(drawer.real("liver", 1)), len(drawer.painted("liver", 1))] == [1, 1]


def _store(folder: Path, name: str, num_cases: int, *, source: str, annotation: str) -> Store:
    """Volumes ``name`` 0, 1, ...; source: what the SHA-256 of their sources are made of, "" for none."""
    config, shape_zyx = study_config(), (40, 44, 48)
    root, grid = create_store(folder, config.region), ras_grid_at(shape_zyx)
    for number in range(num_cases):
        image, label = organ_volume(shape_zyx, tumor=annotation == "tumor", seed=number)
        sha256 = hashlib.sha256(f"{source} {number}".encode()).hexdigest() if source else ""
        provenance = Provenance("made by a test", sha256, annotation=annotation)
        write_volume(root, f"{name}{number}", image, label, grid, grid, config.region, provenance)
    compact_index(root)
    return open_store(root)


def test_without_the_position_tumours_lie_anywhere(turing_store: Store) -> None:
    options = CaseOptions(SHAPE, centered=False)
    drawer = drawer_of(turing_store, options)
    cases = [*drawer.real("liver", 4), *drawer.painted("liver", 4)]
    assert len({c.center_zyx for c in cases}) > 4
    for case in cases:
        image, label = _in_store(turing_store, case)
        if case.synthetic:
            assert case.image_hu[case.center_zyx] != image[case.center_zyx]
        else:
            assert label[case.center_zyx] == 2


def test_too_few_cases_are_refused_with_the_reasons(turing_store: Store) -> None:
    with pytest.raises(
        ConfigError, match=r"only 5 labelled tumours of liver for a study that needs 6 \(no volume is left\)"
    ):
        drawer_of(turing_store, CaseOptions(SHAPE)).real("liver", 6)
    with pytest.raises(ConfigError, match="a tumour of another size than asked for: 5"):
        drawer_of(turing_store, CaseOptions(SHAPE, least_diameter_mm=40)).real("liver", 1)
    with pytest.raises(ConfigError, match=r"only 0 painted tumours of liver .*a tumour larger than the case"):
        drawer_of(turing_store, CaseOptions((2, 2, 2))).painted("liver", 1)
    with pytest.raises(ConfigError, match="want 8 to 1024 voxels"):
        shape_of((9.0, 192.0, 192.0), (3.0, 3.0, 3.0))


def test_what_the_judge_fails_is_in_no_study(turing_store: Store) -> None:
    asked = 0

    def every_second(image: torch.Tensor, _mask: torch.Tensor, _values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal asked
        asked += len(image)
        passed = torch.full((len(image),), asked % 2 == 0)
        return torch.where(passed, 0.9, 0.1), passed

    cases = drawer_of(turing_store, CaseOptions(SHAPE), judge=every_second).painted("liver", 5)
    assert [case.proportion for case in cases] == pytest.approx([0.9] * 5)
    with pytest.raises(ConfigError, match="the judge let it fail"):
        drawer_of(
            turing_store, CaseOptions(SHAPE), judge=lambda i, _m, _v: (torch.zeros(len(i)), torch.zeros(len(i)) > 0)
        ).painted("liver", 1)
