"""The store, format 1: what lies where, and the metadata that other readers need.

::

    STORE/
      zarr.json                     group; attributes.ftengine: format, region, spacing_mm_zyx, labels, organs, window_hu, created_by;
                                    of a subset also volumes_of: the store that holds its volumes, relative to this one
      index.parquet                 one row a volume: the commit record. No row, no volume.
      index.d/*.parquet             rows added since the last compaction
      volumes/<dataset>/<case>/     an OME-Zarr 0.5 image, axes z y x in millimetre
        0/                          int16 HU; fill -1024; one shard; inner chunks 32 x 32 x 32; blosc lz4hc 3 bitshuffle; crc32c
        labels/seg/0/               uint8; same chunks; blosc zstd 5
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ftengine.config import RegionConfig
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX

FORMAT = 1
AIR_HU = -1024  # fill value of images, and what lies outside a volume
CHUNK = 32  # edge of an inner chunk, voxels: a 96-voxel patch touches 27 to 64 of them
# level 9 takes 1.5 times as long for half a per cent; every level reads the same, and as fast (ADR 10)
IMAGE_CODEC = {"cname": "lz4hc", "clevel": 3, "shuffle": "bitshuffle", "typesize": 2}
LABEL_CODEC = {"cname": "zstd", "clevel": 5, "shuffle": "noshuffle", "typesize": 1}

# RAS+ volumes: the direction in which each index grows (OME-NGFF RFC-4, an extra key in 0.5)
_ORIENTATION = {"z": "inferior-to-superior", "y": "posterior-to-anterior", "x": "left-to-right"}
# Distinct on grey and for the common colour vision deficiencies (Okabe and Ito): organ light, tumour strong, repeated
_COLORS = ((86, 180, 233), (213, 94, 0), (0, 158, 115), (230, 159, 0), (204, 121, 167), (240, 228, 66), (0, 114, 178))
_CASE_PART = re.compile(r"[^/\x00-\x1f\x7f\\]+")


def check_case_name(case: str) -> str:
    """The name, or a ConfigError when it could leave the store's folder or cannot be a path."""
    parts = case.split("/")
    if len(parts) < 2 or any(not _CASE_PART.fullmatch(p) or p.startswith(".") for p in parts):
        raise ConfigError(
            f"case name {case!r}: want <dataset>/<name> without empty parts, parts that start with a dot, backslashes or control "
            "characters. Rename the file or choose another --dataset."
        )
    return case


def volume_path(case: str) -> str:
    """Path of a case's group below the store."""
    return f"volumes/{case}"


def shard_shape(shape_zyx: IntZYX) -> IntZYX:
    """One shard holds the whole volume: its shape rounded up to whole inner chunks."""
    z, y, x = chunks_per_axis(shape_zyx)
    return z * CHUNK, y * CHUNK, x * CHUNK


def chunks_per_axis(shape_zyx: IntZYX) -> IntZYX:
    """Number of inner chunks along each axis; a chunk id is its C-order place in this grid."""
    z, y, x = shape_zyx
    return -(-z // CHUNK), -(-y // CHUNK), -(-x // CHUNK)


def group_document(attributes: Mapping[str, Any] | None = None) -> bytes:
    """``zarr.json`` of a Zarr v3 group."""
    document = {"attributes": dict(attributes or {}), "zarr_format": 3, "node_type": "group"}
    return json.dumps(document, indent=2).encode()


def array_document(shape_zyx: IntZYX, dtype: str, fill: int, codec: Mapping[str, Any]) -> bytes:
    """``zarr.json`` of an array of the store, as zarr-python writes it; importing that takes a worker a fifth of a second."""
    little_endian: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    in_one_byte = {"name": "bytes"}
    crc32c = {"name": "crc32c"}
    inner = [
        little_endian if codec["typesize"] > 1 else in_one_byte,
        {
            "name": "blosc",
            "configuration": {k: codec[k] for k in ("typesize", "cname", "clevel", "shuffle")} | {"blocksize": 0},
        },
        crc32c,
    ]
    sharding = {
        "chunk_shape": [CHUNK, CHUNK, CHUNK],
        "codecs": inner,
        "index_codecs": [little_endian, crc32c],
        "index_location": "end",
    }
    document = {
        "shape": list(shape_zyx),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard_shape(shape_zyx))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": ["z", "y", "x"],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(document, indent=2).encode()


def store_attributes(region: RegionConfig, created_by: str) -> dict[str, Any]:
    """``attributes.ftengine`` of the store's root group."""
    return {
        "format": FORMAT,
        "region": region.name,
        "spacing_mm_zyx": list(region.spacing_mm_zyx),
        "labels": dict(region.labels),
        "organs": {name: organ.model_dump() for name, organ in region.organs.items()},
        "window_hu": list(region.window_hu),
        "created_by": created_by,
    }


def label_color(value: int) -> tuple[int, int, int]:
    """RGB colour of a label value above 0, 0..255; used by viewers of the store and by our own pictures."""
    return _COLORS[(value - 1) % len(_COLORS)]


def image_attributes(case: str, spacing_mm_zyx: FloatZYX, window_hu: tuple[float, float]) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes of a volume."""
    low, high = window_hu
    window = {"min": AIR_HU, "max": 3071, "start": low, "end": high}
    return {
        "version": "0.5",
        "multiscales": [_multiscale(case, spacing_mm_zyx)],
        "omero": {
            "name": case,
            "rdefs": {"model": "greyscale"},
            "channels": [{"label": "HU", "color": "FFFFFF", "active": True, "window": window}],
        },
    }


def label_attributes(spacing_mm_zyx: FloatZYX, labels: dict[str, int]) -> dict[str, Any]:
    """OME-Zarr 0.5 attributes of a label image; colours and properties list the same values, as validators demand."""
    named = {value: name for name, value in labels.items() if value}
    return {
        "version": "0.5",
        "multiscales": [_multiscale("seg", spacing_mm_zyx)],
        "image-label": {
            "colors": [{"label-value": value, "rgba": [*label_color(value), 255]} for value in named],
            "properties": [{"label-value": value, "name": name} for value, name in named.items()],
            "source": {"image": "../../"},
        },
    }


def _multiscale(name: str, spacing_mm_zyx: FloatZYX) -> dict[str, Any]:
    axes = [
        {
            "name": n,
            "type": "space",
            "unit": "millimeter",
            "orientation": {"type": "anatomical", "value": _ORIENTATION[n]},
        }
        for n in "zyx"
    ]
    scale = {"type": "scale", "scale": list(spacing_mm_zyx)}
    return {"name": name, "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
