"""A convolution with what is around it, made of other ops: the device's group norm, PyTorch's convolution.

It serves `norm_convolution` where a device has nothing of its own, and in parts where a device has something
for the rest.
"""

from __future__ import annotations

from torch import Tensor

from glide_fast.ops import reference, sources
from glide_fast.ops.group_norm import BACKWARD, FORWARD


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """conv(x) + bias + residual, channels-last; ``bias`` is [K] or [B, K]."""
    common = bias if bias is not None and bias.ndim == 1 else None
    y = reference.convolve(x, weight, common)
    if bias is not None and bias.ndim == 2:
        y = y + reference.per_channel(bias, x.ndim)
    y = y if residual is None else y + reference.matched(residual, y)
    return y.contiguous(memory_format=reference.channels_last(x))


def _activated(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is convolved, and the statistics; by the device's own group norm."""
    if norm_weight is None or norm_bias is None:
        return reference.resample(x, mode), x.new_empty(0), x.new_empty(0)
    activated: tuple[Tensor, Tensor, Tensor] = FORWARD(
        x, norm_weight, norm_bias, scale, shift, groups, eps, True, mode
    )
    return activated


def composed(
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
    """The op out of the device's group norm and PyTorch's convolution."""
    x = sources.joined(x, skip, 1).to(weight.dtype)
    y, mean, rstd = _activated(x, norm_weight, norm_bias, scale, shift, groups, eps, mode)
    return convolve(y, weight, bias, residual), mean, rstd


def bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of ``bias``; empty without one."""
    return reference.nothing(grad) if bias is None else reference.bias_gradient(grad, bias)


def composed_backward(
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
    """The gradients out of the device's group norm and PyTorch's convolution."""
    x = sources.joined(x, skip, 1)
    if needs_weight:
        y = _activated(x.to(weight.dtype), norm_weight, norm_bias, scale, shift, groups, eps, mode)[0]
    else:  # its values are not read
        y = grad.new_empty([*x.shape[:2], *grad.shape[2:]]).contiguous(
            memory_format=reference.memory_format(grad)
        )
    grad_y, grad_weight = reference.convolve_backward(grad, y, weight, needs_x, needs_weight)
    grad_weight = reference.nothing(x) if grad_weight is None else grad_weight
    summand = reference.sum_of(summand, second)
    *inner, found = before_convolution(
        grad_y, x, norm_weight, norm_bias, scale, shift, mean, rstd, mode, summand, sums
    )
    return (*inner, grad_weight, bias_gradient(grad, bias), found)  # type: ignore[return-value]


def before_convolution(
    grad: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mode: int,
    summand: Tensor | None,
    sums: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of what is convolved: those of x, the norm's weight and bias, scale and shift.

    ``summand``, like x, is added to the first; behind them are copies of its sums [sums, C].
    """
    if grad is None:
        return reference.nothing(x), *reference.four_nothings(x), reference.nothing(x)
    if norm_weight is None or norm_bias is None:
        grad_x = reference.plus(reference.resample_backward(grad, mode, x.shape[2:]), summand)
        grad_x = grad_x.to(x.dtype).contiguous(memory_format=reference.memory_format(x))
        return grad_x, *reference.four_nothings(x), reference.column_sums(grad_x, 1, sums)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = BACKWARD(
        grad, x, norm_weight, norm_bias, scale, shift, mean, rstd, True, mode, summand, sums
    )
    return gradients
