"""Layer normalisation: each row to mean 0 and variance 1, then scaled and shifted.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

Ba, Kiros & Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import column_sums, reference
from glide_fast.ops.dispatch import define, differentiable, needs_gradient


def statistics_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where x or the parameters are."""
    return torch.promote_types(reference.compute_dtype(x.dtype), reference.compute_dtype(weight.dtype))


def composed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op by PyTorch's own."""
    dtype = statistics_dtype(x, weight)
    parameters = weight.to(dtype), bias.to(dtype)
    y, mean, rstd = torch.native_layer_norm(x.to(dtype), weight.shape, *parameters, eps)
    rows = x.shape[:-1]
    return y.to(x.dtype).contiguous(), mean.reshape(rows), rstd.reshape(rows)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    eps: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = x.shape[:-1], statistics_dtype(x, weight)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x: Tensor,
    weight: Tensor,
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = weight.shape if needs_weight else 0
    grad_x = x.new_empty(x.shape if needs_x else 0)
    columns = reference.empty_sums(x, x.shape[-1], sums if needs_x else 0)
    return grad_x, weight.new_empty(parameters), weight.new_empty(parameters), columns


FORWARD = define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor output, Tensor mean, Tensor rstd)",
    reference.layer_norm,
    _fake_forward,
    default=composed,
)
BACKWARD = define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool needs_x, bool needs_weight,"
    " Tensor? summand=None, int sums=0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.layer_norm_backward,
    _fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The op, by ``call``, and x itself: what comes back for that is another path's gradient of x."""
        output, mean, rstd = call(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return output, mean, rstd, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *further: Tensor | None) -> tuple[Tensor | None, ...]:
        beside = further[2]
        if grad is None:
            return None, beside, None, None, None
        _, needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        saved = ctx.saved_tensors  # read once: recomputed activations can be unpacked no more than that
        learning = needs_weight or needs_bias
        sums = column_sums.wanted("layer_norm_backward", saved[0], learning=learning) if needs_x else 0
        *gradients, columns = BACKWARD(grad, *saved, needs_x, learning, beside, sums)
        column_sums.remember(gradients[0], -1, columns)
        needed = zip(gradients, (needs_x, needs_weight, needs_bias), strict=True)
        return None, *(gradient if needs else None for gradient, needs in needed), None


def _autograd(keyset: Any, *args: Any) -> Any:
    if needs_gradient(args[:3]):
        call = functools.partial(FORWARD.redispatch, keyset & torch._C._after_autograd_keyset)
        found: Any = _LayerNorm.apply(call, *args)  # type: ignore[no-untyped-call]
        return found[:3]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *args)


differentiable("layer_norm", _autograd)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; give floating-point [..., C], C above 0")
    for name, values in (("weight", weight), ("bias", bias)):
        if values.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; x needs [{x.shape[-1]}]")
        if not values.is_floating_point() or values.dtype is not weight.dtype:
            raise ValueError(f"{name} is {values.dtype}; give weight and bias of one floating-point dtype")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x, then scale and shift it.

    Everything is computed in fp32 (fp64 where x or the parameters are) and rounded once, to x's dtype.

    Args:
        x: [..., C], any strides.
        weight: [C], in any floating-point dtype, whatever that of x.
        bias: [C], in the dtype of weight.
        eps: added to the variance.

    Returns:
        [..., C], contiguous, in the dtype of x. Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    _check(x, weight, bias)
    output: Tensor = FORWARD(x, weight, bias, eps)[0]
    return output


def layer_norm_beside(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """:func:`layer_norm`, and x for a path beside it.

    In training the second is a view of x. Who reads it in place of x has its gradient added as the norm's
    backward pass writes its own, which saves autograd a sum of two tensors.

    Raises:
        ValueError: as :func:`layer_norm`.
    """
    if not needs_gradient([x]) or torch.compiler.is_compiling():
        return layer_norm(x, weight, bias, eps=eps), x
    _check(x, weight, bias)
    found: Any = _LayerNorm.apply(FORWARD, x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return found[0], found[3]
