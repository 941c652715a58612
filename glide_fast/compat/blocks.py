"""The blocks of a U-Net, to build others from, as guided- and improved-diffusion's ``unet`` offer them.

Residual blocks take the embedding before its SiLU, as the originals' do.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models import blocks, encoder, layers
from glide_fast.models.layers import CONVOLUTIONS

Dims = Literal[1, 2, 3]


class TimestepBlock(nn.Module):
    """A block that reads the timestep's embedding."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, *space], emb [B, E] -> the block's output."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in order; those that are a :class:`TimestepBlock` are given the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(layers.Upsample):
    """Nearest 2× upsampling, then a 3×3 convolution to ``out_channels`` if ``use_conv``."""

    def __init__(
        self, channels: int, use_conv: bool, dims: Dims = 2, out_channels: int | None = None
    ) -> None:
        super().__init__(channels, dims=dims, learned=use_conv)
        if use_conv and out_channels is not None:
            self.conv = CONVOLUTIONS[dims](channels, out_channels, 3, padding=1)


class Downsample(layers.Downsample):
    """A 3×3 convolution of stride 2 to ``out_channels`` if ``use_conv``, else a 2×2 average."""

    def __init__(
        self, channels: int, use_conv: bool, dims: Dims = 2, out_channels: int | None = None
    ) -> None:
        super().__init__(channels, dims=dims, learned=use_conv)
        if use_conv and out_channels is not None:
            stride = (1, 2, 2) if dims == 3 else 2
            self.op = CONVOLUTIONS[dims](channels, out_channels, 3, stride=stride, padding=1)  # type: ignore[arg-type]


class ResBlock(blocks.ResBlock, TimestepBlock):
    """Two GroupNorm-SiLU-convolution layers around the embedding; ``up`` or ``down`` resamples inside."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: Dims = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        out = out_channels or channels
        super().__init__(
            channels,
            out,
            emb_channels,
            dims=dims,
            dropout=dropout,
            scale_shift_norm=use_scale_shift_norm,
            resample="up" if up else "down" if down else "none",
        )
        if use_conv and out != channels:
            self.skip_connection = CONVOLUTIONS[dims](channels, out, 3, padding=1)
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out
        self.dropout, self.use_checkpoint = dropout, use_checkpoint

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, skip: Tensor | None = None
    ) -> Tensor:
        """x [B, C, *space], emb [B, E] -> [B, out_channels, *space']."""
        return super().forward(x, F.silu(emb), skip)


class AttentionBlock(blocks.AttentionBlock):
    """Self-attention over the pixels of a map [B, C, *space]."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        super().__init__(channels, heads, order="by_role" if use_new_attention_order else "by_head")
        self.channels, self.num_heads, self.use_checkpoint = channels, heads, use_checkpoint


class QKVAttention(nn.Module):
    """Attention on projections laid out by role: all queries, all keys, all values."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv [B, 3·N·D, T] -> [B, N·D, T]."""
        tokens = qkv.transpose(1, 2)
        query, key, value = torch.unflatten(tokens, 2, (3, self.n_heads, -1)).unbind(2)
        return ops.attention(query, key, value).flatten(2).transpose(1, 2)


class QKVAttentionLegacy(nn.Module):
    """Attention on projections laid out by head: query, key and value of the first head, then the next."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        """qkv [B, N·3·D, T] -> [B, N·D, T]; GLIDE's also reads a text's keys and values [B, N·2·D, S]."""
        query, key, value = self._split(qkv, 3)
        text_key, text_value = (None, None) if encoder_kv is None else self._split(encoder_kv, 2)
        attended = ops.attention(query, key, value, text_key=text_key, text_value=text_value)
        return attended.flatten(2).transpose(1, 2)

    def _split(self, projection: Tensor, parts: int) -> tuple[Tensor, ...]:
        return torch.unflatten(projection.transpose(1, 2), 2, (self.n_heads, parts, -1)).unbind(3)


class AttentionPool2d(encoder.AttentionPool):
    """The mean pixel asks, all pixels answer: [B, embed_dim, spacial_dim, spacial_dim] -> [B, output_dim]."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        heads = embed_dim // num_heads_channels
        super().__init__(spacial_dim**2, embed_dim, heads, output_dim or embed_dim)
