"""What can be predicted: CT files as conversion finds and reads them, and volumes of a store.

=======  ==========================================================================================
input    files, folders, DICOM series, stores, as the command line names them
does     finds cases, reads one, brings it to the region's spacing
output   ``Scan``: voxels for the network, and the grid that the result goes back to
raises   ConfigError for what the user must decide; CaseError and StoreError for a case that cannot be used
=======  ==========================================================================================
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.files import sha256_of_files
from ftengine.geometry import FloatZYX, Grid
from ftengine.prediction.infer import check_trained_for
from ftengine.store.folds import rows_in
from ftengine.store.reader import Store, open_store
from ftengine.volume.cases import Source, real_path
from ftengine.volume.dicom import ordered_slices
from ftengine.volume.layouts.choose import find_cases
from ftengine.volume.readers import STRICT, ReadOptions, is_dicom, read_volume
from ftengine.volume.resample import resample
from ftengine.volume.values import read_failure, shown

DATASET = "predict"  # the first part of a file's case name; it does not become a folder
GridName = Literal["native", "store"]


@dataclass(frozen=True)
class Scan:
    """One volume as the network gets it.

    image_hu: int16 [z, y, x], RAS+ on ``grid``. native: the grid of the file, in its own axis order.
    """

    image_hu: NDArray[np.int16]
    grid: Grid
    native: Grid
    notes: tuple[str, ...] = ()


class Input(Protocol):
    """A case before it is read. case: its name; stem: where its result goes below the output folder, without an extension."""

    @property
    def case(self) -> str:
        """The name in tables and messages."""
        ...

    @property
    def stem(self) -> str:
        """The path of the result below the output folder, without extension."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that must not be replaced; none of a store."""
        ...

    def digest(self) -> str:
        """SHA-256 of what is predicted. Raises CaseError or StoreError where it cannot be read."""
        ...

    def read(self, spacing_mm_zyx: FloatZYX) -> Scan:
        """Read it. Raises CaseError or StoreError."""
        ...

    def series(self) -> tuple[Path, ...]:
        """The files of a DICOM series in the order of the native grid's slices. Raises CaseError for anything else."""
        ...


@dataclass(frozen=True)
class FileInput:
    """A CT file or a DICOM series."""

    source: Source
    reading: ReadOptions = STRICT

    @property
    def case(self) -> str:
        """``predict/NAME``, or with the data set that a list states."""
        return self.source.case

    @property
    def stem(self) -> str:
        """NAME; behind its data set where a list states one."""
        return self.source.case.removeprefix(f"{DATASET}/")

    @property
    def files(self) -> tuple[Path, ...]:
        """The image's files."""
        return self.source.files

    def digest(self) -> str:
        """SHA-256 of the image's files one behind the other."""
        try:
            return sha256_of_files(*self.source.files)
        except OSError as error:
            raise read_failure(shown(self.source.image), error) from error

    def read(self, spacing_mm_zyx: FloatZYX) -> Scan:
        """Read as conversion does, without the label."""
        if self.source.refusal is not None:
            raise self.source.refusal
        volume = resample(
            read_volume(self.source.image, series_files=self.source.series_files, options=self.reading), spacing_mm_zyx
        )
        notes = (*self.source.notes, *volume.notes)
        return Scan(cast("NDArray[np.int16]", volume.image_hu), volume.grid, volume.native, notes)

    def series(self) -> tuple[Path, ...]:
        """The slices in order; CaseError where they are uneven or this is no DICOM."""
        if not is_dicom(self.source.image):
            raise CaseError(
                f"{shown(self.source.image)}: is not DICOM, and a DICOM segmentation refers to the slices of a series.",
                "Use --format nifti for it.",
                code=FailureCode.MISSING_FILE,
            )
        return ordered_slices(self.source.image, self.source.series_files)


@dataclass(frozen=True)
class StoreInput:
    """A volume of a store. Its result goes to the grid of the file that was converted, which the index knows."""

    store: Store
    case: str

    @property
    def stem(self) -> str:
        """The case's name, its data set as a folder."""
        return self.case

    @property
    def files(self) -> tuple[Path, ...]:
        """None: nothing of a store has the name of a result."""
        return ()

    def digest(self) -> str:
        """SHA-256 of the stored voxels and their place."""
        digest = hashlib.sha256(repr((self.store.grid(self.case), self.store.native_grid(self.case))).encode())
        digest.update(self.store.read_volume(self.case).image.data)
        return digest.hexdigest()

    def read(self, spacing_mm_zyx: FloatZYX) -> Scan:
        """The stored voxels; the spacing is the store's, which was checked."""
        return Scan(
            self.store.read_volume(self.case).image, self.store.grid(self.case), self.store.native_grid(self.case)
        )

    def series(self) -> tuple[Path, ...]:
        """Always a CaseError: a store does not keep the files."""
        raise CaseError(
            f"{self.case}: is a volume of a store, which does not keep the DICOM series it came from.",
            "Predict the series itself, or use --format nifti.",
            code=FailureCode.MISSING_FILE,
        )


def find_inputs(
    places: Sequence[str],
    config: Config,
    checkpoint: str | Path,
    *,
    layout: str = "auto",
    split: str | None = None,
    fold: int | None = None,
    reading: ReadOptions = STRICT,
    out: Path | None = None,
) -> list[Input]:
    """The cases of files, folders and stores, sorted by name.

    split, fold: of stores; without them all volumes. out: the folder of the results; what lies in it is not searched for inputs. Raises
    ConfigError for places that are missing, a store of another region, a selection without a store, two cases whose results would have one
    name, and ``out`` among the places.
    """
    stores = [open_store(place) for place in places if is_store(place)]
    files = [Path(place) for place in places if not is_store(place)]
    if (split is not None or fold is not None) and not stores:
        raise ConfigError("--split and --fold choose volumes of a store; want a store among the inputs.")
    inputs: list[Input] = []
    for store in stores:
        check_trained_for(store, config, checkpoint)
        used = rows_in(store.select(["split", "fold"]), split=split, fold=fold)
        inputs += [StoreInput(store, case) for case, is_used in zip(store.cases, used, strict=True) if is_used]
    if files:
        results = frozenset[Path]() if out is None else _results_among(files, out)
        found = find_cases(files, layout=layout, dataset=DATASET, skip=results)
        inputs += [FileInput(source, reading) for source in found.sources]
    if not inputs:
        raise ConfigError(f"{', '.join(places)}: holds no volume to predict. Choose another --split or --fold.")
    return sorted(_with_different_names(inputs), key=lambda one: one.stem)


def _results_among(files: Sequence[Path], out: Path) -> frozenset[Path]:
    """The real path of ``out``, to be left out of a search. ConfigError where it is one of the folders that are searched."""
    real = real_path(out)
    for place in files:
        if place.is_dir() and real_path(place) == real:
            raise ConfigError(
                f"--out {shown(out)}: is a folder of inputs, and a later run would take its results for inputs. Choose another folder, one "
                "inside it for instance."
            )
    return frozenset({real})


def is_store(place: str) -> bool:
    """Whether a place is a store and not a file or folder of CT: a URL, or a folder with a ``zarr.json``."""
    return "://" in place or (Path(place) / "zarr.json").exists()


def _with_different_names(inputs: Sequence[Input]) -> Sequence[Input]:
    seen: dict[str, Input] = {}
    for one in inputs:
        other = seen.setdefault(one.stem.casefold(), one)
        if other is not one:
            raise ConfigError(
                f"{other.case} and {one.case}: their results would have one name, {one.stem}. Predict them into two folders."
            )
    return inputs
