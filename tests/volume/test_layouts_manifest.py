"""A CSV or TSV manifest: columns, cells that are just text, and every bad row by its line."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ftengine.errors import CaseError, ConfigError
from ftengine.volume.cases import Source
from ftengine.volume.layouts.choose import choose, find_cases
from ftengine.volume.layouts.manifest import COLUMNS, is_manifest
from tests.recipes import save_series


def write(folder: Path, text: str, name: str = "list.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return folder / name


def found(file: Path, **options: Any) -> tuple[Source, ...]:
    return find_cases([file], dataset="x", **options).sources


def refused(file: Path, match: str, **options: Any) -> str:
    with pytest.raises(ConfigError, match=match) as caught:
        found(file, **options)
    text = str(caught.value)
    assert text.startswith(str(file))
    assert text.isprintable()
    return text


def test_all_columns(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "image,label,organ_label,case,dataset,split\n"
        "ct/a_ct.nii.gz,seg/a.nii.gz,organs/a.nii.gz,first/a_ct,lits,train\n"
        "ct/b_ct.nii.gz,,,,,\n"
        "\n"
        '"ct/c, the third.nii.gz",,,,kits,test\n',
    )
    assert found(file) == (
        Source("kits/ct/c, the third", "kits", tmp_path / "ct" / "c, the third.nii.gz", split="test"),
        Source(
            "lits/first/a_ct",
            "lits",
            tmp_path / "ct" / "a_ct.nii.gz",
            tmp_path / "seg" / "a.nii.gz",
            organ_label=tmp_path / "organs" / "a.nii.gz",
            split="train",
        ),
        Source("x/ct/b", "x", tmp_path / "ct" / "b_ct.nii.gz"),
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "\ufeffimage,label\r\na.nii.gz,b.nii.gz\r\n"),
        ("list.csv", "image;label\na.nii.gz;b.nii.gz\n"),
        ("list.csv", "label, image\nb.nii.gz, a.nii.gz"),
        ("LIST.TSV", "image\tlabel\na.nii.gz\tb.nii.gz\n"),
    ],
)
def test_the_ways_in_which_tables_are_written(tmp_path: Path, name: str, text: str) -> None:
    file = write(tmp_path, text, name)
    assert is_manifest(file)
    for source in (file, tmp_path):
        assert choose(source).layout == "csv"
        assert found(source) == (Source("x/a", "x", tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"),)


@pytest.mark.parametrize("cell", ["=1+2", "+a", "-", "-a.nii.gz", "@SUM(A1)", '=HYPERLINK("http://x")'])
def test_cells_are_just_text(tmp_path: Path, cell: str) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    (source,) = found(write(tmp_path, f"image,label,split\n{quoted},{quoted},{quoted}\n"))
    assert (source.image, source.label, source.split) == (tmp_path / cell, tmp_path / cell, cell)


def test_every_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "image,label,case,dataset,split\n"
        "a.nii.gz,,,,\n"
        "../up.nii.gz,,,,\n"
        "b.nii.gz,sub/../../b.nii.gz,,,\n"
        "/etc/passwd,,,,\n"
        "nul\0.nii.gz,,,,\n"
        ",b.nii.gz,,,\n"
        "short.nii.gz\n"
        "c.nii.gz,,../c,,\n"
        "d.nii.gz,,,a/b,\n"
        "a.nii.gz,,other,,\n",
    )
    text = refused(file, "Repair these lines")
    for line, words in {
        3: "image '../up.nii.gz' leads out of",
        4: "label 'sub/../../b.nii.gz' leads out of",
        5: "--absolute-paths allows it",
        6: "holds a NUL",
        7: "no image",
        8: "1 cells for 5 columns",
        9: "case '../c': cannot be a case name",
        10: "dataset name 'a/b' holds a '/'",
        11: "image 'a.nii.gz' stands in line 2 too",
    }.items():
        assert any(
            part.startswith(f"line {line}: ") and words in part for part in text.split(": ", 1)[1].split("; ")
        ), line


def test_the_same_case_twice_and_a_very_long_list_of_mistakes(tmp_path: Path) -> None:
    file = write(tmp_path, "image,case\na.nii.gz,q\nb.nii.gz,q\na_ct.nii.gz,\n")
    refused(file, "line 3: case .x/q. stands in line 2 too")
    file = write(tmp_path, "image\n" + "../x.nii.gz\n" * 5000)
    assert len(refused(file, "and 4990 more")) < 2000
    file = write(tmp_path, "image,split\na.nii.gz," + "t" * 100 + "\n")
    refused(file, "line 2: split 't+' is no plain word")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,lable\n", r"unknown column 'lable' \(did you mean label\?\); want image, label, organ_label"),
        ("image,age\n", r"unknown column .age."),
        ("image,image\n", "column 'image' stands twice"),
        ("label,case\n", "no column image"),
        ("", "empty; want a header line"),
        ('image\n"a.nii.gz\n', "line 2: unexpected end of data"),
        ('image\n"a"b.nii.gz\n', "line 2: "),
        ("image\n" + "a" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, match: str) -> None:
    refused(write(tmp_path, text), match)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"image\n\xff\xfe\n")
    refused(tmp_path / "list.csv", r"not UTF-8 text \(byte 6\)")
    with (tmp_path / "list.csv").open("wb") as file:
        file.truncate(65 << 20)
    refused(tmp_path / "list.csv", "want a list of at most")
    assert not is_manifest(tmp_path / "absent.csv")


def test_absolute_paths(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set" / "a.nii.gz", tmp_path / "b.nii.gz"
    file = write(tmp_path / "set", f"image\n{inside}\n")
    assert [s.case for s in found(file)] == ["x/a"]
    write(tmp_path / "set", f"image\n{inside}\n{outside}\n")
    refused(file, "line 3: .*--absolute-paths allows it")
    assert [s.image for s in found(file, absolute_paths=True)] == [inside, outside]
    write(tmp_path / "set", "image\n../b.nii.gz\n")
    refused(file, "leads out of", absolute_paths=True)


def test_a_folder_of_slices_as_the_image(tmp_path: Path) -> None:
    files = save_series(tmp_path / "ct" / "p1_ct")
    (source,) = found(write(tmp_path, "image\nct/p1_ct\n"))
    assert (source.case, source.series_files) == ("x/ct/p1", tuple(files))


def test_a_folder_with_none_or_several_manifests(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 CSV or TSV files with a column image"):
        found(tmp_path, layout="csv")
    write(tmp_path, "image\n", "a.csv")
    write(tmp_path, "image\n", "b.tsv")
    with pytest.raises(ConfigError, match=r"2 CSV or TSV files .*, such as a\.csv and b\.tsv"):
        found(tmp_path, layout="csv")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.lists(st.sampled_from([*COLUMNS, "x", ""]), max_size=4),
    body=st.text(st.sampled_from('a./,"\n\r\t;=-\0 \x1b\u202e') | st.characters(codec="utf-8"), max_size=40),
)
def test_no_manifest_does_more_than_be_refused(tmp_path: Path, header: list[str], body: str) -> None:
    file = write(tmp_path, ",".join(["image", *header]) + "\n" + body)
    refusal, sources = "", tuple[Source, ...]()
    try:
        sources = found(file)
    except (ConfigError, CaseError) as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert bool(refusal) != bool(sources)
    assert all(s.image.is_relative_to(tmp_path) and ".." not in s.image.parts for s in sources)


def test_a_long_manifest_is_read_in_seconds(tmp_path: Path) -> None:
    file = write(tmp_path, "image,case\n" + "".join(f"{n // 1000}/{n}.nii.gz,c{n}\n" for n in range(20_000)))
    assert len(found(file)) == 20_000
