"""The pieces every U-Net of the family is made of: residual block, attention block, resampling, embeddings.

Submodules that upstream numbers (``in_layers.0``, ``emb_layers.1`` …) keep those numbers as names, so that
published checkpoints load without renaming. Weights follow the activations' dtype at use: float32 parameters
with bfloat16 activations is mixed precision with float32 master weights, and no autocast is involved.

Sources: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672), ADM (2105.05233), GLIDE (2112.10741).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from glide_fast import ops
from glide_fast.ops import packed

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
        return _plus(h, residual)


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


def is_fused(norm: Any, convolution: nn.Module, x: Tensor, resample: Resample) -> bool:
    """Whether a norm and a convolution are one operation: ours, unwatched, not resampling a volume."""
    volume = resample != "none" and x.dim() == 5  # keeps its depth, which the op would resample
    ours = type(convolution) in CONVOLUTIONS.values()
    return ours and not volume and not is_watched(norm) and not is_watched(convolution)


def activated_convolution(
    norm: Any,
    convolution: nn.Module,
    x: Tensor,  # [B, C, *space]
    *,
    skip: Tensor | None = None,  # [B, S, *space]
    shift: Tensor | None = None,  # [B, out]
    film: tuple[Tensor, Tensor] | None = None,  # [B, C + S] each
    resample: Resample = "none",
    residual: Tensor | None = None,  # [B, out, *resampled space], or half as large along each side
) -> Tensor:
    """GroupNorm of x and ``skip``, FiLM, SiLU, resampling, convolution; ``shift`` and ``residual`` are added.

    One operation, unless the convolution was replaced or a hook watches a layer: then both layers are called.
    """
    scale, offset = (None, None) if film is None else film
    if not is_fused(norm, convolution, x, resample):
        joined = x if skip is None else torch.cat([x, skip], dim=1)
        h: Tensor = convolution(norm(joined, scale=scale, shift=offset, activation="silu", resample=resample))
        h = h if shift is None else h + shift.view(*shift.shape, *[1] * (h.dim() - 2))
        return _plus(h, residual)
    own: Any = convolution
    bias = own.bias.to(x.dtype)
    return ops.norm_convolution(
        x,
        own.weight.to(x.dtype),
        bias if shift is None else bias + shift,
        skip=skip,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        groups=norm.groups,
        scale=scale,
        shift=offset,
        resample=resample,
        residual=residual,
    )


def _activated_convolution_beside(
    norm: Any, convolution: Any, x: Tensor, shift: Tensor | None, resample: Resample
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`activated_convolution`, and x for two other paths, whose gradients join the norm's of x."""
    if not is_fused(norm, convolution, x, resample):
        return activated_convolution(norm, convolution, x, shift=shift, resample=resample), x, x
    bias = convolution.bias.to(x.dtype)
    return ops.norm_convolution_beside(
        x,
        convolution.weight.to(x.dtype),
        bias if shift is None else bias + shift,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        groups=norm.groups,
        resample=resample,
    )


def _dropped(norm: Any, dropout: Any, x: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
    """Dropout of the activated norm: one operation, unless a layer was replaced or is watched."""
    scale, shift = (None, None) if film is None else film
    plain = type(norm) is GroupNorm and type(dropout) is nn.Dropout
    if not plain or not dropout.training or dropout.inplace or is_watched(norm) or is_watched(dropout):
        y: Tensor = dropout(norm(x, scale=scale, shift=shift, activation="silu"))
        return y
    return ops.dropped_group_norm(
        x, norm.weight, norm.bias, groups=norm.groups, scale=scale, shift=shift, dropout=dropout.p
    )


def _convolution_beside(residual: Tensor | None, convolution: nn.Module, x: Tensor) -> Tensor:
    """convolution(x) + residual, by one operation unless the convolution was replaced or is watched."""
    if type(convolution) in CONVOLUTIONS.values() and not is_watched(convolution):
        return convolution(x, residual)  # type: ignore[no-any-return]
    h: Tensor = convolution(x)
    return _plus(h, residual)


def _plus(h: Tensor, residual: Tensor | None) -> Tensor:
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


class ResBlock(nn.Module):
    """Two GroupNorm-SiLU-convolution layers around the timestep, with a residual path (ADM, section 3).

    The embedding enters between them: as FiLM scale and shift of the second norm (``scale_shift_norm``) or
    added.
    ``resample`` moves the up- or downsampling of a level into the block.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dims: int = 2,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        norm_groups: int = 32,
        resample: Resample = "none",
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample: Resample = resample
        convolution = CONVOLUTIONS[dims]
        self.in_layers = nn.ModuleDict(
            {"0": GroupNorm(channels, norm_groups), "2": convolution(channels, out_channels, 3, padding=1)}
        )
        modulation = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.ModuleDict({"1": Linear(embedding_channels, modulation)})
        self.out_layers = nn.ModuleDict(
            {
                "0": GroupNorm(out_channels, norm_groups),
                "2": nn.Dropout(dropout),
                "3": zeroed(convolution(out_channels, out_channels, 3, padding=1)),
            }
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else convolution(channels, out_channels, 1)
        )

    @property
    def modulation_widths(self) -> list[int]:
        """The channels of what the embedding is projected to: of scale and shift, or of what is added."""
        projection, parts = self.emb_layers["1"].out_features, 2 if self.scale_shift_norm else 1
        return [int(projection) // parts] * parts  # type: ignore[arg-type]  # a Linear's

    def forward(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]], skip: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], embedding [B or 1, E] with its SiLU already applied -> [B, out, H', W'].

        The embedding may come as what each block makes of it, this one's scale and shift [B or 1, out], or
        only what is added, among them.
        ``skip`` [B, S, H, W] are the last S of the block's channels, where they come apart from x.
        """
        if skip is not None and torch.is_grad_enabled():  # both paths keep the same map for the backward pass
            x, skip = torch.cat([x, skip], dim=1), None
        return self._paths(x, embedding, skip)[0]

    def with_input(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The block's output, and x for another reader.

        In training the gradient of what that reader makes of it joins the block's own of x, which saves
        autograd a sum of two maps.
        """
        return self._paths(x, embedding, None)

    def _paths(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]], skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(embedding, Mapping):
            parts = embedding[self]
        else:
            projection = self.emb_layers["1"](embedding).to(x.dtype)
            parts = torch.split(projection, self.modulation_widths, dim=1)
        modulation = [each.to(x.dtype).expand(len(x), -1) for each in parts]
        film = (modulation[0], modulation[1]) if self.scale_shift_norm else None
        norm, convolution = self.in_layers.values()
        shift = modulation[0] if film is None else None
        same = x
        if skip is None:
            h, x, same = _activated_convolution_beside(norm, convolution, x, shift, self.resample)
        else:
            h = activated_convolution(norm, convolution, x, skip=skip, shift=shift, resample=self.resample)
        norm, dropout, convolution = self.out_layers.values()
        residual = None if self._projects else self._residual(x, skip)
        if dropout.p and self.training:
            h = _convolution_beside(residual, convolution, _dropped(norm, dropout, h, film))
        else:
            h = activated_convolution(norm, convolution, h, film=film, residual=residual)
        y = self._residual(x, skip, summand=h) if self._projects else h
        return y, same

    @property
    def _projects(self) -> bool:
        """Whether the other path ends in a 1x1 convolution, which adds this path's map as it writes."""
        return _is_pointwise(self.skip_connection) and self.resample != "up"

    def _residual(self, x: Tensor, skip: Tensor | None, summand: Tensor | None = None) -> Tensor:
        """The other path. A map that is to be doubled stays small; a pixel's copies are what is added.

        ``summand`` [B, out, H', W'] is what a 1x1 convolution adds to its output.
        """
        layer: Any = self.skip_connection
        if self.resample != "up" or x.dim() == 5:
            x = resample_nearest(x, self.resample)
        if _is_pointwise(layer):
            tokens = pixels_as_tokens(x)
            second = None if skip is None else pixels_as_tokens(skip)
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            residual = None if summand is None else pixels_as_tokens(summand)
            y = ops.linear(tokens, layer.weight.to(x.dtype), bias, second=second, residual=residual)
            return torch.unflatten(y.transpose(1, 2), 2, x.shape[2:])
        return layer(x if skip is None else torch.cat([x, skip], dim=1))  # type: ignore[no-any-return]


def _is_pointwise(layer: nn.Module) -> bool:
    return type(layer) is Conv2d and layer.kernel_size == (1, 1)


def pixels_as_tokens(x: Tensor) -> Tensor:
    """[B, C, *space] -> [B, T, C], a view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a map, which attend to the text as well where there is one."""

    def __init__(
        self,
        channels: int,
        heads: int,
        text_channels: int | None = None,
        *,
        order: ops.AttentionOrder = "by_head",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"channels {channels} are not divisible by {heads} heads; use a divisor of {channels}"
            )
        self.heads = heads
        self.order = order
        self.norm = GroupNorm(channels, norm_groups)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.encoder_kv = None if text_channels is None else PointwiseConv(text_channels, 2 * channels)
        self.proj_out = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: Tensor, text: Tensor | Mapping[nn.Module, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W], text [B, S, text_channels] -> [B, C, H, W].

        The text may come as what each block projects it to, this block's [B, S, 2·C] among them.
        """
        normal, x = self._normalised(x)
        tokens = pixels_as_tokens(normal)
        read = None
        if self.encoder_kv is not None and text is not None:
            read = self._projected(self.encoder_kv, text)
        attended = ops.projected_attention(self.qkv(tokens), self.heads, text=read, order=self.order)
        y: Tensor = self.proj_out(attended.flatten(2), residual=pixels_as_tokens(x))
        return y.transpose(1, 2).view_as(x)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x for the path beside attention."""
        norm = self.norm
        if type(norm) is not GroupNorm or is_watched(norm):
            return norm(x), x
        return ops.group_norm_beside(x, norm.weight, norm.bias, groups=norm.groups)

    def _projected(self, layer: PointwiseConv, text: Tensor | Mapping[nn.Module, Tensor]) -> Tensor:
        if isinstance(text, Mapping):
            return text[self]
        return packed.projected(layer.weight, text, functools.partial(layer, text))


def zeroed(module: Module) -> Module:
    """The module with every parameter set to zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
