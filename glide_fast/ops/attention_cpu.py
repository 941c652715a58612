"""Attention on CPU in C++; fp64 by PyTorch's flash attention.

Both multiply the scores, not query and key, by the scale: the same thing in fp32. The two aten ops are what
`scaled_dot_product_attention` calls on CPU; they are called directly because autograd is ours.

The backward pass computes the scores again, so that gradients carry a relative error of about eps * |score|.
Without fused multiply-add it is twice that in C++; there aten serves as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import causal_attention as causal_op
from glide_fast.ops import memory, reference
from glide_fast.ops.dispatch import cpp_library, implement

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def _by_head(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, N, D] -> [B, N, T, D] in `dtype`, the last dimension dense as aten requires."""
    tensor = tensor.transpose(1, 2).to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _keys_and_values(
    key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if text_key is not None and text_value is not None:
        key, value = torch.cat([text_key, key], dim=1), torch.cat([text_value, value], dim=1)
    return _by_head(key, dtype), _by_head(value, dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    """In float32, the last dimension dense."""
    if tensor is None:
        return None
    tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def attention(
    query: Tensor,  # [B, T, N, D]
    key: Tensor,  # [B, T, N, D]
    value: Tensor,  # [B, T, N, D]
    text_key: Tensor | None,  # [B, S, N, D]
    text_value: Tensor | None,  # [B, S, N, D]
) -> tuple[Tensor, Tensor]:
    """The op `attention`: output [B, T, N, D], logarithm of the softmax's sum [B, N, T]."""
    if query.numel() == 0:
        return reference.attention(query, key, value, text_key, text_value)
    if query.dtype is torch.float64 or cpp_library() is None:
        return _aten_attention(query, key, value, text_key, text_value)
    output, log_sum = _attend(query, key, value, text_key, text_value, causal=False)
    return output.to(query.dtype), log_sum


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, D] in float32, logarithm of the softmax's sum [B, N, T]."""
    batch, queries, heads, dim = query.shape
    strides = (queries * heads * dim, heads * dim, dim, 1)
    output = memory.empty(query.shape, strides)
    log_sum = torch.empty((batch, heads, queries), dtype=torch.float32, device="cpu")
    tensors = [_float(each) for each in (query, key, value, text_key, text_value)]
    torch.ops.glide_fast.attention_forward(*tensors, causal, output, log_sum)
    return output, log_sum


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The op `causal_attention`."""
    if query.numel() == 0 or query.dtype is torch.float64:
        return causal_op.composed(query, key, value)
    return _attend(query, key, value, None, None, causal=True)[0].to(query.dtype)


def _aten_attention(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(query.dtype)
    keys, values = _keys_and_values(key, value, text_key, text_value, dtype)
    output, log_sum = getattr(torch.ops.aten, _FORWARD)(_by_head(query, dtype), keys, values)
    return output.transpose(1, 2).to(query.dtype).contiguous(), log_sum.contiguous()


def attention_backward(
    grad: Tensor,  # [B, T, N, D]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    output: Tensor,  # [B, T, N, D]
    log_sum: Tensor,  # [B, N, T]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `attention_backward`: gradients of query, key, value, text_key, text_value."""
    if query.numel() == 0:
        return reference.attention_backward(grad, query, key, value, text_key, text_value, output, log_sum)
    library = cpp_library()
    if query.dtype is torch.float64 or library is None or library.capability() == "generic":
        return _aten_backward(grad, query, key, value, text_key, text_value, output, log_sum)
    tensors = [_float(each) for each in (grad, query, key, value, text_key, text_value, output)]
    gradients = torch.ops.glide_fast.attention_gradient(*tensors, log_sum)
    first, second, third, fourth, fifth = (each.to(query.dtype) for each in gradients)
    return first, second, third, fourth, fifth


def _aten_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(query.dtype)
    keys, values = _keys_and_values(key, value, text_key, text_value, dtype)
    wide_grad, wide_query, wide_output = (_by_head(tensor, dtype) for tensor in (grad, query, output))
    gradients = getattr(torch.ops.aten, _BACKWARD)(
        wide_grad, wide_query, keys, values, wide_output, log_sum, 0.0, False
    )
    grad_query, grad_key, grad_value = (tensor.transpose(1, 2).to(query.dtype) for tensor in gradients)
    text = 0 if text_key is None else text_key.shape[1]
    return (
        grad_query.contiguous(),
        grad_key[:, text:].contiguous(),
        grad_value[:, text:].contiguous(),
        query.new_empty(0) if text_key is None else grad_key[:, :text].contiguous(),
        query.new_empty(0) if text_value is None else grad_value[:, :text].contiguous(),
    )


def register() -> None:
    """Register the ops for the CPU key, where the C++ library is or this torch has the aten ops."""
    if cpp_library() is not None:
        reason = "fp32 arithmetic without gradients; all else by ATen"
        implement("causal_attention", "CPU", causal_attention, name="C++", reason=reason)
    if hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD):
        aten = "ATen flash attention"
        forward = aten if cpp_library() is None else "C++"
        reason = "fp32 arithmetic; float64 input in float64"
        implement("attention", "CPU", attention, name=forward, reason=f"{reason}, by {aten}")
        reason = f"{reason} and where the CPU has no fused multiply-add, by {aten}"
        implement("attention_backward", "CPU", attention_backward, name=forward, reason=reason)
