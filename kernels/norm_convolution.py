"""The op `norm_convolution`: the norm's kernels read both inputs where they lie, then a convolution follows.

Where moments of the inputs are at hand (`glide_fast.kernels.moments`), the norm takes its statistics from
them. The backward pass has the statistics from the forward pass; the activated map is made again by the first
of the norm's kernels, which reads x anyway, or in a launch of its own where it is resampled. cuDNN convolves,
or our kernel with the weights that were chosen for it (`glide_fast.ops.chosen`), which also makes the
gradient of what they multiplied; the gradient of a weight is always cuDNN's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.kernels import convolution
from glide_fast.kernels.convolution_sum import convolve
from glide_fast.kernels.group_norm import normalise
from glide_fast.kernels.group_norm_backward import Further, gradients
from glide_fast.kernels.group_norm_tiles import Norm, Statistics, covered
from glide_fast.ops import chosen, dispatch, reference, sources
from glide_fast.ops.composed_convolution import before_convolution, bias_gradient

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


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
        y = reference.resample(sources.joined(x, skip, 1).to(weight.dtype), mode)
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
) -> _Gradients:
    """The op `norm_convolution_backward`; what no kernel of ours has a part in goes to the default."""
    channels = weight.shape[1]
    normed = norm_weight is not None and covered(x, mode, channels)
    if not normed and (norm_weight is not None or not _is_ours(grad, weight)):
        result: _Gradients = dispatch.default("norm_convolution_backward")(
            grad, x, skip, norm_weight, norm_bias, scale, shift, mean, rstd, groups, eps, mode, weight, bias,
            needs_x, needs_weight, summand, second, sums,
        )  # fmt: skip
        return result
    layout = reference.channels_last(x)
    inner: tuple[Tensor, ...] = (*(reference.nothing(x) for _ in range(6)),)
    if norm_weight is None or norm_bias is None:
        x = sources.joined(x, skip, 1)
        convolved = reference.resample(x.to(weight.dtype), mode)
        if needs_x:
            arriving, summand = _before(grad, convolved, weight), reference.sum_of(summand, second)
            inner = before_convolution(arriving, x, None, None, scale, shift, mean, rstd, mode, summand, sums)
    else:
        norm = Norm(norm_weight, norm_bias, scale, shift, groups, eps, True, mode)
        saved = Statistics(mean, rstd)
        shape = [len(x), channels, *grad.shape[2:]]
        convolved = torch.empty(shape, dtype=weight.dtype, device=x.device, memory_format=layout)
        joint = mode == reference.RESAMPLE_NONE and needs_x and needs_weight
        if needs_weight and not joint:
            convolved = normalise(norm, x, skip, memory_format=layout, saved=saved, dtype=weight.dtype)[0]
        if needs_x:
            further = Further(summand, second, sums, convolved if joint else None, skip)
            inner = gradients(norm, _before(grad, convolved, weight), x, saved, further)
    grad_weight = reference.nothing(x)
    if needs_weight:
        found = reference.convolve_backward(grad, convolved, weight, False, True)[1]
        grad_weight = grad_weight if found is None else found
    return (*inner[:5], grad_weight, bias_gradient(grad, bias), inner[5])


def _is_ours(grad: Tensor, weight: Tensor) -> bool:
    """Whether our kernel makes the gradient of what this weight convolved."""
    return chosen.is_chosen(weight) and convolution.serves(grad, weight)


def _before(grad: Tensor, convolved: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what was convolved, whose values are not read."""
    if _is_ours(grad, weight):
        return convolution.convolve(grad, weight, turned=True)
    found = reference.convolve_backward(grad, convolved, weight, True, False)[0]
    return convolved if found is None else found
