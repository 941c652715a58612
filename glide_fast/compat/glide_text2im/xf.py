"""The text transformer's layers; what glide-text2im's module of this name offers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glide_fast.models import transformer
from glide_fast.models.layer_norm import LayerNorm
from glide_fast.models.transformer import Perceptron as MLP  # noqa: N814
from glide_fast.models.transformer import self_attention

__all__ = [
    "MLP",
    "LayerNorm",
    "MultiheadAttention",
    "QKVMultiheadAttention",
    "ResidualAttentionBlock",
    "Transformer",
    "convert_module_to_f16",
]


def convert_module_to_f16(layer: nn.Module) -> None:
    """Make the weights of a linear layer or a 2-D convolution float16; other layers stay."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        layer.to(torch.float16)


class QKVMultiheadAttention(nn.Module):
    """Self-attention on projections that are interleaved a head."""

    def __init__(self, n_heads: int, n_ctx: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.n_ctx = n_ctx

    def forward(self, qkv: Tensor) -> Tensor:  # [B, T, N·3·D] -> [B, T, N·D]
        query, key, value = torch.unflatten(qkv, 2, (self.n_heads, 3, -1)).unbind(3)
        return self_attention(query, key, value)


class MultiheadAttention(transformer.SelfAttention):
    """Projection, self-attention over ``n_ctx`` tokens, projection."""

    def __init__(self, n_ctx: int, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.n_ctx, self.width = n_ctx, width


class ResidualAttentionBlock(transformer.TransformerBlock):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, n_ctx: int, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.n_ctx = n_ctx


class Transformer(transformer.Transformer):
    """``layers`` blocks over ``n_ctx`` tokens: [B, n_ctx, width] -> the same."""

    def __init__(self, n_ctx: int, width: int, layers: int, heads: int) -> None:
        super().__init__(width, layers, heads)
        self.n_ctx, self.width, self.layers = n_ctx, width, layers
