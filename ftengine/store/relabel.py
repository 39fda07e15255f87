"""Give a committed volume another label, without touching its image: the way of pseudo labels.

=======  ==========================================================================================
input    an open ``Store``, a case of it, its image as stored and the new label on the same grid
does     writes the label image below the volume, then a new row whose other columns stay as they were
output   the new row
raises   CaseError for a label image that cannot be replaced safely; OSError or StoreError where the store cannot be written
=======  ==========================================================================================

A conversion withdraws a row before it replaces a volume: its source can be converted again. Here the volume itself is the only copy, of
tumour labels as well, so that nothing is withdrawn. A label image is one shard and three documents, each written whole or not at all.
Where there was none, the old row says so and nobody reads the new files before the new row stands. Where there was one, its documents
stay as they are and the shard is replaced by one write. Killed anywhere, the old label or the new one is whole, and writing it again
gives the same bytes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftengine.errors import CaseError, FailureCode
from ftengine.store import index, layout
from ftengine.store.location import Location
from ftengine.store.reader import Store
from ftengine.store.writer import build_label, label_columns

LABELS = "labels"  # the folder of label images below a volume


def replace_label(
    store: Store,
    case: str,
    image_hu: NDArray[np.int16],
    label: NDArray[np.uint8],
    *,
    annotation: str,
    label_provenance: str,
) -> dict[str, Any]:
    """Write ``label`` as the label of ``case`` and commit its new row, which is returned.

    image_hu: int16 HU as stored, label: uint8 in the store's values, both [z, y, x]. annotation: "organ" or "tumor", what the label holds
    now. The caller holds the store's writer lock.
    """
    location, row = store.location, store.row(case)
    volume = layout.volume_path(case)
    folder = location.scratch()
    try:
        build_label(folder / LABELS, label, store.spacing_mm_zyx, store.labels)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if row["annotation"] != "none":
            files = [file for file in files if not _is_same_document(location, volume, folder, file)]
        for key in location.keys(f"{volume}/{LABELS}", recursive=True):
            if key.endswith(".partial"):  # of a run that was killed while it wrote here
                location.delete(key)
        for file in files:
            location.write_bytes(f"{volume}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    new = row | label_columns(
        case,
        image_hu,
        label,
        num_classes=len(store.labels),
        tumor_values=store.tumor_values,
        spacing_mm_zyx=store.spacing_mm_zyx,
        low_hu=store.window_hu[0],
    )
    stored_bytes = sum(location.size_bytes(key) for key in location.keys(volume, recursive=True))
    new |= {"annotation": annotation, "label_provenance": label_provenance, "stored_bytes": stored_bytes}
    index.append_row(location, new)
    return new


def _is_same_document(location: Location, volume: str, folder: Path, file: Path) -> bool:
    """Whether a file is metadata that the store holds already; CaseError where it holds other metadata, which the new shard would not fit."""
    if file.name != "zarr.json":
        return False
    key = f"{volume}/{file.relative_to(folder).as_posix()}"
    try:
        is_same = json.loads(location.read_bytes(key)) == json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        is_same = False
    if not is_same:
        raise CaseError(
            f"{location.child(key)}: the label image was written in another form than this version writes.",
            "Convert this case again, then label it.",
            code=FailureCode.UNREADABLE,
        )
    return True
