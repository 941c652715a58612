"""How many FLOPs the ops take, for ``torch.utils.flop_counter.FlopCounterMode``.

As everywhere in that counter only matrix products count, a multiplication and an addition as two; GroupNorm
takes none, and a convolution counts as if it were computed directly. Attention's backward pass computes the
scores again and has four more products. Importing this
module tells the counter; nothing else does, because the counter takes as long to import as all the ops.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def attention_product(query: torch.Size, text_key: torch.Size | None) -> int:
    """FLOPs of query [B, T, N, D] times the keys of the image and of the text [B, S, N, D]."""
    batch, queries, heads, dim = query
    keys = queries + (0 if text_key is None else text_key[1])
    return 2 * batch * heads * queries * keys * dim


@register_flop_formula(torch.ops.glide_fast.attention)
def _attention(
    query: torch.Size,
    _key: torch.Size,
    _value: torch.Size,
    text_key: torch.Size | None,
    *_rest: Any,
    out_shape: Any = None,  # noqa: ARG001 (the counter names it)
) -> int:
    return FORWARD_PRODUCTS * attention_product(query, text_key)


@register_flop_formula(torch.ops.glide_fast.attention_backward)
def _attention_backward(
    _grad: torch.Size,
    query: torch.Size,
    _key: torch.Size,
    _value: torch.Size,
    text_key: torch.Size | None,
    *_rest: Any,
    out_shape: Any = None,  # noqa: ARG001
) -> int:
    return BACKWARD_PRODUCTS * attention_product(query, text_key)


@register_flop_formula(torch.ops.glide_fast.projected_attention_backward)
def _projected_attention_backward(
    grad: torch.Size,
    _projection: torch.Size,
    text: torch.Size | None,
    *_rest: Any,
    out_shape: Any = None,  # noqa: ARG001
) -> int:
    return BACKWARD_PRODUCTS * attention_product(grad, text)


def _product(output: torch.Size, weight: torch.Size) -> int:
    """FLOPs of an output [B, K, *space] or [..., K], each number of which takes a row of the weight."""
    return 2 * math.prod(output) * math.prod(weight[1:])


@register_flop_formula(torch.ops.glide_fast.norm_convolution)
def _norm_convolution(*shapes: Any, out_shape: Any = None) -> int:
    return _product(out_shape[0], shapes[9])


@register_flop_formula(torch.ops.glide_fast.norm_convolution_backward)
def _norm_convolution_backward(
    grad: torch.Size,
    *rest: Any,
    out_shape: Any = None,  # noqa: ARG001
) -> int:
    weight, _bias, needs_x, needs_weight = rest[11:15]
    return int(needs_x + needs_weight) * _product(grad, weight)


@register_flop_formula(torch.ops.glide_fast.linear)
def _linear(
    _x: torch.Size, _second: torch.Size | None, weight: torch.Size, *_rest: Any, out_shape: Any = None
) -> int:
    return _product(out_shape, weight)


@register_flop_formula(torch.ops.glide_fast.linear_backward)
def _linear_backward(
    grad: torch.Size,
    _x: torch.Size,
    _second: torch.Size | None,
    weight: torch.Size,
    needs_x: bool,
    needs_weight: bool,
    out_shape: Any = None,  # noqa: ARG001
) -> int:
    return (needs_x + needs_weight) * _product(grad, weight)
