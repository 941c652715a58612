"""Linear layers on CPU: float32 by the convolution's products in C++, all else by PyTorch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glide_fast.ops import activation as activations
from glide_fast.ops import linear as op
from glide_fast.ops import memory, reference, sources
from glide_fast.ops.dispatch import cpp_library, implement
from glide_fast.ops.packed import packed

_OPS = torch.ops.glide_fast
_FEWEST_ROWS = 32  # below, packing takes longer than the product; the same whether weights are kept or not
_REASON = "float32 by C++, others by ATen"


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C]."""
    return x.reshape(-1, x.shape[-1])


def _is_served(*tensors: Tensor | None) -> bool:
    return all(each is None or (each.dtype is torch.float32 and each.numel() > 0) for each in tensors)


def _dense_strides(shape: torch.Size) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _multiply(
    a: Tensor,  # [rows, C]
    b: Tensor,  # [C (+ S), columns], or packed
    columns: int,
    *,
    second: Tensor | None = None,  # [rows, S]
    bias: Tensor | None = None,  # [columns]
    residual: Tensor | None = None,  # [rows, columns]
    kind: int = reference.ACTIVATION_NONE,
) -> Tensor:
    output = memory.empty((len(a), columns), (columns, 1))
    _OPS.multiply(a, second, b, columns, bias, kind, residual, output)
    return output


def linear(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
) -> Tensor:
    """The op `linear`."""
    rows = _rows(x)
    if not _is_served(x, second, weight, bias, residual) or len(rows) < _FEWEST_ROWS:
        return op.composed(x, second, weight, bias, residual, kind)
    form = packed(weight, "linear", lambda: _OPS.pack_linear(weight.flatten(1).t()))
    output = _multiply(
        rows,
        weight.flatten(1).t() if form is None else form,
        len(weight),
        second=None if second is None else _rows(second),
        bias=None if bias is None else bias.contiguous(),
        residual=None if residual is None else _rows(residual).contiguous(),
        kind=kind,
    )
    return output.view(*x.shape[:-1], len(weight))


def linear_backward(
    grad: Tensor, x: Tensor, second: Tensor | None, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The op `linear_backward`."""
    x = sources.joined(x, second, -1)
    rows, grad_rows = _rows(x), _rows(grad)
    if not _is_served(grad, x, weight) or len(rows) < _FEWEST_ROWS:
        return op.composed_backward(grad, x, None, weight, needs_x, needs_weight)
    features = x.shape[-1]
    grad_x, grad_weight = reference.nothing(x), reference.nothing(x)
    if needs_x:
        grad_x = _multiply(grad_rows, weight.flatten(1), features).view(x.shape)
    if needs_weight:
        grad_weight = _multiply(grad_rows.t(), rows, features).view(weight.shape)
    return grad_x, grad_weight


def activation(x: Tensor, kind: int) -> Tensor:
    """The op `activation`."""
    if not _is_served(x):
        return activations.composed(x, kind)
    output = memory.empty(x.shape, _dense_strides(x.shape))
    _OPS.activate(x.contiguous(), kind, output)
    return output


def activation_backward(grad: Tensor, x: Tensor, kind: int, sums: int = 0) -> tuple[Tensor, Tensor]:
    """The op `activation_backward`."""
    if not _is_served(grad, x):
        return activations.composed_backward(grad, x, kind, sums)
    output = memory.empty(x.shape, _dense_strides(x.shape))
    _OPS.activate_backward(grad.contiguous(), x.contiguous(), kind, output)
    return output, reference.column_sums(output, -1, sums)


def register() -> None:
    """Register the ops for the CPU key, where the C++ library is."""
    served = (linear, linear_backward, activation, activation_backward)
    if cpp_library() is not None:
        for function in served:
            implement(function.__name__, "CPU", function, name="C++", reason=_REASON)
