"""Convolution on CPU: float32 3x3 maps by Winograd's method in C++, all else by what the default composes.

F(4x4, 3x3) needs a quarter of the products of a direct convolution, F(2x2, 3x3) four ninths. The larger tile
wins as long as a map fills a few of them; below, reading its larger weights takes longer than it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import composed_convolution as composition
from glide_fast.ops import memory, reference, sources
from glide_fast.ops.dispatch import cpp_library, implement
from glide_fast.ops.group_norm import resampled_shape
from glide_fast.ops.packed import packed

_OPS = torch.ops.glide_fast
_SMALL_MAP = 64  # pixels up to which the small tile is faster
_SHALLOW = 16  # channels up to which a direct sum is so exact that only the small tile comes near it
# Tiles below which transformed weights are too much to read. The same whether they are kept or not, because
# keeping them must not change a bit of the result.
_FEWEST_TILES = 16
_REASON = "float32 3x3 maps by Winograd's F(2x2) and F(4x4); others by group_norm and ATen"


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def winograd_tile(x: Tensor, mode: int, weight: Tensor, depth: int) -> int:
    """2 or 4, the side of the tiles that serve for sums over ``depth`` channels; 0 where the default does."""
    kernel = weight.shape[2:] == (3, 3) and weight.dtype is torch.float32
    if not kernel or x.dtype is not torch.float32 or x.ndim != 4 or 0 in x.shape:
        return 0
    height, width = resampled_shape(x, mode)[2:]
    tile = 2 if height * width <= _SMALL_MAP or depth <= _SHALLOW else 4
    tiles = len(x) * -(-height // tile) * -(-width // tile)
    return tile if tiles >= _FEWEST_TILES else 0


def _coefficients(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gain and offset of each channel [B, C], mean and 1/deviation of each group [B, G]."""
    if norm_weight is None or norm_bias is None:
        return None, None, x.new_empty(0), x.new_empty(0)
    norm = [norm_weight, norm_bias, scale, shift]
    norm_weight, norm_bias, scale, shift = (None if each is None else _rows(each) for each in norm)
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor] = _OPS.group_norm_coefficients(
        x, skip, norm_weight, norm_bias, scale, shift, groups, eps
    )
    return coefficients


def _coefficients_again(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
) -> tuple[Tensor | None, Tensor | None]:
    """Gain and offset of each channel [B, C] from the statistics that the forward pass returned."""
    if norm_weight is None or norm_bias is None:
        return None, None
    members = len(norm_weight) // mean.shape[1]
    factor = norm_weight.float() * rstd.repeat_interleave(members, 1)
    offset = norm_bias.float() - mean.repeat_interleave(members, 1) * factor
    if scale is not None and shift is not None:
        factor, offset = factor * (1 + scale), offset * (1 + scale) + shift
    return factor.contiguous(), offset.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """Float32 with dense rows; rows of [B, C] need not be adjacent."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def norm_convolution(
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    mode: int,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `norm_convolution`."""
    x, skip = x.to(weight.dtype), None if skip is None else skip.to(weight.dtype)
    tile = winograd_tile(x, mode, weight, weight.shape[1])
    if not tile:
        return composition.composed(
            x, skip, norm_weight, norm_bias, scale, shift, groups, eps, mode, weight, bias, residual
        )
    x = _channels_last(x)
    skip, residual = (None if each is None else _channels_last(each) for each in (skip, residual))
    gain, offset, mean, rstd = _coefficients(x, skip, norm_weight, norm_bias, scale, shift, groups, eps)
    bias = None if bias is None else _rows(bias)
    form = packed(weight, ("convolution", tile), lambda: _OPS.pack_convolution(weight, tile))
    height, width = resampled_shape(x, mode)[2:]
    output = memory.empty_map(len(x), len(weight), height, width)
    _OPS.convolution(x, skip, gain, offset, mode, weight, form, tile, False, bias, residual, output)
    return output, mean, rstd


def norm_convolution_backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    mode: int,
    weight: Tensor,
    bias: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,
    second: Tensor | None = None,
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `norm_convolution_backward`."""
    x = sources.joined(x, skip, 1)
    wide = x.to(weight.dtype)
    tile = winograd_tile(wide, mode, weight, min(weight.shape[:2]))
    if not tile:
        return composition.composed_backward(
            grad, x, None, norm_weight, norm_bias, scale, shift, mean, rstd, groups, eps, mode, weight, bias,
            needs_x, needs_weight, summand, second, sums,
        )  # fmt: skip
    grad, wide = _channels_last(grad), _channels_last(wide)
    grad_weight = weight.new_empty(0)
    if needs_weight:
        gain, offset = _coefficients_again(norm_weight, norm_bias, scale, shift, mean, rstd)
        grad_weight = _OPS.convolution_weight_gradient(grad, wide, gain, offset, mode, tile)
        grad_weight = grad_weight.contiguous(memory_format=reference.memory_format(weight))
    inner = None
    if needs_x:
        inner = memory.empty_map(len(x), weight.shape[1], *grad.shape[2:])
        _OPS.convolution(grad, None, None, None, 0, weight, None, tile, True, None, None, inner)
    summand = reference.sum_of(summand, second)
    *gradients, found = composition.before_convolution(
        inner, x, norm_weight, norm_bias, scale, shift, mean, rstd, mode, summand, sums
    )
    return (*gradients, grad_weight, composition.bias_gradient(grad, bias), found)  # type: ignore[return-value]


def register() -> None:
    """Register both ops for the CPU key, where the C++ library is."""
    library = cpp_library()
    if library is not None:
        for name, function in (
            ("norm_convolution", norm_convolution),
            ("norm_convolution_backward", norm_convolution_backward),
        ):
            implement(name, "CPU", function, name="C++ Winograd", reason=_REASON)
