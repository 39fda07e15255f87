"""Names of cases without names of people: folders and files of patients are often called after them.

=======  ==========================================================================================
input    case names, file names and error texts of one conversion, and a secret salt
does     each part of a name below the data set becomes 16 hexadecimal digits of HMAC-SHA256 under the salt
output   the same names for the same salt; who has the salt can test a guess, nobody else can
raises   ConfigError for a salt that is short enough to be found by trying
=======  ==========================================================================================

The data set's own name stays, and so does the extension of a file: both are the user's words for a kind, not for a person.
"""

import hashlib
import hmac
import json
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ftengine.errors import ConfigError
from ftengine.volume.values import shown

NUM_DIGITS = 16  # 64 bits: among a million names two are equal with a chance of 1 in 37 million
MIN_SALT_CHARACTERS = 12
_EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".zraw", ".dcm")


@dataclass(frozen=True)
class Pseudonyms:
    """Keyed hashes of names. salt: at least 12 characters, kept by the user and written nowhere."""

    salt: str = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.salt) < MIN_SALT_CHARACTERS:
            raise ConfigError(
                f"--pseudonymize: a salt of {len(self.salt)} characters; want at least {MIN_SALT_CHARACTERS}, or names could be found by trying."
            )

    def part(self, name: str) -> str:
        """16 hexadecimal digits for one part of a name; composed and decomposed spelling of a letter give the same."""
        text = unicodedata.normalize("NFC", name).encode("utf-8", errors="surrogateescape")
        return hmac.new(self.salt.encode("utf-8"), text, hashlib.sha256).hexdigest()[:NUM_DIGITS]

    def case(self, case: str) -> str:
        """``<dataset>/<name>`` with every part of the name hashed on its own, so that folders stay folders."""
        dataset, *parts = case.split("/")
        return "/".join((dataset, *map(self.part, parts)))

    def file(self, name: str) -> str:
        """A file's name hashed, with the extension of an image format left on."""
        lower = name.lower()
        extension = next((e for e in _EXTENSIONS if lower.endswith(e)), "")
        return self.part(name) + extension

    def key(self, cases: Iterable[str]) -> dict[str, str]:
        """Which case stands behind each pseudonym: for the user alone, never for a store. Raises ConfigError for two of one pseudonym."""
        names: dict[str, str] = {}
        for case in cases:
            if names.setdefault(self.case(case), case) != case:
                raise ConfigError(
                    f"cases {case!r} and {names[self.case(case)]!r} have one pseudonym; want different ones. Choose another salt."
                )
        return names

    def hide(self, text: str, case: str, paths: Collection[Path]) -> str:
        """An error's text with the files and folders of a case (by its real name) in it replaced by pseudonyms.

        paths: all files of the case. As many folders above each are replaced as the case's name has parts.
        """
        depth = case.count("/")
        replaced = {shown(path): self.file(path.name) for path in paths}
        for path in paths:
            for folder in list(path.parents)[:depth]:
                if folder.name:
                    replaced.setdefault(shown(folder), self.part(folder.name))
        replaced |= {shown(Path(path.name)): self.file(path.name) for path in paths if path.name}
        replaced[case] = self.case(case)
        for name in sorted(replaced, key=len, reverse=True):
            text = text.replace(name, replaced[name])
        return text


def write_key(file: Path, key: Mapping[str, str], store: Path) -> None:
    """Add ``Pseudonyms.key`` to a JSON file that only its owner may read; what the file holds already stays.

    Raises ConfigError without any pseudonyms, for a file inside the store, and for a file that is not such a key.
    """
    if not key:
        raise ConfigError(f"--pseudonym-key {file}: there are no pseudonyms without --pseudonymize SALT.")
    if file.resolve().is_relative_to(store.resolve()):
        raise ConfigError(f"--pseudonym-key {file}: lies in the store, which must not hold it; want another place.")
    try:
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"--pseudonym-key {file}: exists and is not a key of pseudonyms (JSON).") from error
    if not isinstance(before, dict):
        raise ConfigError(f"--pseudonym-key {file}: exists and is not a key of pseudonyms (a JSON object).")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as stream:
            json.dump(before | dict(key), stream, indent=2, ensure_ascii=False)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
