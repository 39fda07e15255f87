"""Addresses and viewer states of the cases of a store that ``serve.py`` serves.

The cross-sections of neuroglancer follow the voxel axes: RAS+ data drawn as they lie are rotated by 180 degrees from what a radiologist
expects, so the state turns the axial view (patient's left on the right of the picture, anterior on top).
"""

import json
from typing import Any, TypedDict
from urllib.parse import quote

from ftengine.store.layout import label_color, volume_path
from ftengine.store.reader import Store

NEUROGLANCER = "https://neuroglancer-demo.appspot.com/"
STORE_ROUTE = "/store"  # where the server shows the store's root
_HALF_TURN_ABOUT_Z = [0, 0, 1, 0]  # quaternion x, y, z, w
_SHADER = "#uicontrol invlerp normalized\nvoid main() {\n  emitGrayscale(normalized());\n}\n"


class CaseLinks(TypedDict):
    """How to look at one case; all URLs end in a slash and are percent-encoded."""

    case: str
    image_url: str  # OME-Zarr image
    label_url: str | None  # OME-Zarr label image; None for a case without a label
    neuroglancer_state: dict[str, Any]
    neuroglancer_url: str  # the state behind the '#' of a public viewer: it never leaves the browser


def case_links(store: Store, case: str, base_url: str) -> CaseLinks:
    """Addresses of a case below a server's ``base_url`` (``http://127.0.0.1:PORT``). Raises StoreError for an unknown case."""
    image_url = f"{base_url.rstrip('/')}{STORE_ROUTE}/{quote(volume_path(case))}/"
    label_url = f"{image_url}labels/seg/" if store.has_label(case) else None
    state = neuroglancer_state(store, case, image_url, label_url)
    return {
        "case": case,
        "image_url": image_url,
        "label_url": label_url,
        "neuroglancer_state": state,
        "neuroglancer_url": f"{NEUROGLANCER}#!{quote(json.dumps(state, separators=(',', ':')))}",
    }


def neuroglancer_state(store: Store, case: str, image_url: str, label_url: str | None) -> dict[str, Any]:
    """A neuroglancer state: the image in the store's display window, the label as a segmentation layer in the store's colours.

    neuroglancer ignores the labels of an OME-Zarr image (google/neuroglancer#869), so that the label needs its own layer.
    """
    low, high = store.window_hu
    layers: list[dict[str, Any]] = [
        {
            "type": "image",
            "name": "CT",
            "source": f"{image_url}|zarr3:",
            "shader": _SHADER,
            "shaderControls": {"normalized": {"range": [low, high], "window": [low, high]}},
        }
    ]
    if label_url is not None:
        values = sorted(value for value in store.labels.values() if value)
        layers.append(
            {
                "type": "segmentation",
                "name": "seg",
                "source": f"{label_url}|zarr3:",
                "segments": [str(value) for value in values],
                "segmentColors": {str(value): "#{:02x}{:02x}{:02x}".format(*label_color(value)) for value in values},
                "selectedAlpha": 0.35,
            }
        )
    metre_zyx = [round(mm / 1000, 12) for mm in store.spacing_mm_zyx]  # the dimension unit must be SI without a prefix
    shape_zyx = store.shape_zyx(case)
    return {
        "title": case,
        "dimensions": {axis: [metre_zyx["zyx".index(axis)], "m"] for axis in "xyz"},  # this order is the one displayed
        "position": [n / 2 for n in reversed(shape_zyx)],
        "crossSectionOrientation": _HALF_TURN_ABOUT_Z,
        "layers": layers,
        "layout": "xy",
    }
