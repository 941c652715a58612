"""Layers as the original code computes them: one step of arithmetic a call, [B, C, H, W] in memory.

Nothing is fused: normalisation, FiLM, SiLU and resampling each read and write the whole map, attention is
two einsums around a softmax of the full matrix, and norms and softmax convert to float32 and back. Names of
parameters are upstream's, so that a state dict of ours fits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glide_fast.models.layers import Resample
from glide_fast.models.trunk import UNetConfig
from glide_fast.ops import AttentionOrder


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GroupNorm32(nn.GroupNorm):
    """GroupNorm by way of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).to(x.dtype)


def resampled(x: Tensor, resample: Resample) -> Tensor:
    """[B, C, H, W] with its sides doubled, halved or left."""
    if resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if resample == "down" else x


class PlainUpsample(nn.Module):
    """Nearest 2x, and a convolution where it is learned."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(resampled(x, "up"))  # type: ignore[no-any-return]


class PlainDownsample(nn.Module):
    """A strided convolution where it is learned, else a mean of four."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class PlainResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the timestep enters between, with a SiLU of its own in every block."""

    def __init__(self, channels: int, out: int, config: UNetConfig, resample: Resample = "none") -> None:
        super().__init__()
        self.film, self.resample = config.scale_shift_norm, resample
        groups = config.norm_groups
        self.in_layers = nn.Sequential(
            GroupNorm32(groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        modulation = 2 * out if self.film else out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.channels, modulation))
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, out), nn.SiLU(), nn.Dropout(config.dropout), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, silu, convolution = self.in_layers
        h = silu(norm(x))
        h, x = resampled(h, self.resample), resampled(x, self.resample)
        h = convolution(h)
        modulation = self.emb_layers(embedding)[:, :, None, None]
        norm, silu, dropout, convolution = self.out_layers
        if self.film:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        h = convolution(dropout(silu(h)))
        return self.skip_connection(x) + h  # type: ignore[no-any-return]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B·N, D, T], [B·N, D, S], [B·N, D, S] -> [B·N, D, T]; ``scale`` goes on queries and keys each."""
    scores = torch.einsum("bct,bcs->bts", query * scale, key * scale)
    weights = wide(scores).softmax(dim=-1).to(scores.dtype)
    attended: Tensor = torch.einsum("bts,bcs->bct", weights, value)
    return attended


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by scaled_dot_product_attention, which chooses among its back ends as it is told."""
    query, key, value = (each.transpose(1, 2)[:, None].contiguous() for each in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=scale**2)
    return attended[:, 0].transpose(1, 2)


class PlainAttention(nn.Module):
    """Pixels attend to the text, concatenated in front, and to each other.

    ``recompute``: as guided-diffusion always does, activations are computed again in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        text_channels: int | None,
        order: AttentionOrder,
        norm_groups: int,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.heads, self.order, self.recompute = heads, order, recompute
        self.attend = softmax_attention
        self.norm = GroupNorm32(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        if text_channels is not None:
            self.encoder_kv = nn.Conv1d(text_channels, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """x [B, C, H, W], text [B, W, S] -> [B, C, H, W]."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, x, text, use_reentrant=True)  # type: ignore[no-any-return]
        return self._attend(x, text)

    def _attend(self, x: Tensor, text: Tensor | None) -> Tensor:
        batch, channels, *space = x.shape
        x = x.reshape(batch, channels, -1)
        query, key, value = self._heads(self.qkv(self.norm(x)), 3)
        if text is not None:
            text_key, text_value = self._heads(self.encoder_kv(text), 2)
            key, value = torch.cat([text_key, key], dim=-1), torch.cat([text_value, value], dim=-1)
        attended = self.attend(query, key, value, (channels // self.heads) ** -0.25)
        h: Tensor = self.proj_out(attended.reshape(batch, channels, -1))
        return (x + h).reshape(batch, channels, *space)

    def _heads(self, projection: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, parts·C, T] -> ``parts`` of [B·N, D, T]."""
        rows = len(projection) * self.heads
        width = projection.shape[1] // (parts * self.heads)
        if self.order == "by_head":
            return torch.split(projection.reshape(rows, parts * width, -1), width, dim=1)
        return tuple(part.reshape(rows, width, -1) for part in projection.chunk(parts, dim=1))


def sinusoids(timesteps: Tensor, channels: int) -> Tensor:
    """The timestep embedding [B, channels], float32 (channels even, as in every published model)."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10_000) * steps / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
