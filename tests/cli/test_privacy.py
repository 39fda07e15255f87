"""Nothing that identifies a patient leaves a header: canaries are planted in good and bad files and looked for in every byte that comes out.

With ``--pseudonymize`` the same holds for the names of files and folders.
"""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import UID

from ftengine.store.reader import open_store
from ftengine.volume.pseudonyms import Pseudonyms
from tests.recipes import ct_array, cut, edit_slice, save_nifti, save_series, save_slice, sitk_image, stored_slice
from tests.recipes import grid_of as grid

TEXT = "QZXCANARY"  # in every planted text
UIDS = {"StudyInstanceUID": "1.2.826.0.1.777.31.41", "FrameOfReferenceUID": "1.2.826.0.1.777.31.42"}
SERIES_UID = "1.2.826.0.1.777.31."
DATES = {
    "PatientBirthDate": "19010203",
    "StudyDate": "19110913",
    "SeriesDate": "19110914",
    "AcquisitionDate": "19110915",
}
TAGS = {
    "PatientName": f"{TEXT}^Jane",
    "PatientID": f"{TEXT}-4711",
    "AccessionNumber": f"{TEXT}ACC",
    "InstitutionName": f"{TEXT} Hospital",
    "InstitutionAddress": f"{TEXT} Street 1",
    "ReferringPhysicianName": f"{TEXT}^Doctor",
    "OperatorsName": f"{TEXT}^Operator",
    "StudyDescription": f"{TEXT} study",
    "SeriesDescription": f"{TEXT} series",
    "StudyID": f"{TEXT}SID",
    "DeviceSerialNumber": f"{TEXT}SERIAL",
    "StationName": f"{TEXT}STATION",
    "PatientComments": f"{TEXT} comments",
    "ImageComments": f"{TEXT} image comments",
    "ProtocolName": f"{TEXT} protocol",
    **UIDS,
    **DATES,
}
CANARIES = [TEXT, "777.31", *DATES.values()]
NAME = "Qzxname"  # in every name of a file or folder of the second test


def series(folder: Path, number: int, num_slices: int = 6) -> list[Path]:
    tags: dict[str, Any] = {**TAGS, "series": f"{SERIES_UID}{number}"}
    paths = save_series(folder, num_slices, **tags)
    for path in paths:
        data = pydicom.dcmread(path)
        data.private_block(0x0009, f"{TEXT} CREATOR", create=True).add_new(0x01, "LO", f"{TEXT} private")
        data.save_as(path)
    return paths


def broken_value(path: Path, keyword: str, value: bytes) -> None:
    """Put bytes where a number belongs, as damaged exports have it; pydicom's own checks would refuse to write them."""
    data = pydicom.dcmread(path)
    place = data[keyword]
    content = path.read_bytes()
    header = place.tag.group.to_bytes(2, "little") + place.tag.element.to_bytes(2, "little") + place.VR.encode()
    start = content.index(header)
    length = int.from_bytes(content[start + 6 : start + 8], "little")
    text = value[:length].ljust(length, b" ")
    path.write_bytes(content[: start + 8] + text + content[start + 8 + length :])


def nifti(path: Path, array: Any) -> Path:
    """With canaries in all text fields and in the name of the gzip header."""
    save_nifti(path, array)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(binaryblock=bytes(raw[:348]), check=False)
    for name, width in (("descrip", 80), ("aux_file", 24), ("db_name", 18), ("intent_name", 16)):
        header[name] = f"{TEXT}{name}"[: width - 1].encode()
    raw[:348] = header.binaryblock
    with path.open("wb") as file, gzip.GzipFile(f"{TEXT}_file.nii", "wb", fileobj=file) as stream:
        stream.write(raw)
    assert TEXT.encode() in path.read_bytes()
    return path


def itk(path: Path, array: Any) -> Path:
    image = sitk_image(array, grid(array.shape))
    for key in ("Comment", "PatientName", "ITK_InputFilterName"):
        image.SetMetaData(key, f"{TEXT} {key}")
    sitk.WriteImage(image, str(path))
    assert TEXT.encode() in path.read_bytes()
    return path


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


GOOD = ("series", "twins", "nifti", "nrrd", "mha", "rescued")


def craft(folder: Path) -> int:
    """Good and bad cases of every format; the number of bad ones."""
    series(folder / "series", 1)
    save_slice(
        series(folder / "twins", 2)[2].with_name("z.dcm"),
        stored_slice(2),
        position=(-20, -30, 4),
        series=f"{SERIES_UID}2",
        **TAGS,
    )
    for path in series(folder / "rescued", 3):
        path.write_bytes(path.read_bytes()[132:])
    nifti(folder / "nifti.nii.gz", ct_array())
    itk(folder / "nrrd.nrrd", ct_array())
    itk(folder / "mha.mha", ct_array())

    bad = folder / "bad"
    number = 10
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
        "PhotometricInterpretation",
    ):
        number += 1
        broken_value(series(bad / f"text_{number}", number)[2], keyword, TEXT.encode() * 9)
    for keyword in ("ImagePositionPatient", "Rows", "SOPClassUID"):
        number += 1
        edit_slice(
            series(bad / f"without_{number}", number)[2],
            **{keyword: None, **({"Modality": "CT"} if keyword == "SOPClassUID" else {})},
        )
        cut(bad / f"without_{number}" / "004.dcm", 100)
    for name in ("tilt", "gap", "stub", "phases"):
        number += 1
        paths = series(bad / name, number, 2 if name == "stub" else 6)
        if name == "tilt":
            for index, path in enumerate(paths):
                edit_slice(path, ImagePositionPatient=[-20, -30 + index, 2 * index])
        elif name == "gap":
            paths[3].unlink()
        elif name == "phases":
            for index, path in enumerate(paths):
                save_slice(
                    path.with_name(f"b{index}.dcm"),
                    stored_slice(index + 1),
                    position=(-20, -30, 2 * index),
                    series=f"{SERIES_UID}{number}",
                    **TAGS,
                )
    for size in (200, 420, 700, 1100):
        path = series(bad / f"cut_{size}", number + size)[3]
        path.write_bytes(path.read_bytes()[:size])
    path = series(bad / "syntax", 99)[1]
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = UID("1.2.826.0.1.777.31.4.50")
    data.save_as(path, implicit_vr=False, little_endian=True)
    nan = ct_array().astype(np.float32)
    nan[1, 1, 1] = np.nan
    nifti(bad / "nan.nii.gz", nan)
    cut(nifti(bad / "short.nii.gz", ct_array()), 40)
    nifti(bad / "four_axes.nii.gz", np.stack([ct_array()] * 2, -1))
    nifti(bad / "labelled.nii.gz", ct_array())
    nifti(bad / "labelled_seg.nii.gz", ct_array())
    for name, old, new in (
        ("encoding.nrrd", b"encoding: raw", f"encoding: {TEXT}".encode()),
        ("space.nrrd", b"left-posterior-superior", f"{TEXT}-superior".encode()),
        ("type.mha", b"MET_SHORT", f"MET_{TEXT}".encode()),
        ("spacing.mha", b"ElementSpacing = 1", f"ElementSpacing = {TEXT}".encode()),
        ("size.mha", b"DimSize = 10", f"DimSize = {TEXT}".encode()),
        ("nrrd_size.nrrd", b"sizes: 10", f"sizes: {TEXT}".encode()),
    ):
        replace(itk(bad / name, ct_array()), old, new)
    return sum(p.is_dir() or "_seg" not in p.name for p in bad.iterdir())


def cells(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for pair in value.items():
            yield from map(str, pair)
            yield from cells(pair[1])
    elif isinstance(value, list):
        for item in value:
            yield from cells(item)
    else:
        yield value


def everything_in(folder: Path) -> bytes:
    """All bytes and names below a folder; Parquet files are read as well, since their columns are compressed."""
    found = []
    for path in folder.rglob("*"):
        found.append(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.append(path.read_bytes())
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found.append(str(table.schema).encode())
            found += [cell if isinstance(cell, bytes) else str(cell).encode() for cell in cells(table.to_pylist())]
    return b"\n".join(found)


def leaks(content: bytes, canaries: Sequence[str]) -> list[str]:
    lower = content.lower()
    wide = content.replace(b"\0", b"").lower()  # UTF-16 too
    return [c for c in canaries if c.lower().encode() in lower or c.lower().encode() in wide]


def convert(*arguments: object, code: int) -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-m", "ftengine.cli.main", "convert", "--region", "demo", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()[-2000:]
    return done


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    source = tmp_path_factory.mktemp("privacy") / "src"
    (source / "bad").mkdir(parents=True)
    return source, craft(source)


ALLOW_ALL = ["--allow-gaps", "--nan", "-1024", "--resample-labels", "--assume-orientation", "LPS"]


@pytest.mark.parametrize(
    "options", [[], ["--debug", *ALLOW_ALL], ["--debug", "--json"], ["--debug", "--dry-run"]], ids=" ".join
)
def test_no_header_text_comes_out(options: list[str], crafted: tuple[Path, int], tmp_path: Path) -> None:
    source, num_bad = crafted
    done = convert(source, tmp_path / "s.zarr", *options, code=1)
    everything = done.stdout + done.stderr + everything_in(tmp_path / "s.zarr")
    assert leaks(everything, CANARIES) == []
    if "--dry-run" in options:
        return
    store = open_store(tmp_path / "s.zarr")
    assert {c for c in store.cases if "bad" not in c} == {f"data/{name}" for name in GOOD}
    if not options:
        assert done.stderr.count(b"\nfailed: ") == num_bad
        assert len(store) == len(GOOD)


def test_the_search_finds_what_a_store_would_leak(tmp_path: Path) -> None:
    """The search itself: a canary in a case's name shows in the index, the folder and the messages."""
    (tmp_path / "src").mkdir()
    save_nifti(tmp_path / "src" / f"{TEXT}.nii.gz", ct_array())
    save_nifti(tmp_path / "src" / "b.nii.gz", ct_array()[:1])
    done = convert(tmp_path / "src", tmp_path / "s.zarr", code=1)
    assert leaks(done.stdout, CANARIES) == [TEXT]
    assert leaks(everything_in(tmp_path / "s.zarr"), CANARIES) == [TEXT]
    (index,) = (tmp_path / "s.zarr").glob("*.parquet")
    rows = b"\n".join(str(c).encode() for c in cells(pq.read_table(index).to_pylist()))
    assert leaks(rows, CANARIES) == [TEXT]


def named(folder: Path) -> None:
    """Good and bad cases whose files and folders carry the name of a person."""
    save_series(folder / f"{NAME}_Jane" / "ct", prefix=f"{NAME}_")
    save_series(folder / f"{NAME}_Gap" / "ct", prefix=f"{NAME}_", skip=(3,))
    cut(save_series(folder / f"{NAME}_Cut", prefix=f"{NAME}_")[2], 50)
    save_nifti(folder / f"{NAME} Müller_ct.nii.gz", ct_array())
    save_nifti(folder / f"{NAME} Müller_seg.nii.gz", (ct_array() > 0).astype(np.uint8))
    save_nifti(folder / f"{NAME}_Roe.nii.gz", ct_array())
    save_nifti(folder / f"{NAME}_Roe_seg.nii.gz", ct_array())
    sitk.WriteImage(sitk_image(ct_array(), grid((6, 8, 10))), str(folder / f"{NAME}_Lost.mhd"))
    (folder / f"{NAME}_Lost.raw").unlink()


@pytest.mark.parametrize("options", [["--debug"], ["--dry-run"]], ids=" ".join)
def test_pseudonyms_leave_no_name(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    named(tmp_path / "src")
    salt = "a secret of this test"
    command = (tmp_path / "src", tmp_path / "s.zarr", "--dataset", "d", "--pseudonymize", salt)
    done = convert(*command, *options, "--pseudonym-key", tmp_path / "key.json", code=1)
    everything = done.stdout + done.stderr + everything_in(tmp_path / "s.zarr")
    assert leaks(everything, [NAME, salt, "Müller"]) == []
    key = json.loads((tmp_path / "key.json").read_text())
    names = {f"{NAME}_Jane/ct", f"{NAME}_Gap/ct", f"{NAME}_Cut", f"{NAME} Müller", f"{NAME}_Roe", f"{NAME}_Lost"}
    assert set(key.values()) == {f"d/{name}" for name in names}
    if "--dry-run" in options:
        return
    store = open_store(tmp_path / "s.zarr")
    assert {key[case] for case in store.cases} == {f"d/{NAME}_Jane/ct", f"d/{NAME} Müller"}
    pseudonyms = Pseudonyms(salt)
    assert set(store.index.column("source").to_pylist()) == {
        pseudonyms.file("ct"),
        pseudonyms.file(f"{NAME} Müller_ct.nii.gz"),
    }
    again = json.loads(convert(*command, "--json", code=1).stdout)
    assert again["skipped"] == 2
    assert again["pseudonyms"] == key


@pytest.mark.data
def test_nothing_of_a_real_dicom_series_but_its_place_comes_out(data_dir: Path, tmp_path: Path) -> None:
    """Every text of the real headers that is longer than a code and no number."""
    source = data_dir / "totalseg_dicom" / "series"
    texts = set()
    for path in list(source.iterdir())[:3]:
        for element in pydicom.dcmread(path, stop_before_pixels=True).iterall():
            if element.VR in ("PN", "LO", "SH", "UI", "LT", "ST", "DA") and len(str(element.value)) > 7:
                texts.add(str(element.value))
    assert len(texts) > 5
    done = convert(source, tmp_path / "s.zarr", "--debug", code=0)
    everything = done.stdout + done.stderr + everything_in(tmp_path / "s.zarr")
    assert leaks(everything, sorted(texts)) == []
