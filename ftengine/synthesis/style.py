"""The diverse variant: what makes painted tumours differ from one another beyond G (docs/synthesisers.md).

Eq. 1 subtracts ``tanh(G(x)) g(x)`` inside M. Here that change is multiplied, in this order, by 1 + h times a noise field of mean 0 and
standard deviation 1 inside M (heterogeneity), by a number that gives it the drawn mean (target contrast), by -1 (hyperdense), and by 1 in the
core and minus the rim's contrast in the rim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.geometry import FloatZYX, mm_to_vox
from ftengine.kernels import for_each, gaussian_blur, upload
from ftengine.synthesis.rows import mean_inside
from ftengine.synthesis.shape import Style

LEAST_CHANGE_HU = 5.0  # a target is reached where G's own mean change is at least this: noise is not blown up
LEAST_DEVIATION = 1e-3  # of a field that lies in [0, 1]: M of a voxel or two
# The mask blurred with the rim's width w is normal_cdf(depth / w) below a flat border: the core begins to fade in at a depth of 0.75 w
RIM_ENDS, CORE_BEGINS = 0.7733726, 0.8943502  # normal_cdf(0.75), normal_cdf(1.25)


@dataclass(frozen=True)
class _Inputs:
    """What ``restyle`` is given; depth: the blurred masks, where a style has a rim."""

    texture: torch.Tensor
    g: torch.Tensor
    mask: torch.Tensor
    box: torch.Tensor
    styles: Sequence[Style]
    fields: Sequence[torch.Tensor] | None
    depth: torch.Tensor | None
    width_hu: float


def restyle(
    texture: torch.Tensor,
    g: torch.Tensor,
    mask: torch.Tensor,
    box: torch.Tensor,
    styles: Sequence[Style],
    *,
    fields: Sequence[torch.Tensor] | None,
    width_hu: float,
    spacing_mm_zyx: FloatZYX,
) -> torch.Tensor:
    """The texture of Eq. 1 that paints as the styles say, right inside the box: ``texture`` itself, changed, or a new tensor.

    texture, g: float32 [R, z, y, x], g(x) and G(x) before tanh; mask: uint8 [R, z, y, x], hard; box: int64 [R, 2, 3], all that is painted,
    soft edges too; fields: noise of each patch, float32 [z, y, x], where styles are heterogeneous; width_hu: of the window. Differentiable
    in g. A GPU is not waited for; the CPU looks nowhere but inside the boxes.
    """
    depth = None
    if any(s.rim_width_mm > 0 for s in styles):
        depth = gaussian_blur(mask, [mm_to_vox(s.rim_width_mm, spacing_mm_zyx) for s in styles], box=box)
    inputs = _Inputs(texture, g, mask, box, styles, fields, depth, width_hu)
    if texture.device.type == "cuda" or g.requires_grad:
        return _on_whole_patches(inputs)
    for_each(len(styles), lambda row: _in_box(inputs, row))
    return texture


def _on_whole_patches(inputs: _Inputs) -> torch.Tensor:
    texture, styles, mask, box = inputs.texture, inputs.styles, inputs.mask, inputs.box
    if inputs.fields is not None:
        fields = torch.stack(list(inputs.fields))
        off = fields - _as_column(mean_inside(fields, mask, box))
        deviation = mean_inside(off * off, mask, box).sqrt().clamp(min=LEAST_DEVIATION)
        texture = texture * (1 + _column([s.heterogeneity for s in styles], texture) * (off / _as_column(deviation)))
    targets = [s.target_hu for s in styles]
    if any(t is not None for t in targets):
        mean = mean_inside(texture, mask, box, tanh_of=inputs.g)
        least = LEAST_CHANGE_HU / inputs.width_hu
        reached = torch.where(mean < 0, mean.clamp(max=-least), mean.clamp(min=least))
        wanted = _column([0.0 if t is None else t / inputs.width_hu for t in targets], texture)
        has_target = upload(np.array([t is not None for t in targets]), texture.device).view(-1, 1, 1, 1)
        texture = texture * torch.where(has_target, wanted / _as_column(reached), 1.0)
    if any(s.is_hyperdense for s in styles):
        texture = texture * _column([-1.0 if s.is_hyperdense else 1.0 for s in styles], texture)
    if inputs.depth is not None:
        core = ((inputs.depth - RIM_ENDS) / (CORE_BEGINS - RIM_ENDS)).clamp(0, 1)
        rim = _column([-s.rim_contrast if s.rim_width_mm > 0 else 1.0 for s in styles], texture)
        texture = texture * (core * (1 - rim) + rim)
    return texture


def _in_box(inputs: _Inputs, row: int) -> None:
    """One patch, in place."""
    style = inputs.styles[row]
    (z0, y0, x0), (z1, y1, x1) = np.clip(inputs.box[row].numpy(), 0, inputs.mask.shape[1:]).tolist()
    place = (slice(z0, z1), slice(y0, y1), slice(x0, x1))
    texture: NDArray[np.float32] = inputs.texture[row].numpy()[place]
    inside: NDArray[np.bool_] = inputs.mask[row].numpy()[place].view(bool)
    if not inside.any():
        return
    if inputs.fields is not None and style.heterogeneity > 0:
        field = inputs.fields[row].numpy()[place]
        picked = field[inside].astype(np.float64)
        deviation = max(float(picked.std()), LEAST_DEVIATION)
        texture *= 1 + (field - np.float32(picked.mean())) * np.float32(style.heterogeneity / deviation)
    factor = -1.0 if style.is_hyperdense else 1.0
    if style.target_hu is not None:
        mean = float(np.mean(np.tanh(inputs.g[row].numpy()[place][inside]) * texture[inside], dtype=np.float64))
        least = LEAST_CHANGE_HU / inputs.width_hu
        factor *= style.target_hu / inputs.width_hu / (min(mean, -least) if mean < 0 else max(mean, least))
    if inputs.depth is not None and style.rim_width_mm > 0:
        core = np.clip(
            (inputs.depth[row].numpy()[place] - np.float32(RIM_ENDS)) / np.float32(CORE_BEGINS - RIM_ENDS), 0, 1
        )
        texture *= core * np.float32(factor * (1 + style.rim_contrast)) - np.float32(factor * style.rim_contrast)
    elif factor != 1:
        texture *= np.float32(factor)


def _as_column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return _as_column(upload(np.array(values, dtype=np.float32), like.device))
