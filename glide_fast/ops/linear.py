"""A linear layer over one or two inputs side by side, with the activation and the sum that follow it.

    y = activation([x, second] weight^T + bias) + residual

On channels-last maps this is a 1x1 convolution, and with ``second`` that of a decoder's concatenated input;
on patches of a picture it is the convolution whose stride is its size.
The activations are those of transformers: GELU, x times the normal distribution function (Hendrycks & Gimpel
2016, https://arxiv.org/abs/1606.08415), and CLIP's QuickGELU, x sigmoid(1.702 x).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import activation as activations
from glide_fast.ops import column_sums, reference, sources
from glide_fast.ops.dispatch import define, differentiable, needs_gradient
from glide_fast.ops.eager import eagerly
from glide_fast.ops.packed import trained

LinearActivation = Literal["none", "gelu", "quick_gelu"]
_ACTIVATIONS = {
    "none": reference.ACTIVATION_NONE,
    "gelu": reference.ACTIVATION_GELU,
    "quick_gelu": reference.ACTIVATION_QUICK_GELU,
}


def composed(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
) -> Tensor:
    """The op by PyTorch's own, and the activation's op."""
    y = F.linear(sources.joined(x, second, -1), weight.flatten(1), bias)
    if kind != reference.ACTIVATION_NONE:
        y = activations.FORWARD(y, kind)
    return y if residual is None else y + residual


def composed_backward(
    grad: Tensor, x: Tensor, second: Tensor | None, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients by PyTorch's own."""
    grad_x = grad @ weight.flatten(1) if needs_x else reference.nothing(x)
    if not needs_weight:
        return grad_x, reference.nothing(x)
    columns = grad.reshape(-1, grad.shape[-1]).t()
    if second is None:
        return grad_x, (columns @ x.reshape(-1, x.shape[-1])).view(weight.shape)
    grad_weight = weight.new_empty(weight.shape)
    sides = sources.apart(grad_weight.flatten(1), x, second, -1)
    for part, side in zip((x, second), sides, strict=True):
        torch.mm(columns, part.reshape(-1, part.shape[-1]), out=side)
    return grad_x, grad_weight


def _fake_forward(
    x: Tensor,
    second: Tensor | None,  # noqa: ARG001 (a fake has the op's signature)
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    kind: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    features = sources.width(x, second, -1)
    grad_x = x.new_empty((*x.shape[:-1], features) if needs_x else 0)
    return grad_x, weight.new_empty(weight.shape if needs_weight else 0)


FORWARD = define(
    "linear",
    "(Tensor x, Tensor? second, Tensor weight, Tensor? bias, Tensor? residual, int kind) -> Tensor",
    reference.linear,
    _fake_forward,
    default=composed,
)
BACKWARD = define(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor? second, Tensor weight, bool needs_x, bool needs_weight)"
    " -> (Tensor, Tensor)",
    reference.linear_backward,
    _fake_backward,
    default=composed_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        x: Tensor,
        second: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        kind: int,
    ) -> Tensor:
        """With an activation, what it is applied to is kept: it is as large as the output."""
        ctx.kind = kind
        below = keyset & torch._C._after_autograd_keyset
        arguments = (x, second, trained(weight), bias)
        output: Tensor
        if kind == reference.ACTIVATION_NONE:
            ctx.save_for_backward(x, second, weight, None)
            output = FORWARD.redispatch(below, *arguments, residual, kind)
            return output
        before = FORWARD.redispatch(below, *arguments, None, reference.ACTIVATION_NONE)
        ctx.save_for_backward(x, second, weight, before)
        output = activations.FORWARD(before, kind)
        return output if residual is None else output + residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_second, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        x, second, weight, before = ctx.saved_tensors
        inner = grad
        if before is not None:
            sums = min(1, column_sums.wanted("activation_backward", before, learning=needs_bias))
            inner, columns = activations.BACKWARD(grad, before, ctx.kind, sums)
            column_sums.remember(inner, -1, columns)
        needs_either = needs_x or needs_second
        both, grad_weight = BACKWARD(inner, x, second, weight, needs_either, needs_weight)
        grad_x, grad_second = sources.apart(both, x, second, -1) if needs_either else (None, None)
        return (
            None,
            grad_x if needs_x else None,
            grad_second if needs_second else None,
            grad_weight if needs_weight else None,
            column_sums.bias_gradient(inner, -1) if needs_bias else None,
            grad if needs_residual else None,
            None,
        )


def _autograd(keyset: Any, x: Tensor, second: Tensor | None, *rest: Any) -> Any:
    if needs_gradient((x, second, *rest[:3])):
        return _Linear.apply(keyset, x, second, *rest)  # type: ignore[no-untyped-call]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, x, second, *rest)


differentiable("linear", _autograd)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    residual: Tensor | None = None,
    activation: LinearActivation = "none",
) -> Tensor:
    """Multiply the last dimension of x, or of x and ``second`` side by side, by a weight; add what is given.

    Args:
        x: [..., C].
        weight: [K, C (+ S)], or a convolution's, whose sizes behind K multiply to as many features.
        bias: [K], or None.
        second: [..., S], more features of the input, behind those of x.
        residual: [..., K], added to the output, behind the activation.
        activation: "none", "gelu" (exact, by erf) or "quick_gelu", x sigmoid(1.702 x).

    Returns:
        [..., K] in the dtype of x. Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown activation.
    """
    if second is not None and second.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"second {tuple(second.shape)} must match x {tuple(x.shape)} but for the last size")
    features = sources.width(x, second, -1)
    if weight.ndim < 2 or math.prod(weight.shape[1:]) != features:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the input needs [K, {features}]")
    output = (*x.shape[:-1], weight.shape[0])
    if bias is not None and bias.shape != output[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{output[-1]}]")
    if residual is not None and residual.shape != output:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; the output's is {output}")
    for name, each in (("second", second), ("weight", weight), ("bias", bias), ("residual", residual)):
        if each is not None and each.dtype is not x.dtype:
            raise ValueError(f"{name} is {each.dtype} but x is {x.dtype}; convert one of them")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(_ACTIVATIONS)}")
    result: Tensor = eagerly(FORWARD, x, second, weight, bias, residual, _ACTIVATIONS[activation])
    return result
