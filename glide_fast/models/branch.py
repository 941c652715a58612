"""Branches of transformer blocks, whose linear layers take on the activation and the sum that follow them.

A hook that waits for a layer or a branch gets that one's own output, and a layer of another class is called
as it is: neither is fused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.layers import Linear, is_watched


class Projection(nn.Module):
    """A linear layer with the names ``w`` [out, in] and ``b``; weights follow the input's dtype.

    ``frozen_middle``: the middle third of the bias has no gradient. GLIDE's CLIP does so to the biases of
    queries and values, as if each were a joint bias of queries, keys and values; its training is reproduced
    with it.
    """

    def __init__(self, channels: int, out: int, *, bias: bool = True, frozen_middle: bool = False) -> None:
        super().__init__()
        self.frozen_middle = frozen_middle
        self.w = nn.Parameter(channels**-0.5 * torch.randn(out, channels))
        self.b = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(
        self,
        x: Tensor,  # [..., channels]
        *,
        activation: ops.LinearActivation = "none",
        residual: Tensor | None = None,  # [..., out]
    ) -> Tensor:  # [..., out]
        bias = None if self.b is None else self.b.to(x.dtype)
        if bias is not None and self.frozen_middle:
            before, middle, after = torch.chunk(bias, 3)
            bias = torch.cat([before, middle.detach(), after])
        return ops.linear(x, self.w.to(x.dtype), bias, activation=activation, residual=residual)


class Branch(nn.Module):
    """What is added to its block's input; handed that as ``residual``, it adds it in its last layer."""


class Block(nn.Module, ABC):
    """A transformer block, [B, T, C] -> [B, T, C], that can also answer for single tokens."""

    @abstractmethod
    def at(self, x: Tensor, places: Tensor) -> Tensor:
        """x [B, T, C], places int64 [B] -> the rows of self(x) at these places, [B, C]."""


def last_block_at(block: nn.Module, x: Tensor, places: Tensor, *, batch_first: bool = True) -> Tensor:
    """x [B, T, C], or [T, B, C], -> the rows of block(x) at int64 places [B], [B, C].

    A tower is asked for one token alone, so most of its last block's work can be left out, unless hooks or
    other modules in it wait for all tokens.
    """
    if isinstance(block, Block) and not any(is_watched(module) for module in block.modules()):
        return block.at(x if batch_first else x.transpose(0, 1), places)
    y = block(x)
    return rows_at(y if batch_first else y.transpose(0, 1), places)


def beside(x: Tensor, branch: nn.Module, inner: Tensor) -> Tensor:
    """x + branch(inner)."""
    fused = isinstance(branch, Branch) and not is_watched(branch)
    out: Tensor = branch(inner, residual=x) if fused else x + branch(inner)
    return out


def patch_tokens(image: Tensor, weight: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, patches, C]: the convolution by weight [C, 3, P, P] with stride P, as a product."""
    size = weight.shape[-1]
    down, across = (length // size for length in image.shape[2:])
    whole = image[..., : down * size, : across * size]
    split = whole.reshape(*image.shape[:2], down, size, across, size)
    return ops.linear(split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), weight)


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, T, ...], places int64 [B] -> each item's row at its place, [B, ...]."""
    return x[torch.arange(len(x), device=x.device), places]


def attention_at(
    query: Tensor,  # [B, N, D]
    key: Tensor,  # [B, T, N, D]
    value: Tensor,  # [B, T, N, D]
    places: Tensor,  # int64 [B]
    *,
    causal: bool,
) -> Tensor:
    """Self-attention of one token of each item, [B, N·D]; ``causal`` hides what is behind its place."""
    seen = None
    if causal:
        seen = torch.arange(key.shape[1], device=key.device) <= places[:, None]
        seen = seen[:, None, None]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=seen).flatten(1)


def through(
    layer: nn.Module,
    x: Tensor,  # [..., in]
    *,
    activation: ops.LinearActivation = "none",
    residual: Tensor | None = None,  # [..., out]
) -> Tensor:
    """activation(layer(x)) + residual, [..., out]."""
    if type(layer).forward in (Linear.forward, Projection.forward) and not is_watched(layer):
        fused: Tensor = layer(x, activation=activation, residual=residual)
        return fused
    y = _ACTIVATIONS[activation](layer(x))
    return y if residual is None else y + residual


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def _unchanged(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _unchanged,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}
