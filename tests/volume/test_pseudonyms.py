"""Pseudonyms: the same names for the same salt, no name left, and no way back without the salt."""

import hashlib
import hmac
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftengine.errors import ConfigError
from ftengine.volume.pseudonyms import Pseudonyms, write_key

NAMES = Pseudonyms("a secret of ours")
PARTS = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1)


@given(part=PARTS)
def test_a_part_is_the_head_of_an_hmac(part: str) -> None:
    text = unicodedata.normalize("NFC", part).encode()
    assert NAMES.part(part) == hmac.new(b"a secret of ours", text, "sha256").hexdigest()[:16]
    assert NAMES.part(part) != hashlib.sha256(text).hexdigest()[:16]  # no plain hash, which anybody could test


@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_a_case_keeps_its_data_set_and_its_depth(parts: list[str]) -> None:
    case = "/".join(("lits", *parts))
    dataset, *hashed = NAMES.case(case).split("/")
    assert dataset == "lits"
    assert hashed == [NAMES.part(p) for p in parts]
    assert NAMES.case(case) == Pseudonyms("a secret of ours").case(case)
    assert NAMES.case(case) != Pseudonyms("another secret").case(case)


def test_composed_and_decomposed_letters_are_one_name() -> None:
    assert NAMES.part("M\u00fcller") == NAMES.part("Mu\u0308ller")


@pytest.mark.parametrize(
    ("name", "extension"),
    [("Doe.nii.gz", ".nii.gz"), ("Doe.NII.GZ", ".nii.gz"), ("Doe.mhd", ".mhd"), ("Doe", ""), ("Doe.Jane", "")],
)
def test_a_file_keeps_the_extension_of_its_format_alone(name: str, extension: str) -> None:
    assert NAMES.file(name) == NAMES.part(name) + extension


def test_the_key_leads_back() -> None:
    cases = ["d/Doe/ct", "d/Doe/late ct", "d/Roe"]
    key = NAMES.key([*cases, "d/Roe"])
    assert sorted(key.values()) == sorted(cases)
    assert all(NAMES.case(name) == pseudonym for pseudonym, name in key.items())


@pytest.mark.parametrize("salt", ["", "short", "eleven char"])
def test_a_salt_that_can_be_tried_is_refused(salt: str) -> None:
    with pytest.raises(ConfigError, match="want at least 12"):
        Pseudonyms(salt)


def test_the_salt_is_not_shown() -> None:
    assert "secret" not in repr(NAMES)


def test_error_texts_lose_the_names_of_files_and_folders() -> None:
    folder = Path("/data/hospital/Doe_Jane/ct")
    slices = [folder / f"Doe_Jane_{i:03d}.dcm" for i in range(3)]
    text = f"{folder}: 1 slice missing: 4.000 mm between Doe_Jane_001.dcm and Doe_Jane_002.dcm; case 'd/Doe_Jane/ct'; {folder.parent}/x: no"
    hidden = NAMES.hide(text, "d/Doe_Jane/ct", [folder, *slices])
    assert "Doe" not in hidden
    assert "1 slice missing: 4.000 mm between" in hidden
    assert NAMES.case("d/Doe_Jane/ct") in hidden
    assert NAMES.file("Doe_Jane_001.dcm") in hidden


def test_the_key_file_grows_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.touch(mode=0o644)
    file.write_text("{}")
    for cases in (["d/Doe"], ["d/Roe"]):
        write_key(file, NAMES.key(cases), tmp_path / "s.zarr")
    assert json.loads(file.read_text()) == NAMES.key(["d/Doe", "d/Roe"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["no json", "[1]"])
def test_the_key_replaces_no_other_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="not a key of pseudonyms"):
        write_key(file, NAMES.key(["d/Doe"]), tmp_path / "s.zarr")
    assert file.read_text() == content


def test_the_key_never_lies_in_the_store(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the store"):
        write_key(tmp_path / "s.zarr" / "key.json", NAMES.key(["d/Doe"]), tmp_path / "s.zarr")
    with pytest.raises(ConfigError, match="no pseudonyms"):
        write_key(tmp_path / "key.json", {}, tmp_path / "s.zarr")
