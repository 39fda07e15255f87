"""Checkpoints and weights: written whole or not at all, safe to load, and enough to go on to the same losses.

Two kinds of file. ``checkpoint.pt`` is a run's own state (torch's zip format, loaded with ``weights_only``); ``weights.safetensors``
holds the weights alone, for others. Both carry the configuration and the versions that made them. ``load_checkpoint`` reads either.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError, SaveError
from ftengine.files import sha256_of_stream, write_whole
from ftengine.training.networks import SynthesisUNet, build_generator, build_segmenter
from ftengine.training.weight_files import HEADER_ENTRY, check_archive

FORMAT = 1
WEIGHTS = "weights.safetensors"
Kind = Literal["segmenter", "generator"]
SECTION: dict[Kind, str] = {"segmenter": "training", "generator": "generator_training"}  # of the configuration
_WANTED = "want a file that 'ftengine train' wrote (checkpoint.pt or weights.safetensors)"
# What torch.load, and the tensors it rebuilds, raise on damaged or foreign files; fuzzed in tests/training/test_checkpoint.py
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,  # torch's own, NotImplementedError and RecursionError among them
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    SafetensorError,
)


def save_checkpoint(path: Path, kind: Kind, config: Config, contents: Mapping[str, Any], *, keep: int = 1) -> None:
    """Write a checkpoint beside ``path`` and move it there; a crash or a full disk keeps the previous one.

    ``contents`` holds "model" (a state dict) and whatever a resumed run needs: tensors, numbers, texts, lists and dicts of them. With
    ``keep`` above 1 the one that was there stays as ``checkpoint-STEP.pt``, and the oldest of these go once the new one is safe, so that
    ``keep`` files remain; with 1 no other file is touched. Raises SaveError where it cannot be written; nothing is lost then.
    """
    document = {
        "format": FORMAT,
        "kind": kind,
        "engine_version": __version__,
        "torch_version": str(torch.__version__),
        "config": config.model_dump(mode="json"),
        **contents,
    }
    publish(
        path, lambda stream: torch.save(document, stream), before=lambda: _keep_previous(path) if keep > 1 else None
    )
    if keep > 1:
        older = sorted(_kept(path).items(), reverse=True)
        for _, file in older[keep - 1 :]:
            file.unlink()


def save_weights(
    path: Path, kind: Kind, config: Config, weights: Mapping[str, torch.Tensor], *, identity: Mapping[str, str]
) -> None:
    """Write weights as safetensors, as safe as ``save_checkpoint``; the header has kind, configuration, versions, and ``identity``: what
    else the training was given, by option.
    """
    header = {
        "format": FORMAT,
        "kind": kind,
        "engine_version": __version__,
        "torch_version": str(torch.__version__),
        "config": config.model_dump(mode="json"),
        "identity": dict(identity),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    data = save_safetensors(tensors, {HEADER_ENTRY: json.dumps(header)})
    publish(path, lambda stream: stream.write(data))


def load_checkpoint(path: str | Path, kind: Kind | None = None) -> dict[str, Any]:
    """Read a checkpoint or a weights file onto the CPU without running any code in it.

    Returns what was saved: "kind", "config" (plain values), "model" and, of a checkpoint, the run's state; and the file's "sha256".
    Raises ConfigError where it is none, is damaged, or is of another kind or a newer format.
    """
    path = Path(path)
    _check_exists(path)
    try:
        with path.open("rb") as stream:  # opened once: what is hashed is what is read
            digest = sha256_of_stream(stream)
            document = _weights_document(stream) if path.suffix == ".safetensors" else _state_document(stream)
    except _UNREADABLE as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(
            f"{path}: is not a checkpoint of ftengine or is damaged ({why}). Nothing in it was run; {_WANTED}."
        ) from error
    check_document(path, document, kind)
    return {**document, "sha256": digest}


def load_weights_file(path: str | Path, kind: Kind | None = None) -> tuple[dict[str, torch.Tensor], Config]:
    """Weights by name, and the configuration they were trained with, of either kind of file."""
    document = load_checkpoint(path, kind)
    return document["model"], config_inside(path, document)


def load_weights(network: nn.Module, path: str | Path, document: Mapping[str, Any]) -> None:
    """Put a checkpoint's weights into a network of the same architecture; ConfigError naming the first difference."""
    have, want = document["model"], network.state_dict()
    missing = sorted(want.keys() - have.keys())
    extra = sorted(have.keys() - want.keys())
    shapes = [
        f"{k} is {tuple(have[k].shape)}, want {tuple(want[k].shape)}"
        for k in want
        if k in have and have[k].shape != want[k].shape
    ]
    if missing or extra or shapes:
        first = shapes[0] if shapes else f"{(missing or extra)[0]} is {'missing' if missing else 'not in the network'}"
        raise ConfigError(
            f"{path}: holds the weights of another network ({first}; {len(missing)} missing, {len(extra)} extra, {len(shapes)} of another "
            "shape). Use the configuration it was trained with, or train with this one."
        )
    network.load_state_dict(have)


def load_segmenter(path: str | Path) -> tuple[nn.Module, Config]:
    """A trained segmenter in eval mode and the configuration it was trained with."""
    document = load_checkpoint(path, "segmenter")
    config = config_inside(path, document)
    network = build_segmenter(config)
    load_weights(network, path, document)
    return network.eval(), config


def load_generator(path: str | Path) -> tuple[SynthesisUNet, Config]:
    """A trained generator in eval mode and the configuration it was trained with."""
    document = load_checkpoint(path, "generator")
    config = config_inside(path, document)
    network = build_generator(config)
    load_weights(network, path, document)
    return network.eval(), config


def config_inside(path: str | Path, document: Mapping[str, Any]) -> Config:
    """The configuration in a checkpoint; ConfigError where it lacks the label map, and where this version does not know it, naming the version
    that does."""
    region = document["config"].get("region") if isinstance(document["config"], dict) else None
    is_newer = _parsed(document.get("engine_version")) > _parsed(__version__)
    if not is_newer and (not isinstance(region, dict) or not region.get("labels")):
        raise ConfigError(
            f"{path}: has lost its label map (region.labels in the configuration inside): nobody can say what its outputs mean. Use the file "
            "as 'ftengine train' or 'ftengine weights' wrote it."
        )
    try:
        return Config.from_dict(document["config"], where=f"{path} (configuration inside)")
    except ConfigError as error:
        if is_newer:
            raise ConfigError(
                f"{path}: was written by ftengine {document['engine_version']}, and this is {__version__}, which does not know its "
                f"configuration ({str(error).splitlines()[0]}). Install ftengine {document['engine_version']} or newer."
            ) from error
        raise


def publish(path: Path, write: Callable[[IO[bytes]], object], *, before: Callable[[], None] = lambda: None) -> None:
    """Write a file aside, bring it to the disk, and move it to its name; ``before`` is called just before the move.

    Raises SaveError where it cannot be written; what was there stays.
    """
    for stale in path.parent.glob(f".{path.name}.*.partial"):  # of a run that was killed while it saved
        stale.unlink(missing_ok=True)
    try:
        write_whole(path, write, before=before)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what a stream raises
        if not isinstance(cause, OSError):
            raise
        kept = (
            f"the one of before is kept: free space there, then go on with --resume ({path})"
            if path.exists()
            else "free space there"
        )
        raise SaveError(
            f"{path}: could not be written ({cause.strerror or cause}; {_free(path.parent)}). Nothing was lost; {kept}."
        ) from error


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free"
    except OSError:
        return "free space unknown"


def _keep_previous(path: Path) -> None:
    """Give the checkpoint at ``path`` a second name with its step: nothing is copied where the file system has hard links."""
    if not path.exists():
        return
    step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    kept = path.with_name(f"{path.stem}-{int(step)}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copyfile(path, kept)


def _kept(path: Path) -> dict[int, Path]:
    """Older checkpoints beside ``path``, by step."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    found = ((pattern.fullmatch(file.name), file) for file in path.parent.iterdir())
    return {int(match[1]): file for match, file in found if match}


def _state_document(stream: IO[bytes]) -> Any:
    """A checkpoint's document."""
    check_archive(stream)
    return torch.load(stream, map_location="cpu", weights_only=True)


def _weights_document(stream: IO[bytes]) -> Any:
    data = stream.read()
    tensors = load_safetensors(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][HEADER_ENTRY]
    return {**json.loads(header), "model": tensors}


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint; {_WANTED}.")


def check_document(path: Path, document: Any, kind: Kind | None) -> None:
    """ConfigError where a file's content is no checkpoint of ours, of another format (naming the version that reads it) or another kind."""
    if not isinstance(document, dict) or not {"format", "kind", "config", "model"} <= document.keys():
        raise ConfigError(
            f"{path}: is not a checkpoint of ftengine (no format, kind, config and model in it); {_WANTED}."
        )
    if document["format"] != FORMAT:
        version = document.get("engine_version", "unknown")
        newer = isinstance(document["format"], int) and document["format"] > FORMAT
        advice = f"Install ftengine {version} or newer" if newer else f"Use ftengine {version}, or train again"
        raise ConfigError(
            f"{path}: has checkpoint format {document['format']!r} of ftengine {version}; this version, {__version__}, reads format "
            f"{FORMAT}. {advice}."
        )
    model = document["model"]
    if not isinstance(model, dict) or not all(
        isinstance(t, torch.Tensor) and t.layout == torch.strided for t in model.values()
    ):
        raise ConfigError(f"{path}: its model is not a table of weights; {_WANTED}.")
    if kind is not None and document["kind"] != kind:
        raise ConfigError(
            f"{path}: holds a {document['kind']}; want a {kind}. Give the file of the other training stage."
        )


def _parsed(version: object) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(version))[:3])
