"""Attention of a text's tokens to themselves and those before them.

    y_t = softmax(query_t [key_0 ... key_t]^T / sqrt(D)) [value_0 ... value_t]

Inference on CPU is in C++. What needs gradients is left to PyTorch's own attention and its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.ops import reference
from glide_fast.ops.dispatch import define, differentiable, needs_gradient


def composed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The op by PyTorch's own; differentiable where autograd sees it."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 (the op's signature)
    return query.new_empty(query.shape)


FORWARD = define(
    "causal_attention",
    "(Tensor query, Tensor key, Tensor value) -> Tensor",
    reference.causal_attention,
    _fake,
    default=composed,
)


def _autograd(keyset: Any, *args: Any) -> Any:
    if needs_gradient(args):
        return composed(*args)
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *args)


differentiable("causal_attention", _autograd)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head self-attention in which a token sees itself and what is before it.

    Args:
        query: [B, T, N, D], any strides (views of one qkv projection are fine).
        key: [B, T, N, D].
        value: [B, T, N, D].

    Returns:
        [B, T, N, D], contiguous, in the dtype of query. Differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    if query.ndim != 4 or 0 in query.shape[1:] or not query.is_floating_point():
        raise ValueError(
            f"query is {query.dtype} of shape {tuple(query.shape)}; give floating-point [B, T, N, D], "
            f"only B may be 0"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape or tensor.dtype is not query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; the query is {query.dtype} of "
                f"shape {tuple(query.shape)}"
            )
    output: Tensor = FORWARD(query, key, value)
    return output
