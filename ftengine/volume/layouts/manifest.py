"""A CSV or TSV manifest: a row a case, columns image, label, organ_label, case, dataset, split.

=======  ==========================================================================================
input    a .csv or .tsv file, or a folder that holds one with a column ``image``
does     takes paths relative to the manifest's folder and every cell as text; empty cells are not given
output   one ``Found`` a row; without ``case``, it is named by its path below the folder as in a plain one
raises   ConfigError that names each bad row by its line; a listed file that is missing fails its case when it is read
=======  ==========================================================================================
"""

import csv
import difflib
import io
from collections.abc import Iterator
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.volume.cases import Found, Walk, case_name, check_dataset, check_part
from ftengine.volume.layouts.listing import MAX_LIST_BYTES, PathError, below, entries, path_inside
from ftengine.volume.values import shown

COLUMNS = ("image", "label", "organ_label", "case", "dataset", "split")
EXTENSIONS = (".csv", ".tsv")
_MAX_LISTED = 10
_MAX_SPLIT_CHARACTERS = 64


def is_manifest(file: Path) -> bool:
    """Whether a file is CSV or TSV by its name with a column ``image``: other tables lie in many data sets."""
    if not file.name.lower().endswith(EXTENSIONS) or not file.is_file():
        return False
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline(1 << 16)
        return "image" in [name.strip() for name in next(csv.reader([first], delimiter=_delimiter(file, first)), [])]
    except (OSError, ValueError, csv.Error):
        return False


def find_manifest(file: Path, walk: Walk, *, dataset: str, absolute_paths: bool = False) -> None:
    """Add the rows of a manifest to ``walk``. dataset: of rows that name none. absolute_paths: they may lie outside the folder."""
    problems: list[str] = []
    lines: dict[str, int] = {}
    images: dict[Path, int] = {}
    for line, row in _rows(file, problems):
        try:
            found = _found(row, file, absolute_paths=absolute_paths)
            case = case_name(found, dataset)
        except (ValueError, ConfigError) as error:
            problems.append(f"line {line}: {str(error).rstrip('.')}")
            continue
        for what, known in ((f"case {case!r}", lines.get(case)), (f"image {row['image']!r}", images.get(found.path))):
            if known is not None:
                problems.append(f"line {line}: {what} stands in line {known} too")
                break
        else:
            walk.images.append(found)
        lines.setdefault(case, line)
        images.setdefault(found.path, line)
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise ConfigError(f"{shown(file)}: {'; '.join(problems[:_MAX_LISTED])}{more}. Repair these lines.")


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row that has as many as the header; others go to ``problems``."""
    where = shown(file)
    text = _text(file)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=_delimiter(file, text.split("\n", 1)[0]),
        skipinitialspace=True,
        strict=True,
    )
    columns: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _columns(cells, where)
            elif len(cells) != len(columns):
                problems.append(f"line {reader.line_num}: {len(cells)} cells for {len(columns)} columns")
            else:
                yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: {error}")
    if columns is None:
        raise ConfigError(f"{where}: empty; want a header line with the column image. Check the file.")


def _text(file: Path) -> str:
    where = shown(file)
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise ConfigError(
                f"{where}: {file.stat().st_size:,} bytes; want a list of at most {MAX_LIST_BYTES:,}. Check the file."
            )
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}). Check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text (byte {error.start:,}). Save it as CSV in UTF-8.") from error


def _delimiter(file: Path, first_line: str) -> str:
    """A tab in .tsv; in .csv a comma, or the semicolon that spreadsheets write where the comma is the decimal sign."""
    if file.name.lower().endswith(".tsv"):
        return "\t"
    return ";" if ";" in first_line and "," not in first_line else ","


def _columns(cells: list[str], where: str) -> list[str]:
    """The header's names, checked."""
    columns = [cell.strip() for cell in cells]
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, 1)
            raise ConfigError(
                f"{where}: unknown column {name!r}{f' (did you mean {near[0]}?)' if near else ''}; want {', '.join(COLUMNS)}. "
                "Take it away or rename it."
            )
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ConfigError(f"{where}: column {twice!r} stands twice; want each once.")
    if "image" not in columns:
        raise ConfigError(f"{where}: no column image; want it, and any of {', '.join(COLUMNS[1:])}.")
    return columns


def _found(row: dict[str, str], file: Path, *, absolute_paths: bool) -> Found:
    """One row; ValueError or ConfigError for cells that cannot be used."""
    root = file.parent

    def path(column: str) -> Path | None:
        if not row.get(column, "").strip():
            return None
        try:
            return path_inside(root, row[column], any_absolute=absolute_paths)
        except PathError as error:
            hint = " (--absolute-paths allows it)" if Path(row[column]).is_absolute() and not absolute_paths else ""
            raise PathError(f"{column} {error}{hint}") from error

    image = path("image")
    if image is None:
        raise ValueError("no image")
    case, dataset, split = (row.get(column, "").strip() for column in ("case", "dataset", "split"))
    for part in case.split("/") if case else []:
        check_part(part, f"case {case!r}")
    if dataset:
        check_dataset(dataset)
    if len(split) > _MAX_SPLIT_CHARACTERS or not split.isprintable():
        raise ValueError(f"split {split[:_MAX_SPLIT_CHARACTERS]!r} is no plain word")
    return Found(
        image,
        below(root, image),
        is_folder=image.is_dir(),
        series_files=_slices(image),
        name=case,
        dataset=dataset,
        is_listed=True,
        label=path("label"),
        organ_label=path("organ_label"),
        split=split,
    )


def _slices(image: Path) -> tuple[Path, ...]:
    """The files of a folder of DICOM slices, () for a file or a folder that cannot be listed: reading it says so."""
    try:
        return tuple(path for path in entries(image) if path.is_file())
    except ConfigError:
        return ()
