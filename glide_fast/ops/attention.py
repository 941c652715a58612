"""U-Net attention: pixels look at the text and at each other, text keys first.

    y = softmax(query [text_key, key]^T / sqrt(D)) [text_value, value]

Nichol et al., "GLIDE" (2021), https://arxiv.org/abs/2112.10741, section 2.1: text keys and values are
concatenated to those of each attention layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import reference
from glide_fast.ops.dispatch import define, differentiable, needs_gradient


def _fake_forward(
    query: Tensor,
    key: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    value: Tensor,  # noqa: ARG001
    text_key: Tensor | None,  # noqa: ARG001
    text_value: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    dtype = reference.compute_dtype(query.dtype)
    return query.new_empty(query.shape), query.new_empty((batch, heads, queries), dtype=dtype)


def _fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    output: Tensor,  # noqa: ARG001
    log_sum: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_text_key = query.new_empty(0 if text_key is None else text_key.shape)
    grad_text_value = query.new_empty(0 if text_value is None else text_value.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    return query.new_empty(query.shape), grad_key, grad_value, grad_text_key, grad_text_value


FORWARD = define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? text_key, Tensor? text_value)"
    " -> (Tensor output, Tensor log_sum)",
    reference.attention,
    _fake_forward,
)
BACKWARD = define(
    "attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? text_key, Tensor? text_value,"
    " Tensor output, Tensor log_sum) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.attention_backward,
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_key: Tensor | None,
        text_value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output, log_sum = FORWARD.redispatch(
            keyset & torch._C._after_autograd_keyset, query, key, value, text_key, text_value
        )
        ctx.save_for_backward(query, key, value, text_key, text_value, output, log_sum)
        ctx.mark_non_differentiable(log_sum)
        ctx.set_materialize_grads(False)
        return output, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _log_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # read once: recomputed activations can be unpacked no more than that
        gradients = BACKWARD(grad, *saved)
        text = gradients[3:] if saved[3] is not None else (None, None)
        return None, *gradients[:3], *text


def _autograd(keyset: Any, *args: Any) -> Any:
    if needs_gradient(args):
        return _Attention.apply(keyset, *args)  # type: ignore[no-untyped-call]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *args)


differentiable("attention", _autograd)


def check(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
) -> None:
    """Raise ``ValueError`` if the operands of an attention do not fit each other."""
    if query.ndim != 4 or 0 in query.shape[1:]:
        raise ValueError(f"query has shape {tuple(query.shape)}; it must be [B, T, N, D], only B may be 0")
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}; give a floating-point tensor")
    batch, _, heads, dim = query.shape
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the query's shape "
            f"{tuple(query.shape)}"
        )
    if (text_key is None) != (text_value is None):
        raise ValueError("text_key and text_value belong together; give both or neither")
    if text_key is not None and text_value is not None:
        fits = text_key.ndim == 4 and (text_key.shape[0], *text_key.shape[2:]) == (batch, heads, dim)
        if not fits or text_value.shape != text_key.shape:
            raise ValueError(
                f"text_key {tuple(text_key.shape)} and text_value {tuple(text_value.shape)} must both be "
                f"[{batch}, S, {heads}, {dim}]"
            )
    for name, tensor in (("key", key), ("value", value), ("text_key", text_key), ("text_value", text_value)):
        if tensor is not None and tensor.dtype is not query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but query is {query.dtype}; convert one of them")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_key: Tensor | None = None,
    text_value: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention whose keys and values are the text's followed by the image's.

    Products and softmax are computed in fp32 (fp64 for fp64 input); the scale is 1/sqrt(D), in the reference
    as D**-0.25 on both query and key. There is no mask: padding is part of the text.

    Args:
        query: [B, T, N, D], any strides (views of one qkv projection are fine).
        key: [B, T, N, D].
        value: [B, T, N, D].
        text_key: [B, S, N, D], or None together with text_value.
        text_value: [B, S, N, D].

    Returns:
        [B, T, N, D], contiguous, in the dtype of query. Differentiable once.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    check(query, key, value, text_key, text_value)
    output: Tensor = FORWARD(query, key, value, text_key, text_value)[0]
    return output
