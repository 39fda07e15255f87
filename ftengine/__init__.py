"""ftengine: the data engine of FreeTumor - tumour segmentation on CT with tumours painted while the segmenter trains.

The public names load on first use, so that ``import ftengine`` and ``ftengine --help`` stay instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Config",
    "FtengineError",
    "Loader",
    "Patch",
    "Store",
    "SynthesisResult",
    "build_loader",
    "open_store",
    "synthesize",
]

_HOME = {
    "Batch": "types",
    "Config": "config",
    "FtengineError": "errors",
    "Loader": "loader.loader",
    "Patch": "types",
    "Store": "store.reader",
    "SynthesisResult": "assemble",
    "build_loader": "assemble",
    "open_store": "store.reader",
    "synthesize": "assemble",
}

if TYPE_CHECKING:
    from ftengine.assemble import SynthesisResult, build_loader, synthesize
    from ftengine.config import Config
    from ftengine.errors import FtengineError
    from ftengine.loader.loader import Loader
    from ftengine.store.reader import Store, open_store
    from ftengine.types import Batch, Patch


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("ftengine.kernels")
    if name not in _HOME:
        raise AttributeError(f"module 'ftengine' has no attribute {name!r}")
    return getattr(import_module(f"ftengine.{_HOME[name]}"), name)
