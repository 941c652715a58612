"""A linear layer over one or two inputs side by side, with the sum that follows it.

    y = [x, second] weight^T + bias + residual

On channels-last maps this is a 1x1 convolution, and with ``second`` that of a decoder's concatenated input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import reference
from glide_fast.ops.dispatch import define, differentiable, needs_gradient
from glide_fast.ops.packed import trained


def composed(
    x: Tensor, second: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The op by PyTorch's own."""
    y = F.linear(x if second is None else torch.cat([x, second], dim=-1), weight.flatten(1), bias)
    return y if residual is None else y + residual


def composed_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients by PyTorch's own."""
    grad_x = grad @ weight.flatten(1) if needs_x else reference.nothing(x)
    if not needs_weight:
        return grad_x, reference.nothing(x)
    grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_weight.view(weight.shape)


def _fake_forward(
    x: Tensor,
    second: Tensor | None,  # noqa: ARG001 (a fake has the op's signature)
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x: Tensor,
    weight: Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), weight.new_empty(weight.shape if needs_weight else 0)


FORWARD = define(
    "linear",
    "(Tensor x, Tensor? second, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    reference.linear,
    _fake_forward,
    default=composed,
)
BACKWARD = define(
    "linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
    reference.linear_backward,
    _fake_backward,
    default=composed_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        output: Tensor = FORWARD.redispatch(
            keyset & torch._C._after_autograd_keyset, x, None, trained(weight), *rest
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        grad_x, grad_weight = BACKWARD(grad, *ctx.saved_tensors, needs_x, needs_weight)
        return (
            None,
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None,
            grad if needs_residual else None,
        )


def _autograd(keyset: Any, x: Tensor, second: Tensor | None, *rest: Any) -> Any:
    if needs_gradient((x, second, *rest)):
        joined = x if second is None else torch.cat([x, second], dim=-1)
        return _Linear.apply(keyset, joined, *rest)  # type: ignore[no-untyped-call]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, x, second, *rest)


differentiable("linear", _autograd)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply the last dimension of x, or of x and ``second`` side by side, by a weight; add what is given.

    Args:
        x: [..., C].
        weight: [K, C (+ S)], or a 1x1 convolution's, with sizes of one behind.
        bias: [K], or None.
        second: [..., S], more features of the input, behind those of x.
        residual: [..., K], added to the output.

    Returns:
        [..., K] in the dtype of x. Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    if second is not None and second.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"second {tuple(second.shape)} must match x {tuple(x.shape)} but for the last size")
    features = x.shape[-1] + (0 if second is None else second.shape[-1])
    if weight.ndim < 2 or weight.shape[1] != features or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the input needs [K, {features}]")
    output = (*x.shape[:-1], weight.shape[0])
    if bias is not None and bias.shape != output[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{output[-1]}]")
    if residual is not None and residual.shape != output:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; the output's is {output}")
    for name, each in (("second", second), ("weight", weight), ("bias", bias), ("residual", residual)):
        if each is not None and each.dtype is not x.dtype:
            raise ValueError(f"{name} is {each.dtype} but x is {x.dtype}; convert one of them")
    result: Tensor = FORWARD(x, second, weight, bias, residual)
    return result
