"""A same-size convolution with what is around it: GroupNorm, FiLM, SiLU and resampling before, a sum after.

    y = conv(resample(SiLU(FiLM(GroupNorm([x, skip]))))) + bias + residual

This is half a residual block (ADM, arXiv 2105.05233, section 3). Of what lies between ``x`` and ``y`` the
backward pass gets nothing but the statistics: the normalised and activated map is computed again there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import column_sums, reference, sources
from glide_fast.ops.composed_convolution import composed, composed_backward
from glide_fast.ops.dispatch import define, differentiable, needs_gradient
from glide_fast.ops.eager import eagerly
from glide_fast.ops.group_norm import Resample, mode_of, resampled_shape
from glide_fast.ops.group_norm import check as check_norm
from glide_fast.ops.packed import trained


def widens(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether x of one dtype is convolved by a weight of the other as if it were converted to that."""
    return x in (torch.float16, torch.bfloat16) and weight is torch.float32


def _fake_forward(
    x: Tensor,
    skip: Tensor | None,  # noqa: ARG001 (a fake has the op's signature)
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    shift: Tensor | None,  # noqa: ARG001
    groups: int,
    eps: float,  # noqa: ARG001
    mode: int,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    shape = resampled_shape(x, mode)
    output = weight.new_empty([shape[0], weight.shape[0], *shape[2:]]).contiguous(
        memory_format=reference.channels_last(x)
    )
    statistics = (0,) if norm_weight is None else (x.shape[0], groups)
    dtype = weight.dtype if norm_weight is None else reference.compute_dtype(x.dtype)
    return output, x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    rstd: Tensor,  # noqa: ARG001
    groups: int,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    mode: int,  # noqa: ARG001
    weight: Tensor,
    bias: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,  # noqa: ARG001
    second: Tensor | None = None,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return x.new_empty(0) if tensor is None or not wanted else tensor.new_empty(tensor.shape)

    grad_norm_weight, grad_norm_bias = like(norm_weight, needs_x), like(norm_bias, needs_x)
    channels = sources.width(x, skip, 1)
    grad_x = x.new_empty((len(x), channels, *x.shape[2:]) if needs_x else 0)
    if needs_x:
        grad_x = grad_x.contiguous(memory_format=reference.memory_format(x))
    grad_bias = grad.new_empty(0 if bias is None else bias.shape)
    film = like(scale, needs_x), like(shift, needs_x)
    grad_weight = like(weight, needs_weight)
    if needs_weight:
        grad_weight = grad_weight.contiguous(memory_format=reference.memory_format(weight))
    found = reference.empty_sums(x, channels, sums if needs_x else 0)
    return grad_x, grad_norm_weight, grad_norm_bias, *film, grad_weight, grad_bias, found


FORWARD = define(
    "norm_convolution",
    "(Tensor x, Tensor? skip, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift,"
    " int groups, float eps, int mode, Tensor weight, Tensor? bias, Tensor? residual)"
    " -> (Tensor output, Tensor mean, Tensor rstd)",
    reference.norm_convolution,
    _fake_forward,
    default=composed,
)
BACKWARD = define(
    "norm_convolution_backward",
    "(Tensor grad, Tensor x, Tensor? skip, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale,"
    " Tensor? shift, Tensor mean, Tensor rstd, int groups, float eps, int mode, Tensor weight, Tensor? bias,"
    " bool needs_x, bool needs_weight, Tensor? summand=None, Tensor? second=None, int sums=0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.norm_convolution_backward,
    _fake_backward,
    default=composed_backward,
)


def _residual_gradient(grad: Tensor, space: torch.Size) -> Tensor:
    if grad.shape[2:] == space:
        return grad
    return reference.resample_backward(grad, reference.RESAMPLE_UP, space)


class _NormConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Any], x: Tensor, skip: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The op, by ``call``, then x and skip themselves, or x twice where there is no skip.

        What comes back for those are other paths' gradients.
        """
        *film, groups, eps, mode, weight, bias, residual = args
        output, mean, rstd = call(x, skip, *film, groups, eps, mode, trained(weight), bias, residual)
        ctx.save_for_backward(x, skip, *film, mean, rstd, weight, bias)
        ctx.settings = groups, eps, mode
        ctx.has_skip = skip is not None
        ctx.residual_space = None if residual is None else residual.shape[2:]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return output, mean, rstd, x, x if skip is None else skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *further: Tensor | None) -> tuple[Tensor | None, ...]:
        summand, second = further[2:]
        if grad is None:
            if not ctx.has_skip:
                summand, second = reference.sum_of(summand, second), None
            return None, summand, second, *(None,) * 10
        *saved, weight, bias = ctx.saved_tensors
        x, skip = saved[:2]
        if skip is not None:
            summand, second = sources.together(summand, second, x, skip, 1), None
        elif summand is None:
            summand, second = second, None
        needs = ctx.needs_input_grad[1:]
        needs_x, needs_weight = any(needs[:6]), needs[9]
        common = bias is not None and bias.ndim == 1  # its gradient may be known already
        sums = 0
        if needs_x and saved[2] is not None:
            sums = column_sums.wanted("norm_convolution_backward", grad, learning=any(needs[2:4]))
        others = weight, None if common else bias, needs_x, needs_weight, summand, second, sums
        gradients = BACKWARD(grad, *saved, *ctx.settings, *others)
        column_sums.remember(gradients[0], 1, gradients[7])
        parts = sources.apart(gradients[0], x, skip, 1) if needs_x else (None, None)
        found = *parts, *gradients[1:5]
        inner = [each if wanted else None for each, wanted in zip(found, needs[:6], strict=True)]
        grad_weight = gradients[5] if needs_weight else None
        grad_bias = None
        if needs[10]:
            grad_bias = column_sums.bias_gradient(grad, 1) if common else gradients[6]
        grad_residual = _residual_gradient(grad, ctx.residual_space) if needs[11] else None
        return None, *inner, None, None, None, grad_weight, grad_bias, grad_residual


def _autograd(keyset: Any, x: Tensor, skip: Tensor | None, *args: Any) -> Any:
    tensors = (x, skip, *(each for each in args if isinstance(each, Tensor)))
    if needs_gradient(tensors):
        call = functools.partial(FORWARD.redispatch, keyset & torch._C._after_autograd_keyset)
        found: Any = _NormConvolution.apply(call, x, skip, *args)  # type: ignore[no-untyped-call]
        return found[:3]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, x, skip, *args)


differentiable("norm_convolution", _autograd)


def _check(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shape: list[int],
) -> None:
    if x.ndim not in (3, 4, 5) or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} with shape {tuple(x.shape)}; give floating-point [B, C, *space] with 1, 2 or 3 "
            f"dimensions of space"
        )
    if skip is not None and (skip.shape[0], *skip.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"skip {tuple(skip.shape)} must have the batch and the space of x {tuple(x.shape)}")
    channels = sources.width(x, skip, 1)
    odd = all(size % 2 for size in weight.shape[2:])
    if weight.ndim != x.ndim or weight.shape[1] != channels or not odd:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x and skip need [K, {channels}, *odd sizes] of "
            f"{x.ndim - 2} dimensions"
        )
    output = (x.shape[0], weight.shape[0], *shape[2:])
    if bias is not None and bias.shape not in (output[1:2], output[:2]):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give [{output[1]}] or {list(output[:2])}")
    if residual is not None and residual.shape != output:
        doubled = (*residual.shape[:2], *(2 * size for size in residual.shape[2:]))
        if doubled != output:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; the output's is {output}, give that or half of "
                "each side"
            )
    if skip is not None and skip.dtype is not x.dtype:
        raise ValueError(f"skip is {skip.dtype} but x is {x.dtype}; convert one of them")
    if weight.dtype is not x.dtype and not widens(x.dtype, weight.dtype):
        raise ValueError(
            f"weight is {weight.dtype} but x is {x.dtype}; convert one of them, or give x in 16 bits with a "
            f"float32 weight"
        )
    for name, each in (("bias", bias), ("residual", residual)):
        if each is not None and each.dtype is not weight.dtype:
            raise ValueError(f"{name} is {each.dtype} but weight is {weight.dtype}; convert one of them")


def norm_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    resample: Resample = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve, with padding that keeps the size, what GroupNorm, FiLM, SiLU and 2x resampling make of x.

    Statistics are computed in fp32 (fp64 for fp64 input).

    Args:
        x: [B, C, *space], space of 1-3 dimensions.
        weight: [K, C (+ S), *odd sizes], of x's dtype; or float32 where x has 16 bits: then what is convolved
            has 32, and so have bias, residual and output.
        bias: [K], or [B, K] (a timestep's own), or None.
        skip: [B, S, *space], more channels of the input, behind those of x.
        norm_weight: [C + S], with ``norm_bias``; without them there is neither norm nor SiLU.
        norm_bias: [C + S].
        groups: number of groups of the norm; divides C + S.
        eps: added to the variance.
        scale: [B, C + S], FiLM's factor minus one; together with shift, or None.
        shift: [B, C + S], FiLM's summand.
        resample: what happens to each dimension of space before the convolution: "up" repeats every pixel,
            "down" averages pairs, "none".
        residual: like the output, or half as large along each side and then doubled as by "up"; added to it.

    Returns:
        [B, K, *resampled space] in the dtype of the weight; maps and volumes are channels-last.
        Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown choice.
    """
    mode = mode_of(resample)
    _check(x, skip, weight, bias, residual, resampled_shape(x, mode))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias belong together; give both or neither")
    if norm_weight is not None and norm_bias is not None:
        check_norm(weight.shape[1], x, norm_weight, norm_bias, scale, shift, groups)
    elif scale is not None or shift is not None:
        raise ValueError("scale and shift modulate a norm; give norm_weight and norm_bias as well")
    output: Tensor = eagerly(
        FORWARD, x, skip, norm_weight, norm_bias, scale, shift, groups, eps, mode, weight, bias, residual
    )[0]
    return output


def norm_convolution_beside(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int = 32,
    eps: float = 1e-5,
    resample: Resample = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_convolution`, and x for each of two paths beside it; or x and ``skip`` for one.

    In training the second and the third are views. Who reads them in place of x and skip has its gradient
    added as this op's backward pass writes its own, which saves autograd a sum of two maps.

    Raises:
        ValueError: as :func:`norm_convolution`.
    """
    if not needs_gradient([x, skip]) or torch.compiler.is_compiling():
        y = norm_convolution(
            x, weight, bias, skip=skip, norm_weight=norm_weight, norm_bias=norm_bias, groups=groups, eps=eps,
            resample=resample,
        )  # fmt: skip
        return y, x, x if skip is None else skip
    mode = mode_of(resample)
    _check(x, skip, weight, bias, None, resampled_shape(x, mode))
    check_norm(weight.shape[1], x, norm_weight, norm_bias, None, None, groups)
    found: Any = _NormConvolution.apply(  # type: ignore[no-untyped-call]
        functools.partial(eagerly, FORWARD),
        x,
        skip,
        norm_weight,
        norm_bias,
        None,
        None,
        groups,
        eps,
        mode,
        weight,
        bias,
        None,
    )
    return found[0], found[3], found[4]
