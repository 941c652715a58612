"""Layer norms of transformer blocks, which may hand on what they read to the path beside them.

A hook that waits for a norm sees its own call, and a norm of another class is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.layers import is_watched


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in the dtype of its parameters (float32) and answers in that of its input."""

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Norm(nn.Module):
    """LayerNorm with the names ``g`` and ``b``, computed in their dtype (float32)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return ops.layer_norm(x, self.g, self.b)


def normed(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x), and x for the path beside it, whose gradient the norm's backward pass then adds to its own."""
    forward = getattr(norm.forward, "__func__", None)
    if forward is LayerNorm.forward and not is_watched(norm):
        return ops.layer_norm_beside(x, norm.weight, norm.bias, eps=norm.eps)  # type: ignore[arg-type]
    if forward is Norm.forward and not is_watched(norm):
        return ops.layer_norm_beside(x, norm.g, norm.b)  # type: ignore[arg-type]
    return norm(x), x
