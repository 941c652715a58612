"""The activations of transformers, element by element: what a linear layer does where it cannot fuse them.

They are ops of their own because a backward pass needs what they were applied to; `linear` calls them then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.ops import reference
from glide_fast.ops.dispatch import define


def composed(x: Tensor, kind: int) -> Tensor:
    """The op by PyTorch's own."""
    if kind == reference.ACTIVATION_GELU:
        return F.gelu(x).contiguous()
    return (x * torch.sigmoid(reference.QUICK_GELU_SLOPE * x)).contiguous()


def composed_backward(grad: Tensor, x: Tensor, kind: int, sums: int = 0) -> tuple[Tensor, Tensor]:
    """The gradient by PyTorch's own, and its sums."""
    grad_x: Tensor
    if kind == reference.ACTIVATION_GELU:
        grad_x = torch.ops.aten.gelu_backward(grad, x).contiguous()
    else:
        grad_x = torch.ops.aten.silu_backward(grad, reference.QUICK_GELU_SLOPE * x).contiguous()
    return grad_x, reference.column_sums(grad_x, -1, sums)


def _fake_forward(x: Tensor, kind: int) -> Tensor:  # noqa: ARG001 (a fake has the op's signature)
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x: Tensor,
    kind: int,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), reference.empty_sums(x, x.shape[-1], sums)


FORWARD = define(
    "activation", "(Tensor x, int kind) -> Tensor", reference.activation, _fake_forward, default=composed
)
BACKWARD = define(
    "activation_backward",
    "(Tensor grad, Tensor x, int kind, int sums=0) -> (Tensor, Tensor)",
    reference.activation_backward,
    _fake_backward,
    default=composed_backward,
)
