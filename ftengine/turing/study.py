"""The study folder and its key.

::

    STUDY/study.json       what is shown, to whom, in which order; no truth but that of the training cases
    STUDY/cases/ID.i16     int16 HU, little-endian, z y x, all of one size and one time
    STUDY/secret           what the readers' links are made of (mode 600)
    STUDY/answers/rNN.jsonl   what a reader said; see ``answers``
    KEY                    which case is which; outside the folder (mode 600)

The key holds the SHA-256 of ``study.json``, which holds those of the cases; ``study.json`` holds a commitment to the key: the SHA-256 of
the truth and a nonce, so that nobody can try out the few possible truths of a small study. Neither can be changed or exchanged unseen.
"""

import hashlib
import hmac
import json
import os
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftengine.errors import ConfigError, StoreError
from ftengine.geometry import FloatZYX, IntZYX

FORMAT: Literal[1] = 1
STUDY_FILE = "study.json"
SECRET_FILE = "secret"  # noqa: S105 - the name of a file
CASES = "cases"
ANSWERS = "answers"
_SECRET_BYTES = 32
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
ReaderId = Annotated[str, Field(pattern=r"^r[0-9]{2,4}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=60)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Mark(_Record):
    """Where the tumour lies in a case: a voxel, and the ball around it that holds all of it."""

    center_zyx: tuple[int, int, int]
    radius_mm: float


class StudyCase(_Record):
    """One case as readers see it. mark: None where readers are not told the position."""

    id: Id
    type: Name
    sha256: Sha256
    mark: Mark | None


class Showing(_Record):
    """One time that a reader is shown a case. item: its name in the browser, another one each time, so that a repeat cannot be recognised."""

    item: Id
    case: Id
    repeat: bool = False
    training: bool = False


class Reader(_Record):
    """One reader, the group they count in, and what they are shown, in order."""

    id: ReaderId
    name: Name
    group: Annotated[str, Field(max_length=60)]
    showings: tuple[Showing, ...]

    @cached_property
    def by_item(self) -> dict[str, Showing]:
        """The showings by their item."""
        return {showing.item: showing for showing in self.showings}


class Study(_Record):
    """Everything that is fixed when a study is built. training: the truth of the training cases, told after their answer."""

    format: Literal[1] = FORMAT
    id: Id
    created: str
    created_by: str
    region: str
    spacing_mm_zyx: tuple[float, float, float]
    shape_zyx: tuple[int, int, int]
    window_hu: tuple[float, float]
    types: tuple[Name, ...]
    cases: tuple[StudyCase, ...]
    training: dict[Id, bool]
    readers: tuple[Reader, ...]
    key_sha256: Sha256

    @cached_property
    def by_id(self) -> dict[str, StudyCase]:
        """The cases by their id."""
        return {case.id: case for case in self.cases}

    @property
    def case_bytes(self) -> int:
        """The size of every case's file."""
        z, y, x = self.shape_zyx
        return 2 * z * y * x

    def reader(self, reader_id: str) -> Reader:
        """A reader by their id, which is known to exist."""
        return next(reader for reader in self.readers if reader.id == reader_id)


class Truth(_Record):
    """What a case is, and where it came from."""

    synthetic: bool
    organ: str
    mark: Mark
    diameter_mm: float
    store: str
    case: str
    dataset: str
    origin_zyx: tuple[int, int, int]
    proportion: float | None


class Key(_Record):
    """The truth of a study."""

    format: Literal[1] = FORMAT
    study: Id
    study_sha256: Sha256
    nonce: Sha256
    truth: dict[Id, Truth]
    seed: int
    generator_sha256: str
    judge_sha256: str

    def commitment(self) -> str:
        """What the study holds of its key."""
        return commitment(self.study, self.nonce, self.truth)


def commitment(study_id: str, nonce: str, truth: Mapping[str, Truth]) -> str:
    """SHA-256 of the truth of a study and a nonce."""
    document = {"study": study_id, "nonce": nonce, "truth": {k: t.model_dump(mode="json") for k, t in truth.items()}}
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """The SHA-256 of some bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


class StudyFolder:
    """A study on the disk, opened for showing it or scoring it. Never knows the key."""

    def __init__(self, path: Path, study: Study, study_sha256: str) -> None:
        self.path, self.study, self.study_sha256 = path, study, study_sha256

    @classmethod
    def open(cls, path: str | Path) -> "StudyFolder":
        """Raises ConfigError where there is no study, StoreError for a study file that cannot be trusted."""
        path = Path(path)
        file = path / STUDY_FILE
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: is not a study ({STUDY_FILE}: {error.strerror}). 'ftengine turing build' makes one."
            ) from error
        return cls(path, _validated(Study, content, file), sha256_of_bytes(content))

    def case_file(self, case_id: str) -> Path:
        """The file of a case of this study."""
        return self.path / CASES / f"{case_id}.i16"

    def read_case(self, case_id: str) -> bytes:
        """The bytes of a case. Raises StoreError where they are not those that the study was built with."""
        case = self.study.by_id[case_id]
        try:
            content = self.case_file(case_id).read_bytes()
        except OSError as error:
            raise StoreError(f"{self.case_file(case_id)}: {error.strerror}. Restore the study from a copy.") from error
        if len(content) != self.study.case_bytes or sha256_of_bytes(content) != case.sha256:
            raise StoreError(
                f"{self.case_file(case_id)}: is not the file that the study was built with ({len(content)} bytes of "
                f"{self.study.case_bytes}, or another SHA-256). Restore the study from a copy; answers on a changed case say nothing."
            )
        return content

    def image_hu(self, case_id: str) -> NDArray[np.int16]:
        """The image of a case, int16 HU [z, y, x]."""
        return np.frombuffer(self.read_case(case_id), dtype="<i2").reshape(self.study.shape_zyx).astype(np.int16)

    def check_cases(self) -> None:
        """StoreError for the first case that is not what the study was built with."""
        for case in self.study.cases:
            self.read_case(case.id)

    def answers_file(self, reader: Reader) -> Path:
        """Where a reader's answers are kept."""
        return self.path / ANSWERS / f"{reader.id}.jsonl"

    @cached_property
    def _secret(self) -> bytes:
        file = self.path / SECRET_FILE
        try:
            secret = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{file}: {error.strerror}. Readers' links are made of it: restore it, or write {_SECRET_BYTES} random bytes into it, which "
                "gives readers new links; their answers stay."
            ) from error
        if len(secret) < _SECRET_BYTES:
            raise ConfigError(f"{file}: holds {len(secret)} bytes; want at least {_SECRET_BYTES} random ones.")
        return secret

    def token(self, reader: Reader) -> str:
        """What admits a reader: 192 bits that follow from the study's secret, so that a link stays good when the server starts again."""
        made = hmac.new(self._secret, f"{self.study.id}\0{reader.id}".encode(), hashlib.sha256).digest()
        return urlsafe_b64encode(made[:24]).decode()

    def reader_of(self, token: str) -> Reader | None:
        """Whose token this is, compared in a time that does not depend on how much of it is right."""
        given = token.encode(errors="surrogatepass")  # JSON may hold half a surrogate pair, which is in no token
        found = None
        for reader in self.study.readers:
            if hmac.compare_digest(given, self.token(reader).encode()):
                found = reader
        return found


def make_secret() -> bytes:
    """A new secret for a study."""
    return os.urandom(_SECRET_BYTES)


def read_key(path: str | Path) -> Key:
    """A key from its file. Raises ConfigError where it is lost, StoreError where it is damaged."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: no key there ({error.strerror}). Without its key a study cannot be scored: the study folder does not know which case is "
            "which. Name the file that 'ftengine turing build --key' wrote."
        ) from error
    return _validated(Key, content, path)


def check_key(folder: StudyFolder, key: Key, key_path: str | Path) -> None:
    """StoreError unless the key is that of this study, and neither was changed since they were made."""
    study = folder.study
    if key.study != study.id:
        raise StoreError(
            f"{key_path}: is the key of study {key.study}; {folder.path} is study {study.id}. Name the key that was made with it."
        )
    if key.study_sha256 != folder.study_sha256:
        raise StoreError(
            f"{folder.path / STUDY_FILE}: was changed since its key was made (SHA-256 {folder.study_sha256[:12]}..., the key says "
            f"{key.study_sha256[:12]}...). Restore it from a copy: a changed study is not scored."
        )
    if key.commitment() != study.key_sha256:
        raise StoreError(f"{key_path}: the truth in it was changed since the study was made. Restore it from a copy.")
    if set(key.truth) != set(study.by_id):
        raise StoreError(f"{key_path}: names other cases than {folder.path}. Restore both from a copy.")


def _validated(model: type[Any], content: bytes, path: Path) -> Any:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise StoreError(f"{path}: is not JSON ({error}). Restore it from a copy.") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise StoreError(f"{path}: has format {found!r}; this version of ftengine reads {FORMAT}.")
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path}: {where}: {first['msg']}. Restore it from a copy.") from error


def presets(window_hu: tuple[float, float]) -> list[tuple[str, float, float]]:
    """Names and HU of windows whose middle lies in what the cases hold; the first shows all of it."""
    low, high = window_hu
    common = (("Soft tissue", 40.0, 400.0), ("Narrow", 30.0, 150.0), ("Lung", -600.0, 1500.0))
    return [
        ("Full range", low, high),
        *((name, level - width / 2, level + width / 2) for name, level, width in common if low <= level <= high),
    ]


def layout_of(shape_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> str:
    """Size of a case for people."""
    mm = " x ".join(f"{n * s:g}" for n, s in zip(shape_zyx, spacing_mm_zyx, strict=True))
    return f"{' x '.join(map(str, shape_zyx))} voxels (z, y, x), {mm} mm"
