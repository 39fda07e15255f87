"""The study folder and its key: fixed, balanced, apart, and each vouches for the other."""

import json
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ftengine.errors import ConfigError, StoreError
from ftengine.store.reader import Store
from ftengine.turing.build import ReaderName, StudyOptions, check_options, check_places
from ftengine.turing.study import STUDY_FILE, StudyFolder, check_key, presets, read_key
from tests.turing.support import SHAPE, TWO_READERS, make_study, study_config


def test_cases_are_balanced_and_the_folder_does_not_tell(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path, per_type=6, repeats=4, training_cases=2)
    key = read_key(built.key)
    check_key(folder, key, built.key)
    folder.check_cases()
    study = folder.study
    main = [c.id for c in study.cases if c.id not in study.training]
    assert Counter(key.truth[c].synthetic for c in main) == {True: 3, False: 3}
    assert sorted(study.training.values()) == [False, True]
    assert all(key.truth[c].synthetic == s for c, s in study.training.items())
    assert [c.id for c in study.cases] == sorted(c.id for c in study.cases)
    for reader in study.readers:
        shown = reader.showings
        assert [s.training for s in shown] == [True] * 2 + [False] * 10
        assert sorted(s.case for s in shown if not s.repeat and not s.training) == sorted(main)
        repeats = [s.case for s in shown if s.repeat]
        assert Counter(key.truth[c].synthetic for c in repeats) == {True: 2, False: 2}
        places = {s.case: n for n, s in enumerate(shown) if not s.repeat}
        gaps = [n - places[s.case] for n, s in enumerate(shown) if s.repeat]
        assert min(gaps) >= 3
        assert len({s.item for r in study.readers for s in r.showings}) == 24  # a repeat has another name
    assert [s.case for s in study.readers[0].showings] != [s.case for s in study.readers[1].showings]
    files = [folder.case_file(c.id).stat() for c in study.cases]
    assert len({(f.st_size, f.st_mtime_ns, f.st_mode, f.st_uid) for f in files}) == 1
    text = (built.out / STUDY_FILE).read_text()
    assert not any(case in text for case in turing_store.cases)
    assert not any(str(p).encode() in text.encode() for p in (turing_store.path,))
    assert not {"synthetic", "seed", "organ", "store", "nonce"} & set(json.loads(text))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_key_and_secret_are_for_their_owner_alone(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path)
    for path in (built.key, folder.path / "secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_one_seed_gives_the_same_cases_under_new_names(turing_store: Store, tmp_path: Path) -> None:
    studies = [make_study(turing_store, tmp_path, name=str(n), seed=n // 2)[1].study for n in range(3)]
    content = [sorted(case.sha256 for case in study.cases) for study in studies]
    assert content[0] == content[1] != content[2]
    assert not {c.id for c in studies[0].cases} & {c.id for c in studies[1].cases}


def test_images_come_back_as_they_were_cut(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path)
    for case_id, truth in read_key(built.key).truth.items():
        if not truth.synthetic:
            patch = turing_store.read(truth.case, truth.origin_zyx, SHAPE)
            np.testing.assert_array_equal(folder.image_hu(case_id), np.clip(patch.image, -175, 250))


def test_a_lost_or_foreign_key_and_changed_studies_are_refused(turing_store: Store, tmp_path: Path) -> None:
    built, folder = make_study(turing_store, tmp_path)
    other, _ = make_study(turing_store, tmp_path, name="other", seed=1)
    with pytest.raises(ConfigError, match=r"lost\.key: no key there .*cannot be scored"):
        read_key(tmp_path / "lost.key")
    with pytest.raises(StoreError, match="is the key of study"):
        check_key(folder, read_key(other.key), other.key)
    document = json.loads(built.key.read_text())
    some = next(iter(document["truth"].values()))
    some["synthetic"] = not some["synthetic"]
    built.key.chmod(0o600)
    forged = tmp_path / "forged.key"
    forged.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="the truth in it was changed"):
        check_key(folder, read_key(forged), forged)
    (tmp_path / "half.key").write_text(built.key.read_text()[:100])
    with pytest.raises(StoreError, match="is not JSON"):
        read_key(tmp_path / "half.key")
    file = folder.path / STUDY_FILE
    file.write_text(file.read_text().replace('"Ada"', '"Eve"'))
    with pytest.raises(StoreError, match="was changed since its key was made"):
        check_key(StudyFolder.open(folder.path), read_key(built.key), built.key)
    case = folder.case_file(folder.study.cases[0].id)
    content = bytearray(case.read_bytes())
    content[100] ^= 1
    case.write_bytes(content)
    with pytest.raises(StoreError, match="is not the file that the study was built with"):
        folder.check_cases()


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a study"):
        StudyFolder.open(tmp_path)
    (tmp_path / STUDY_FILE).write_text('{"format": 2}')
    with pytest.raises(StoreError, match="has format 2; this version of ftengine reads 1"):
        StudyFolder.open(tmp_path)
    (tmp_path / STUDY_FILE).write_text('{"format": 1}')
    with pytest.raises(StoreError, match="id: Field required"):
        StudyFolder.open(tmp_path)


def test_nothing_is_overwritten_and_the_key_lies_apart(turing_store: Store, tmp_path: Path) -> None:
    built, _ = make_study(turing_store, tmp_path)
    before = built.key.read_bytes()
    with pytest.raises(ConfigError, match="a study is never overwritten"):
        make_study(turing_store, tmp_path)
    (tmp_path / "new.key").write_bytes(before)
    with pytest.raises(ConfigError, match="a key is never overwritten"):
        make_study(turing_store, tmp_path, name="new")
    with pytest.raises(ConfigError, match="lies inside the study folder"):
        check_places(tmp_path / "x", tmp_path / "x" / "key.json")
    with pytest.raises(ConfigError, match="is not there"):
        check_places(tmp_path / "x", tmp_path / "nowhere" / "key.json")
    assert built.key.read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"per_type": 3}, "want an even number"),
        ({"per_type": 0}, "want an even number"),
        ({"training_cases": 1}, "want an even number"),
        ({"repeats": 5}, "want 0 to 4"),
        ({"types": {"spleen": "spleen"}}, "has liver"),
        ({"types": {"liver": "x" * 61}}, "names of 1 to 60"),
        ({"readers": []}, "want at least one"),
        ({"readers": [ReaderName("A"), ReaderName("A", "x")]}, "no name twice"),
        ({"readers": [ReaderName("")]}, "a name of 1 to 60"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, object], text: str) -> None:
    base: dict[str, object] = {"per_type": 4, "types": {"liver": "liver"}, "readers": TWO_READERS}
    with pytest.raises(ConfigError, match=text):
        check_options(StudyOptions(**(base | changes)), study_config())  # type: ignore[arg-type]  # wrong on purpose


def test_tokens_admit_their_reader_and_nobody_else(turing_store: Store, tmp_path: Path) -> None:
    _, folder = make_study(turing_store, tmp_path)
    _, other = make_study(turing_store, tmp_path, name="other")
    tokens = [folder.token(r) for r in folder.study.readers]
    assert [folder.reader_of(t) for t in tokens] == list(folder.study.readers)
    assert StudyFolder.open(folder.path).token(folder.study.readers[0]) == tokens[0]  # a link outlives the server
    assert all(other.reader_of(t) is None for t in tokens)
    assert folder.reader_of(tokens[0][:-1]) is None
    assert folder.reader_of("\u00e9" * 32) is None
    (folder.path / "secret").unlink()
    with pytest.raises(ConfigError, match="Readers' links are made of it"):
        StudyFolder.open(folder.path).token(folder.study.readers[0])


def test_presets_fit_what_the_cases_hold() -> None:
    assert [p[0] for p in presets((-175.0, 250.0))] == ["Full range", "Soft tissue", "Narrow"]
    assert [p[0] for p in presets((-1000.0, 500.0))] == ["Full range", "Soft tissue", "Narrow", "Lung"]
    assert presets((-1000.0, 500.0))[3] == ("Lung", -1350.0, 150.0)
