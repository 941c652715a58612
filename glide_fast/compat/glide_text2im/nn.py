"""Small functions and layers; what glide-text2im's module of this name offers. Its norm has an activation."""

from __future__ import annotations

from torch import Tensor, nn

from glide_fast import ops
from glide_fast.compat.layers import (
    avg_pool_nd,
    conv_nd,
    linear,
    scale_module,
    timestep_embedding,
    zero_module,
)

__all__ = [
    "GroupNorm32",
    "avg_pool_nd",
    "conv_nd",
    "linear",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with float32 statistics, then y · sigmoid(swish · y); 0 leaves y as it is."""

    def __init__(self, num_groups: int, num_channels: int, swish: float, eps: float = 1e-5) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.swish = swish

    def forward(self, x: Tensor) -> Tensor:  # [B, C, *space]
        factor = self.swish or 1.0  # y · sigmoid(s y) is silu(s y) / s
        y = ops.group_norm(
            x,
            self.weight * factor,
            self.bias * factor,
            groups=self.num_groups,
            eps=self.eps,
            activation="silu" if self.swish else "none",
        )
        return y if factor == 1 else y / factor


def normalization(channels: int, swish: float = 0.0) -> nn.Module:
    """The family's norm: 32 groups, and its activation."""
    return GroupNorm32(32, channels, swish)
