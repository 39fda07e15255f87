"""From a store back to NIfTI, on the stored grid or on the grid of the file that was converted."""

from pathlib import Path
from typing import Literal

from ftengine.errors import ConfigError
from ftengine.geometry import from_ras, ras_grid
from ftengine.store.layout import AIR_HU
from ftengine.store.reader import Store
from ftengine.volume.nifti import write_nifti
from ftengine.volume.resample import resample_to

GridName = Literal["store", "native"]


def export_case(store: Store, case: str, folder: str | Path, *, grid: GridName = "store") -> list[Path]:
    """Write ``<folder>/<case>_ct.nii.gz`` (int16 HU) and, for a labelled case, ``_label.nii.gz`` (uint8); returns the paths.

    grid: "store" gives the voxels as stored; "native" resamples them (image linear, label nearest) to the shape, spacing, axis order
    and directions of the converted file. Resampling twice smooths: the native export is a view, not the original.
    """
    if grid not in ("store", "native"):
        raise ConfigError(f"--grid {grid}: want store or native.")
    patch = store.read_volume(case)
    stored, native = store.grid(case), store.native_grid(case)
    outputs = [("ct", patch.image)] + ([("label", patch.label)] if store.has_label(case) else [])
    written = []
    for name, stored_array in outputs:
        path = Path(folder) / f"{case}_{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        if grid == "store":
            write_nifti(path, stored_array, stored)
        else:
            native_ras = ras_grid(native)
            is_label = name == "label"
            array = resample_to(stored_array, stored, native_ras, nearest=is_label, outside=0 if is_label else AIR_HU)
            write_nifti(path, from_ras(array, native), native)
        written.append(path)
    return written
