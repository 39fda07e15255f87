"""Addresses and viewer states of the cases of a store that ``serve.py`` serves.

neuroglancer draws voxel axes as they lie, which for RAS+ data is turned from what a radiologist expects, and its own four panels cannot all
be turned right at once. The state therefore has three views with an orientation each: axial seen from the feet, coronal from the front
(both with the patient's right on the left of the picture), sagittal with anterior on the left; superior or anterior on top.
"""

import json
from typing import Any, TypedDict
from urllib.parse import quote

from ftengine.store.layout import label_color, volume_path
from ftengine.store.reader import Store

NEUROGLANCER = "https://neuroglancer-demo.appspot.com/"
STORE_ROUTE = "/store"  # where the server shows the store's root
_VIEW_PIXELS = 400  # the volume is scaled to about this many
_ROOT_HALF = 0.5**0.5
# quaternions x, y, z, w that turn (right of picture, bottom of picture) from (+x, +y) to ...
_AXIAL = (0.0, 0.0, 1.0, 0.0)  # (-x, -y)
_CORONAL = (0.0, _ROOT_HALF, -_ROOT_HALF, 0.0)  # (-x, -z)
_SAGITTAL = (-0.5, 0.5, -0.5, 0.5)  # (-y, -z)
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
    extent_mm = max(n * mm for n, mm in zip(shape_zyx, store.spacing_mm_zyx, strict=True))
    names = [layer["name"] for layer in layers]
    return {
        "title": case,
        "dimensions": {axis: [metre_zyx["zyx".index(axis)], "m"] for axis in "xyz"},
        "position": [n / 2 for n in reversed(shape_zyx)],
        "crossSectionScale": extent_mm / min(store.spacing_mm_zyx) / _VIEW_PIXELS,  # smallest voxels a pixel
        "layers": layers,
        "layout": {
            "type": "row",
            "children": [
                _view(names, _AXIAL),
                {"type": "column", "children": [_view(names, _CORONAL), _view(names, _SAGITTAL)]},
            ],
        },
    }


def _view(layers: list[str], orientation: tuple[float, float, float, float]) -> dict[str, Any]:
    turned = {"link": "unlinked", "value": list(orientation)}
    return {"type": "viewer", "layers": layers, "layout": "xy", "crossSectionOrientation": turned}
