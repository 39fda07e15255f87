"""Checkpoints: atomic, safe to load, and enough to go on to the same losses."""

import os
import pickle
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ftengine import __version__
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.networks import SynthesisUNet, build_generator, build_segmenter

FORMAT = 1
Kind = Literal["segmenter", "generator"]


def save_checkpoint(path: Path, kind: Kind, config: Config, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint beside ``path`` and move it there; a crash or a full disk keeps the previous one.

    ``contents`` holds "model" (a state dict) and whatever a resumed run needs: tensors, numbers, texts, lists and dicts of them.
    """
    document = {
        "format": FORMAT,
        "kind": kind,
        "engine_version": __version__,
        "config": config.model_dump(mode="json"),
        **contents,
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(document, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, kind: Kind | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code in it; ConfigError where it is none, or of another kind or format."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint; want a file that 'ftengine train' wrote.")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ConfigError(
            f"{path}: is not a checkpoint of ftengine or is damaged ({' '.join(str(error).split())[:160] or 'empty'})."
        ) from error
    if not isinstance(document, dict) or "format" not in document or "kind" not in document:
        raise ConfigError(f"{path}: is not a checkpoint of ftengine (no format and kind in it).")
    if document["format"] != FORMAT:
        raise ConfigError(f"{path}: has checkpoint format {document['format']!r}; this version reads {FORMAT}.")
    if kind is not None and document["kind"] != kind:
        raise ConfigError(
            f"{path}: holds a {document['kind']}; want a {kind}. Give the file of the other training stage."
        )
    return document


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
    config = Config.from_dict(document["config"], where=f"{path} (configuration inside)")
    network = build_segmenter(config)
    load_weights(network, path, document)
    return network.eval(), config


def load_generator(path: str | Path) -> tuple[SynthesisUNet, Config]:
    """A trained generator in eval mode and the configuration it was trained with."""
    document = load_checkpoint(path, "generator")
    config = Config.from_dict(document["config"], where=f"{path} (configuration inside)")
    network = build_generator(config)
    load_weights(network, path, document)
    return network.eval(), config
