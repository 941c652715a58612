"""Layers that follow each other as one operation, where they are ours and nobody watches them.

A layer that was replaced, or that a hook waits for, is called by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.layers import CONVOLUTIONS, GroupNorm, Resample, is_watched, plus
from glide_fast.ops import sources
from glide_fast.ops.norm_convolution import widens


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """GroupNorm of x and ``skip``, FiLM, SiLU, resampling, convolution; ``shift`` and ``residual`` are added.

    One operation, unless the convolution was replaced or a hook watches a layer: then both layers are called.
    With ``dtype`` as of x.to(dtype), of which no map is made where the operation reads x as it is.
    """
    dtype = dtype or x.dtype
    scale, offset = (None, None) if film is None else film
    fused = is_fused(norm, convolution, x, resample)
    if not (fused and widens(x.dtype, dtype)):
        x = x.to(dtype)
    if not fused:
        joined = sources.joined(x, skip, 1)
        h: Tensor = convolution(norm(joined, scale=scale, shift=offset, activation="silu", resample=resample))
        h = h if shift is None else h + shift.view(*shift.shape, *[1] * (h.dim() - 2))
        return plus(h, residual)
    own: Any = convolution
    bias = own.bias.to(dtype)
    return ops.norm_convolution(
        x,
        own.weight.to(dtype),
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


def activated_convolution_beside(
    norm: Any, convolution: Any, x: Tensor, skip: Tensor | None, shift: Tensor | None, resample: Resample
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`activated_convolution`, and x for two other paths, or x and ``skip`` for one.

    Their gradients join the norm's of x and skip.
    """
    if not is_fused(norm, convolution, x, resample):
        y = activated_convolution(norm, convolution, x, skip=skip, shift=shift, resample=resample)
        return y, x, x if skip is None else skip
    bias = convolution.bias.to(x.dtype)
    return ops.norm_convolution_beside(
        x,
        convolution.weight.to(x.dtype),
        bias if shift is None else bias + shift,
        skip=skip,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        groups=norm.groups,
        resample=resample,
    )


def dropped(norm: Any, dropout: Any, x: Tensor, film: tuple[Tensor, Tensor] | None) -> Tensor:
    """Dropout of the activated norm: one operation, unless a layer was replaced or is watched."""
    scale, shift = (None, None) if film is None else film
    plain = type(norm) is GroupNorm and type(dropout) is nn.Dropout
    if not plain or not dropout.training or dropout.inplace or is_watched(norm) or is_watched(dropout):
        y: Tensor = dropout(norm(x, scale=scale, shift=shift, activation="silu"))
        return y
    return ops.dropped_group_norm(
        x, norm.weight, norm.bias, groups=norm.groups, scale=scale, shift=shift, dropout=dropout.p
    )


def convolution_beside(residual: Tensor | None, convolution: nn.Module, x: Tensor) -> Tensor:
    """convolution(x) + residual, by one operation unless the convolution was replaced or is watched."""
    if type(convolution) in CONVOLUTIONS.values() and not is_watched(convolution):
        return convolution(x, residual)  # type: ignore[no-any-return]
    h: Tensor = convolution(x)
    return plus(h, residual)
