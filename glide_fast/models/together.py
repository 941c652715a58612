"""Linear layers that read the same input as one product, in training.

A U-Net has dozens that project the timestep, and one in every attention block that projects the text. On a
GPU each costs a launch in the forward pass and four in the backward pass; their weights are copied together
in each of the passes instead, and nothing joined is kept from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast import ops
from glide_fast.models.layers import Linear, PointwiseConv, is_watched
from glide_fast.ops.linear import BACKWARD


def can_be_together(layers: Sequence[Any]) -> bool:
    """Whether these are linear layers of ours that nobody watches, and their weights all of this process."""
    return bool(layers) and all(
        type(layer) in (Linear, PointwiseConv)
        and isinstance(layer.bias, Tensor)
        and not hasattr(layer.weight, "placements")  # a DTensor's
        and not is_watched(layer)
        for layer in layers
    )


def together(x: Tensor, layers: Sequence[Any]) -> Tensor:
    """The outputs side by side: x [..., C] -> [..., sum of K] of layers with weights [K, C] or [K, C, 1]."""
    weights = [layer.weight.to(x.dtype) for layer in layers]
    biases = [layer.bias.to(x.dtype) for layer in layers]
    return _Together.apply(x, len(layers), *weights, *biases)  # type: ignore[no-any-return, no-untyped-call]


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: int, *parameters: Tensor) -> Tensor:
        """The weights of the layers and then their biases [K]."""
        weights, biases = parameters[:layers], parameters[layers:]
        ctx.save_for_backward(x, *weights)
        return ops.linear(x, torch.cat(weights), torch.cat(biases))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        grad_x, grad_weight = BACKWARD(grad, x, None, torch.cat(weights), needs_x, needs_weights)
        if not needs_weights:
            return grad_x, None, *[None] * 2 * len(weights)
        rows = [len(each) for each in weights]
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        gradients = *torch.split(grad_weight, rows), *torch.split(grad_bias, rows)
        return grad_x if needs_x else None, None, *gradients
