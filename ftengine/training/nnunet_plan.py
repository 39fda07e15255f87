"""How nnU-Net plans its network for a patch and a spacing (Isensee et al., Nature Methods 2021, "Architecture template" and supplement).

An axis is halved while at least 4 voxels stay; axes whose voxels are at least twice as long as the finest one's wait until the others have
caught up, and are convolved with kernels of 1 until then.
"""

from dataclasses import dataclass

from ftengine.geometry import FloatZYX, IntZYX, int_zyx

LEAST_EDGE = 4
MAX_WIDTH_FACTOR = 10  # 320 channels where the first level has 32


@dataclass(frozen=True)
class NetworkPlan:
    """Kernel and stride of each level's first convolution, from full resolution down."""

    kernels_zyx: tuple[IntZYX, ...]
    strides_zyx: tuple[IntZYX, ...]

    @property
    def divisor_zyx(self) -> IntZYX:
        """What a patch must be a multiple of."""
        result = [1, 1, 1]
        for stride in self.strides_zyx:
            result = [a * b for a, b in zip(result, stride, strict=True)]
        return int_zyx(result)

    def channels(self, width: int) -> tuple[int, ...]:
        """Channels of the levels: doubled from level to level, up to ten times the first."""
        return tuple(min(width * 2**level, width * MAX_WIDTH_FACTOR) for level in range(len(self.strides_zyx)))


def plan_network(patch_zyx: IntZYX, spacing_mm_zyx: FloatZYX) -> NetworkPlan:
    """The levels for a patch (voxels) at a spacing (mm)."""
    size, spacing = list(patch_zyx), list(spacing_mm_zyx)
    kernel = [1, 1, 1]
    kernels, strides = [], [int_zyx((1, 1, 1))]
    while axes := _axes_to_halve(size, spacing):
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing, strict=True)]
        kernels.append(int_zyx(kernel))
        strides.append(int_zyx([2 if axis in axes else 1 for axis in range(3)]))
        for axis in axes:
            spacing[axis] *= 2
            size[axis] = -(-size[axis] // 2)
    return NetworkPlan((*kernels, (3, 3, 3)), tuple(strides))


def _axes_to_halve(size: list[int], spacing: list[float]) -> list[int]:
    large = [axis for axis in range(3) if size[axis] >= 2 * LEAST_EDGE]
    finest = min((spacing[axis] for axis in large), default=0.0)
    axes = [axis for axis in large if spacing[axis] / finest < 2]
    return [] if len(axes) == 1 and size[axes[0]] < 3 * LEAST_EDGE else axes
