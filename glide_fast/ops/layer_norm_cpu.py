"""Layer normalisation on CPU: float32 in C++, half precision by way of float32, float64 by the default."""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import layer_norm as op
from glide_fast.ops import memory, reference
from glide_fast.ops.dispatch import cpp_library, implement

_REASON = "fp32 arithmetic by C++; float64 by ATen"


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C] in float32, the last dimension dense."""
    rows = x.float().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _is_served(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and op.statistics_dtype(x, weight) is torch.float32


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op `layer_norm`."""
    if not _is_served(x, weight):
        return op.composed(x, weight, bias, eps)
    rows = _rows(x)
    output = memory.empty(rows.shape, (rows.shape[1], 1))
    mean, rstd = rows.new_empty(len(rows)), rows.new_empty(len(rows))
    parameters = weight.float().contiguous(), bias.float().contiguous()
    torch.ops.glide_fast.normalise_rows(rows, *parameters, eps, output, mean, rstd)
    return output.view(x.shape).to(x.dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_weight: bool,
    summand: Tensor | None = None,
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `layer_norm_backward`."""
    if not _is_served(x, weight):
        return reference.layer_norm_backward(
            grad, x, weight, mean, rstd, needs_x, needs_weight, summand, sums
        )
    rows, channels = _rows(x), len(weight)
    grad_x = memory.empty(rows.shape, (channels, 1)) if needs_x else None
    gradients = [rows.new_empty(channels) if needs_weight else None for _ in range(2)]
    torch.ops.glide_fast.normalise_rows_backward(
        _rows(grad),
        rows,
        weight.float().contiguous(),
        mean.reshape(-1).contiguous(),
        rstd.reshape(-1).contiguous(),
        grad_x,
        *gradients,
    )
    if grad_x is not None and summand is not None:
        grad_x.view(x.shape).add_(summand)
    grad_weight, grad_bias = (
        reference.nothing(weight) if each is None else each.to(weight.dtype) for each in gradients
    )
    if grad_x is None:
        return reference.nothing(x), grad_weight, grad_bias, reference.nothing(x)
    result = grad_x.view(x.shape).to(x.dtype)
    return result, grad_weight, grad_bias, reference.column_sums(result, -1, sums)


def register() -> None:
    """Register both ops for the CPU key, where the C++ library is."""
    if cpp_library() is not None and hasattr(torch.ops.glide_fast, "normalise_rows"):
        for name, function in (("layer_norm", layer_norm), ("layer_norm_backward", layer_norm_backward)):
            implement(name, "CPU", function, name="C++", reason=_REASON)
