"""The layers every network of the family is made of: linear, convolution, norm, resampling, embedding.

Weights follow the activations' dtype at use: float32 parameters with bfloat16 activations is mixed precision
with float32 master weights, and no autocast is involved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from glide_fast import ops

Resample = Literal["none", "up", "down"]
Module = TypeVar("Module", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def timestep_embedding(timesteps: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of timesteps, cosines first: [B] -> [B, channels] float32 (Attention Is All You Need, 3.5).

    The frequency table is computed in float32 on the CPU, whatever the device: a last-bit difference in
    ``exp`` is multiplied by the timestep. Devices keep their copy, so that a step moves nothing to them.
    """
    table = _frequencies
    if timesteps.device.type != "cpu" and type(timesteps) is Tensor and not torch.compiler.is_compiling():
        table = _kept_frequencies
    angles = timesteps[:, None].float() * table(channels // 2, max_period, timesteps.device)[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, 1)) if channels % 2 else embedding


def _frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    exponents = torch.arange(half, dtype=torch.float32) / half
    return torch.exp(-math.log(max_period) * exponents).to(device)


@functools.cache
def _kept_frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # a copy made while sampling must remain usable in training
        return _frequencies(half, max_period, device)


class Linear(nn.Linear):
    """``nn.Linear`` whose weights follow the dtype of its input."""

    def forward(
        self,
        x: Tensor,  # [..., in]
        *,
        activation: ops.LinearActivation = "none",
        residual: Tensor | None = None,  # [..., out]
    ) -> Tensor:  # [..., out]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear(x, self.weight.to(x.dtype), bias, activation=activation, residual=residual)


class _FollowsInput(nn.modules.conv._ConvNd):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, in, *space] -> [B, out, *space]; ``residual``, of this size or half the sides, is added."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1):
            return ops.norm_convolution(x, self.weight.to(x.dtype), bias, residual=residual)
        h = self._conv_forward(x, self.weight.to(x.dtype), bias)
        return plus(h, residual)


class Conv1d(_FollowsInput, nn.Conv1d):
    """``nn.Conv1d`` whose weights follow the dtype of its input."""


class Conv2d(_FollowsInput, nn.Conv2d):
    """``nn.Conv2d`` whose weights follow the dtype of its input."""


class Conv3d(_FollowsInput, nn.Conv3d):
    """``nn.Conv3d`` whose weights follow the dtype of its input."""


CONVOLUTIONS: dict[int, type[Conv1d] | type[Conv2d] | type[Conv3d]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


class PointwiseConv(nn.Module):
    """A 1×1 convolution with upstream's 1-D weight [out, in, 1], applied to channels-last tokens."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, in] -> [B, T, out]
        return ops.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype), residual=residual)


class GroupNorm(nn.Module):
    """GroupNorm with float32 statistics, fused with what follows it: FiLM, SiLU, resampling."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        if channels % groups:
            lower = max(channels // groups, 1) * groups
            raise ValueError(
                f"channels {channels} are not divisible by the {groups} groups of GroupNorm; "
                f"use {lower} or {lower + groups}"
            )
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,  # [B, C, *space]
        *,
        scale: Tensor | None = None,  # [B, C]
        shift: Tensor | None = None,  # [B, C]
        activation: Literal["none", "silu"] = "none",
        resample: Resample = "none",
    ) -> Tensor:
        if resample != "none" and x.dim() == 5:  # a volume keeps its depth, which the op would resample
            y: Tensor = self(x, scale=scale, shift=shift, activation=activation)
            return resample_nearest(y, resample)
        return ops.group_norm(
            x,
            self.weight,
            self.bias,
            groups=self.groups,
            scale=scale,
            shift=shift,
            activation=activation,
            resample=resample,
        )


def plus(h: Tensor, residual: Tensor | None) -> Tensor:
    """Their sum; a residual of half the size is doubled."""
    if residual is None:
        return h
    return h + (residual if residual.shape[2:] == h.shape[2:] else resample_nearest(residual, "up"))


def resample_nearest(x: Tensor, resample: Resample) -> Tensor:
    """Double (nearest) or halve (average) the sides of [B, C, *space], not a volume's depth; or leave it."""
    if resample == "none":
        return x
    if resample == "up" and x.dim() == 4:
        return _doubled(x)
    factors = [1, 2, 2] if x.dim() == 5 else [2] * (x.dim() - 2)
    if resample == "up":
        return F.interpolate(x, scale_factor=[float(factor) for factor in factors], mode="nearest")
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    return pool(x, factors)  # type: ignore[no-any-return]


def is_watched(layer: nn.Module) -> bool:
    """Whether a hook waits for the layer's own call."""
    return any(getattr(layer, name) for name in HOOKS)


def is_plain(layer: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a call of the layer is this ``forward`` and nothing besides."""
    own = type(layer).forward is forward and "forward" not in vars(layer)
    compiled = layer._compiled_call_impl is not None
    seen = is_watched(layer) or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return own and not compiled and not seen


def _doubled(x: Tensor) -> Tensor:
    """[B, C, H, W] -> channels-last [B, C, 2H, 2W]: a copy of whole pixels, faster than interpolation."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    pixels = pixels.expand(batch, height, 2, width, 2, channels)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Nearest 2× upsampling, then a 3×3 convolution if ``learned``."""

    def __init__(self, channels: int, *, dims: int = 2, learned: bool) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1) if learned else None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 2H, 2W]
        x = resample_nearest(x, "up")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """A 3×3 convolution of stride 2 if ``learned``, else a 2×2 average."""

    def __init__(self, channels: int, *, dims: int = 2, learned: bool) -> None:
        super().__init__()
        stride: Any = (1, 2, 2) if dims == 3 else 2
        convolution = CONVOLUTIONS[dims]
        self.op = convolution(channels, channels, 3, stride=stride, padding=1) if learned else None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H/2, W/2]
        return resample_nearest(x, "down") if self.op is None else self.op(x)


def pixels_as_tokens(x: Tensor) -> Tensor:
    """[B, C, *space] -> [B, T, C], a view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def zeroed(module: Module) -> Module:
    """The module with every parameter set to zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
