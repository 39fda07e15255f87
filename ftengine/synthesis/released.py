"""The released code's texture and blend, for users of the released weights; every difference to the paper is in reference 1.6."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as nnf

from ftengine.errors import KernelInputError
from ftengine.geometry import IntZYX
from ftengine.kernels.texture_field import FIELD_SHAPE_ZYX, texture_field

ABDOMEN_SIGMAS = ((3.0, 4.0),)
CHEST_SIGMAS = tuple((a, b) for a in (3.0, 6.0, 9.0, 12.0, 15.0) for b in (4.0, 7.0))

TextureDraw = tuple[float, float, float, float]  # uniform in [0, 1): which field, and its crop's corner z, y, x


@dataclass(frozen=True)
class _Made:
    """A kept field, and on CUDA the event behind it: other streams wait for that."""

    field: torch.Tensor
    done: torch.cuda.Event | None


@dataclass
class TextureFields:
    """The region's texture fields, each made on the device when it is first used there, once for all threads, and kept.

    A field of the released shape takes 161 MB; the abdomen has one, the chest ten. Crops are for eager code: their
    corners are host numbers, which torch.compile and CUDA graphs would freeze.
    """

    seed: int
    sigmas: tuple[tuple[float, float], ...]
    shape_zyx: IntZYX = FIELD_SHAPE_ZYX
    _made: dict[tuple[object, ...], _Made] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def crop(self, draw: TextureDraw, patch_zyx: IntZYX, device: torch.device | str = "cpu") -> torch.Tensor:
        """A random crop, float32 [z, y, x]: a view of the field; a patch larger than the field makes the field larger."""
        number = int(draw[0] * len(self.sigmas))
        whole = self._field(number, patch_zyx, torch.device(device))
        z, y, x = (int(d * (n - p + 1)) for d, n, p in zip(draw[1:], whole.shape, patch_zyx, strict=True))
        return whole[z : z + patch_zyx[0], y : y + patch_zyx[1], x : x + patch_zyx[2]]

    def crops(
        self, draws: Sequence[TextureDraw], patch_zyx: IntZYX, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A crop for each draw, float32 [B, z, y, x] on ``device``, new memory; nothing goes by way of the host."""
        if not draws:
            return torch.empty((0, *patch_zyx), device=device)
        return torch.stack([self.crop(draw, patch_zyx, device) for draw in draws])

    def _field(self, number: int, patch_zyx: IntZYX, device: torch.device) -> torch.Tensor:
        shape = tuple(max(n, p) for n, p in zip(self.shape_zyx, patch_zyx, strict=True))
        if str(device) == "cuda":  # the one of the moment
            device = torch.device("cuda", torch.cuda.current_device())
        key = (self.seed, number, self.sigmas[number], shape, device)
        with self._lock:
            made = self._made.get(key)
            if made is None:
                made = self._made[key] = self._make(number, shape, device)
        if made.done is not None:
            stream = torch.cuda.current_stream(device)
            if not torch.cuda.is_current_stream_capturing():  # a capture may not wait for what lies outside of it
                made.done.wait(stream)
            made.field.record_stream(stream)
        return made.field

    def _make(self, number: int, shape_zyx: tuple[int, ...], device: torch.device) -> _Made:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise KernelInputError(
                f"texture field {number} is asked for the first time while a CUDA graph is captured; want it made before, "
                "since it is kept. Run the function once, and wait for it, before the capture."
            )
        with torch.inference_mode(mode=False):  # it outlives the mode of whoever asks first
            whole = texture_field(self.seed, number, *self.sigmas[number], shape_zyx, device=device)
        if device.type != "cuda":
            return _Made(whole, None)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        return _Made(whole, done)


def released_blend(
    x: torch.Tensor,
    difference: torch.Tensor,
    organ: torch.Tensor,
    texture: torch.Tensor,
    soft_mask: torch.Tensor,
    *,
    sign: float,
) -> torch.Tensor:
    """``x + sign * soft_mask * blur(difference * organ) * texture`` inside the organ, ``x`` elsewhere; differentiable in difference.

    All float32 [B, z, y, x]; difference is the activated output of G (tanh in the abdomen, sigmoid in the chest). blur is the 7^3
    Gaussian of standard deviation 1, zero outside the patch. sign is -1 in the abdomen, +1 in the chest. Source: reference 1.6.
    """
    smooth = _blur7(difference * organ)
    return torch.where(organ > 0, x + sign * soft_mask * smooth * texture, x)


def _blur7(x: torch.Tensor) -> torch.Tensor:
    taps = torch.exp(-0.5 * torch.arange(-3, 4, dtype=torch.float64) ** 2)
    taps = (taps / taps.sum()).to(x)
    blurred = x.unsqueeze(1)
    for axis in range(3):
        shape, padding = [1, 1, 1], [0, 0, 0]
        shape[axis], padding[axis] = 7, 3
        blurred = nnf.conv3d(blurred, taps.view(1, 1, *shape), padding=padding)
    return blurred.squeeze(1)
