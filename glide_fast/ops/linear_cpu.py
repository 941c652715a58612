"""Linear layers on CPU: float32 by the convolution's products in C++, all else by PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import linear as op
from glide_fast.ops.dispatch import cpp_library, implement
from glide_fast.ops.packed import packed

_OPS = torch.ops.glide_fast
_FEWEST_ROWS = 32  # below, packing weights that are not kept takes longer than the product
_REASON = "float32 by C++, others by ATen"


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C]."""
    return x.reshape(-1, x.shape[-1])


def _is_served(*tensors: Tensor | None) -> bool:
    return all(each is None or (each.dtype is torch.float32 and each.numel() > 0) for each in tensors)


def linear(
    x: Tensor, second: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The op `linear`."""
    if not _is_served(x, second, weight, bias, residual):
        return op.composed(x, second, weight, bias, residual)
    form = packed(weight, "linear", lambda: _OPS.pack_linear(weight.flatten(1).t()))
    rows = _rows(x)
    if form is None and len(rows) < _FEWEST_ROWS:
        return op.composed(x, second, weight, bias, residual)
    output = _OPS.multiply(
        rows,
        None if second is None else _rows(second),
        weight.flatten(1).t() if form is None else form,
        weight.shape[0],
        None if bias is None else bias.contiguous(),
        None if residual is None else _rows(residual).contiguous(),
    )
    return output.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The op `linear_backward`."""
    rows, grad_rows = _rows(x), _rows(grad)
    if not _is_served(grad, x, weight) or len(rows) < _FEWEST_ROWS:
        return op.composed_backward(grad, x, weight, needs_x, needs_weight)
    features = x.shape[-1]
    grad_x = grad_weight = x.new_empty(0)
    if needs_x:
        grad_x = _OPS.multiply(grad_rows, None, weight.flatten(1), features, None, None).view(x.shape)
    if needs_weight:
        grad_weight = _OPS.multiply(grad_rows.t(), None, rows, features, None, None).view(weight.shape)
    return grad_x, grad_weight


def register() -> None:
    """Register both ops for the CPU key, where the C++ library is."""
    if cpp_library() is not None:
        for name, function in (("linear", linear), ("linear_backward", linear_backward)):
            implement(name, "CPU", function, name="C++", reason=_REASON)
