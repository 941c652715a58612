"""The op `norm_convolution`: the norm's kernels read both inputs where they lie, then a convolution follows.

Where moments of the inputs are at hand (`glide_fast.kernels.moments`), the norm takes its statistics from
them. The backward pass has the statistics from the forward pass, and computes the activated map again in
one launch. cuDNN convolves, or our kernel with the weights that were chosen for it
(`glide_fast.ops.chosen`), which also makes the gradient of what they multiplied; the gradient of a weight is
always cuDNN's.
"""

from __future__ import annotations

from torch import Tensor

from glide_fast.kernels import convolution
from glide_fast.kernels.convolution_sum import convolve
from glide_fast.kernels.group_norm import normalise
from glide_fast.kernels.group_norm_tiles import Norm, Statistics, covered
from glide_fast.ops import chosen, dispatch, reference
from glide_fast.ops.norm_convolution import before_convolution, bias_gradient, concatenated


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
    """The op `norm_convolution`; what the norm's kernels do not cover goes to the default."""
    if norm_weight is None or norm_bias is None:
        y = reference.resample(concatenated(x, skip).to(weight.dtype), mode)
        mean, rstd = reference.nothing(y), reference.nothing(y)
    elif covered(x, mode, weight.shape[1]):
        norm = Norm(norm_weight, norm_bias, scale, shift, groups, eps, True, mode)
        y, statistics = normalise(norm, x, skip, memory_format=reference.channels_last(x), dtype=weight.dtype)
        mean, rstd = statistics.mean, statistics.rstd
    else:
        result: tuple[Tensor, Tensor, Tensor] = dispatch.default("norm_convolution")(
            x, skip, norm_weight, norm_bias, scale, shift, groups, eps, mode, weight, bias, residual
        )
        return result
    if chosen.is_chosen(weight) and convolution.serves(y, weight):
        return convolution.convolve(y, weight, bias, residual), mean, rstd
    return convolve(y, weight, bias, residual), mean, rstd


def norm_convolution_backward(
    grad: Tensor,
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `norm_convolution_backward`; what the norm's kernels do not cover goes to the default."""
    if norm_weight is None or norm_bias is None:
        y = reference.resample(x.to(weight.dtype), mode)
    elif covered(x, mode):
        norm = Norm(norm_weight, norm_bias, scale, shift, groups, eps, True, mode)
        saved = Statistics(mean, rstd)
        layout = reference.channels_last(x)
        y = normalise(norm, x, memory_format=layout, saved=saved, dtype=weight.dtype)[0]
    else:
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = dispatch.default(
            "norm_convolution_backward"
        )(
            grad, x, norm_weight, norm_bias, scale, shift, mean, rstd, groups, eps, mode, weight, bias,
            needs_x, needs_weight, summand, second,
        )  # fmt: skip
        return result
    ours = needs_x and chosen.is_chosen(weight) and convolution.serves(grad, weight)
    grad_y = grad_weight = None
    if needs_weight or not ours:
        grad_y, grad_weight = reference.convolve_backward(grad, y, weight, needs_x and not ours, needs_weight)
    if ours:
        grad_y = convolution.convolve(grad, weight, turned=True)
    grad_weight = reference.nothing(x) if grad_weight is None else grad_weight
    summand = reference.sum_of(summand, second)
    inner = before_convolution(grad_y, x, norm_weight, norm_bias, scale, shift, mean, rstd, mode, summand)
    return (*inner, grad_weight, bias_gradient(grad, bias))
