"""Files of weights that others wrote: read without running anything in them.

``torch.load(weights_only=True)`` refuses every callable that is not on its list; the one thing added here are NumPy's plain numbers, which
the released segmenters hold (``best_acc``). Objects, records and texts of NumPy stay refused. Before torch reads anything, its archive is
checked, as that of a checkpoint is.
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ftengine.errors import ConfigError
from ftengine.files import sha256_of_files, sha256_of_stream

HEADER_ENTRY = "ftengine"  # the one entry of a safetensors file's header that is ours: a JSON document
# what torch's reader raises on bytes that are no file of its own: an opcode may find any stack
_OF_BAD_BYTES = (
    RuntimeError,
    EOFError,
    zipfile.BadZipFile,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    struct.error,
)
# how files of torch before 1.6 begin: a pickle of torch's magic number
_OLD_FORMAT = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_WRAPPERS = ("state_dict", "model", "net", "network", "network_weights")  # where files keep their weights


@dataclass(frozen=True)
class WeightFile:
    """What a file holds. tensors: by the names in the file, on the CPU. rest: everything beside them, at the file's top level."""

    path: Path
    sha256: str
    tensors: dict[str, torch.Tensor]
    rest: dict[str, Any]


def read_weights(path: str | Path) -> WeightFile:
    """Read a ``.safetensors`` file, or a file of ``torch.save``: a state dict, or one under ``state_dict``, ``model``, ``net`` or ``network``.

    Raises ConfigError where there is no file, where it is damaged or cut short, where it holds code, and where it holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; want a file of weights (.pt, .pth or .safetensors).")
    document: Any
    if path.suffix == ".safetensors":
        document, digest = _read_safetensors(path), sha256_of(path)
    else:
        document, digest = read_pickle(path)
    tensors, rest = _split(document)
    if not tensors:
        keys = ", ".join(map(str, list(document)[:5])) if isinstance(document, Mapping) else type(document).__name__
        raise ConfigError(
            f"{path}: holds no weights ({keys}); want a state dict, or one under {', '.join(_WRAPPERS)}. Save it as such, or as .safetensors."
        )
    return WeightFile(path, digest, tensors, rest)


def read_pickle(path: Path) -> tuple[Any, str]:
    """What ``torch.save`` wrote: tensors and plain values, on the CPU; and the SHA-256 of what was read.

    Raises ConfigError, also for the format of torch before 1.6; nothing in the file is run.
    """
    try:
        with path.open("rb") as stream:  # opened once: what is hashed is what is read
            digest = sha256_of_stream(stream)
            _refuse_old_format(path, stream)
            check_archive(stream)
            with torch.serialization.safe_globals(_PLAIN_NUMBERS), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is read, or refused with an error
                return torch.load(stream, map_location="cpu", weights_only=True), digest
    except pickle.UnpicklingError as error:
        refused = str(error).split("GLOBAL ", maxsplit=1)
        if len(refused) == 2:
            raise ConfigError(
                f"{path}: asks to run {refused[1].split()[0]}, which a file of weights has no need to; nothing of it was run. Want tensors and "
                "plain values. Get the file from its authors, or save its state dict as .safetensors."
            ) from error
        raise _damaged(path, error) from error
    except _OF_BAD_BYTES as error:
        raise _damaged(path, error) from error


def check_archive(stream: IO[bytes]) -> None:
    """Check a file of ``torch.save`` before torch reads it, which neither checks its checksums nor bounds what it unpacks.

    Leaves the stream at its beginning. Raises zipfile.BadZipFile where it is no archive, or holds a compressed or a damaged entry.
    """
    with zipfile.ZipFile(stream) as archive:
        packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise zipfile.BadZipFile(f"{packed[0]} is compressed, which torch never does: it could unpack to any size")
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    stream.seek(0)


def _refuse_old_format(path: Path, stream: IO[bytes]) -> None:
    stream.seek(0)
    if _OLD_FORMAT.match(stream.read(32)):
        raise ConfigError(
            f"{path}: is in the format of torch before 1.6, which has no checksums and is not read; nothing of it was run. Where you trust it, "
            f"write it anew: python -c \"import torch; torch.save(torch.load('{path.name}', 'cpu', weights_only=True), 'new.pt')\""
        )


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits; ConfigError where there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such checkpoint or file of weights; want checkpoint.pt, weights.safetensors or the like."
        )
    return sha256_of_files(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors under ``model``, beside what ours say of themselves in the header."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return {**json.loads((file.metadata() or {}).get(HEADER_ENTRY, "{}")), "model": tensors}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    # around the reason torch tells how to run the file all the same
    text = str(error).split("WeightsUnpickler error: ")[-1].split("Check the documentation", maxsplit=1)[0]
    said = " ".join(text.split())[:160] or "empty"
    return ConfigError(f"{path}: is not a file of weights, or is damaged or cut short ({said}). Fetch it again.")


def _split(document: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, and what lies beside them."""
    if not isinstance(document, Mapping):
        return {}, {}
    for wrapper in _WRAPPERS:
        inner = document.get(wrapper)
        if isinstance(inner, Mapping):
            rest = {str(k): v for k, v in document.items() if k != wrapper}
            return {str(k): v for k, v in inner.items() if isinstance(v, torch.Tensor)}, rest
    tensors = {str(k): v for k, v in document.items() if isinstance(v, torch.Tensor)}
    return tensors, {str(k): v for k, v in document.items() if not isinstance(v, torch.Tensor)}


def _plain_number(dtype: Any, content: Any = None) -> Any:
    """NumPy's way to unpickle a number, for numbers only."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(content, bytes):
        raise pickle.UnpicklingError("a NumPy object that is not a plain number")
    return np.frombuffer(content, dtype=dtype, count=1)[0]


_PLAIN_NUMBERS: list[Any] = [
    (_plain_number, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_plain_number, "numpy._core.multiarray.scalar"),  # NumPy 2
    np.dtype,
    *{type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
]
