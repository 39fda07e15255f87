"""The diverse variant: what makes painted tumours differ from one another beyond G (docs/synthesisers.md).

Eq. 1 subtracts ``tanh(G(x)) g(x)`` inside M. Here that change is multiplied, in this order, by a noise field of mean 1 inside M
(heterogeneity), by a number that gives it the drawn mean (target contrast), by -1 (hyperdense), and by 1 in the core and minus the rim's
contrast in the rim.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ftengine.geometry import FloatZYX, mm_to_vox
from ftengine.kernels import gaussian_blur, upload
from ftengine.synthesis.rows import mean_inside
from ftengine.synthesis.shape import Style

LEAST_CHANGE_HU = 5.0  # a target is reached where G's own mean change is at least this: noise is not blown up
# The mask blurred with the rim's width w is normal_cdf(depth / w) below a flat border: the core begins to fade in at a depth of 0.75 w
RIM_ENDS, CORE_BEGINS = 0.7733726, 0.8943502  # normal_cdf(0.75), normal_cdf(1.25)


def restyle(
    texture: torch.Tensor,
    g: torch.Tensor,
    mask: torch.Tensor,
    box: torch.Tensor,
    styles: Sequence[Style],
    *,
    fields: torch.Tensor | None,
    width_hu: float,
    spacing_mm_zyx: FloatZYX,
) -> torch.Tensor:
    """The texture of Eq. 1 that paints as the styles say: a new tensor [R, z, y, x], or the given one where no style does anything.

    texture, g: float32 [R, z, y, x], g(x) and G(x) before tanh; mask: uint8 [R, z, y, x], hard; box: int64 [R, 2, 3], all that is painted,
    soft edges too; fields: float32 [R, z, y, x], noise, where a style is heterogeneous; width_hu: of the window. Differentiable in g.
    """
    if fields is not None:
        texture = texture * _heterogeneity(fields, mask, box, [s.heterogeneity for s in styles])
    targets = [s.target_hu for s in styles]
    if any(t is not None for t in targets):
        texture = texture * _to_target(texture, g, mask, box, targets, width_hu)
    if any(s.is_hyperdense for s in styles):
        texture = texture * _column([-1.0 if s.is_hyperdense else 1.0 for s in styles], texture)
    if any(s.rim_width_mm > 0 for s in styles):
        texture = texture * rim_weights(mask, box, styles, spacing_mm_zyx)
    return texture


def _heterogeneity(
    fields: torch.Tensor, mask: torch.Tensor, box: torch.Tensor, strengths: Sequence[float]
) -> torch.Tensor:
    """``1 + h (field / mean of the field inside M - 1)``."""
    strength = _column(strengths, fields)
    mean = (
        mean_inside(fields, mask, box).clamp(min=1e-3).view(-1, 1, 1, 1)
    )  # fields lie in [0, 1]; an empty M has the mean 0
    return 1 + strength * (fields / mean - 1)


def _to_target(
    texture: torch.Tensor,
    g: torch.Tensor,
    mask: torch.Tensor,
    box: torch.Tensor,
    targets: Sequence[float | None],
    width_hu: float,
) -> torch.Tensor:
    """The factor that gives ``tanh(g) texture`` the mean ``target`` inside M; 1 for a patch without a target."""
    mean = mean_inside(texture, mask, box, tanh_of=g)
    least = LEAST_CHANGE_HU / width_hu
    reached = torch.where(mean < 0, mean.clamp(max=-least), mean.clamp(min=least))
    wanted = upload(np.array([0.0 if t is None else t / width_hu for t in targets], dtype=np.float32), texture.device)
    has_target = upload(np.array([t is not None for t in targets]), texture.device)
    return torch.where(has_target, wanted / reached, torch.ones_like(mean)).view(-1, 1, 1, 1)


def rim_weights(
    mask: torch.Tensor, box: torch.Tensor, styles: Sequence[Style], spacing_mm_zyx: FloatZYX
) -> torch.Tensor:
    """1 in the core and minus the rim's contrast in the rim; 1 everywhere for a patch without a rim. float32 [R, z, y, x]."""
    sigmas = [mm_to_vox(s.rim_width_mm, spacing_mm_zyx) for s in styles]
    depth = gaussian_blur(mask, sigmas, box=box)
    core = ((depth - RIM_ENDS) / (CORE_BEGINS - RIM_ENDS)).clamp_(0, 1)
    rim = _column([-s.rim_contrast if s.rim_width_mm > 0 else 1.0 for s in styles], core)
    return core * (1 - rim) + rim


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return upload(np.array(values, dtype=np.float32), like.device).view(-1, 1, 1, 1)
