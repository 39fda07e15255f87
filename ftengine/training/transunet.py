"""A three-dimensional TransUNet, written from the published description.

Sources: Chen et al., TransUNet (arXiv 2102.04306, section 3: CNN-Transformer hybrid encoder, cascaded upsampler) and its extension to
volumes (Chen et al., Medical Image Analysis 2024, whose CNN starts at full resolution). Norms are instance norms instead of the group and
batch norms of the two papers, so that a batch gives what its members give.
"""

import torch
import torch.nn.functional as nnf
from torch import nn

from ftengine.geometry import IntZYX

STRIDE = 16  # voxels of a token's edge: four halvings, as ViT-B/16
NUM_HEADS = 12
_LEVELS = (1, 2, 4, 8, 16)  # channels of the CNN's levels, times the width; the last is what the tokens are made of


class TransUNet(nn.Module):
    """A CNN halves the volume four times, a vision transformer looks at its deepest feature map, a decoder with skips brings it back."""

    def __init__(
        self, *, out_channels: int, patch_zyx: IntZYX, width: int = 32, token_size: int = 768, num_layers: int = 12
    ) -> None:
        """patch_zyx: what it is trained on, multiples of 16; other sizes take position embeddings that are interpolated."""
        super().__init__()
        channels = [width * factor for factor in _LEVELS]
        self.encoder = nn.ModuleList(
            [
                _residual_block(a, b, stride=s)
                for a, b, s in zip((1, *channels), channels, (1, 2, 2, 2, 2), strict=False)
            ]
        )
        self.tokens = nn.Conv3d(channels[-1], token_size, kernel_size=1)  # patch embedding of one voxel of the map
        grid = [n // STRIDE for n in patch_zyx]
        self.position = nn.Parameter(torch.empty(1, token_size, *grid))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.transformer = nn.ModuleList([_TransformerLayer(token_size) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(token_size)
        self.bottom = _conv_norm(token_size, channels[-1])
        self.decoder = nn.ModuleList(
            [
                nn.Sequential(_conv_norm(below + skip, skip), _conv_norm(skip, skip))
                for below, skip in zip(channels[:0:-1], channels[-2::-1], strict=True)
            ]
        )
        self.head = nn.Conv3d(channels[0], out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, z, y, x] of multiples of 16 -> logits [B, out_channels, z, y, x]."""
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        x = self.bottom(self._transformed(skips.pop()))
        for block in self.decoder:
            skip = skips.pop()
            x = block(torch.cat([nnf.interpolate(x, skip.shape[2:], mode="trilinear"), skip], dim=1))
        logits: torch.Tensor = self.head(x)
        return logits

    def _transformed(self, features: torch.Tensor) -> torch.Tensor:
        """[B, C, z, y, x] -> [B, token size, z, y, x]."""
        maps = self.tokens(features)
        position: torch.Tensor = self.position
        if position.shape[2:] != maps.shape[2:]:
            position = nnf.interpolate(position, maps.shape[2:], mode="trilinear")
        tokens = (maps + position).flatten(2).transpose(1, 2)
        for layer in self.transformer:
            tokens = layer(tokens)
        return self.norm(tokens).transpose(1, 2).reshape(maps.shape)


class _TransformerLayer(nn.Module):
    """Self-attention, then an MLP of four times the width, each behind a layer norm and beside a shortcut (ViT)."""

    def __init__(self, token_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(token_size), nn.LayerNorm(token_size)
        self.qkv = nn.Linear(token_size, 3 * token_size)
        self.projection = nn.Linear(token_size, token_size)
        self.mlp = nn.Sequential(
            nn.Linear(token_size, 4 * token_size), nn.GELU(), nn.Linear(4 * token_size, token_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, tokens, size] -> the same shape."""
        batch, num_tokens, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, num_tokens, 3, NUM_HEADS, size // NUM_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = nnf.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(seen.transpose(1, 2).reshape(x.shape))
        result: torch.Tensor = x + self.mlp(self.norm2(x))
        return result


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nnf.relu(self.body(x) + self.shortcut(x))


def _residual_block(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    body = nn.Sequential(
        _conv_norm(in_channels, out_channels, stride=stride),
        nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm3d(out_channels, affine=True),
    )
    shortcut = nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.InstanceNorm3d(out_channels, affine=True),
    )
    return _Residual(body, shortcut)


def _conv_norm(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.InstanceNorm3d(out_channels, affine=True),
        nn.ReLU(inplace=True),
    )
