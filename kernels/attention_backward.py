"""The gradients of attention in one launch, text included: nothing is added up across programs.

    p = exp(score - log_sum),   dv = p^T dy,   dp = dy v^T,   ds = p (dp - Σ dy y),   dq = ds k,   dk = ds^T q

Some programs own a tile of keys and values, of the text or the image, and go through all queries; the others
own a tile of queries and go through all keys. Scores are computed twice, for which there are no atomics, no
second launch and the same bits every time. The sums Σ dy y are made where they are needed.

Memory: e B N D (5 T + 2 S) bytes read and e B N D (3 T + 2 S) written, what is looped over again from L2.
Work: 14 B N T (S + T) D FLOP, 10 of which a pass with atomics would need.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import launch
from glide_fast.kernels.attention import (
    CASES,
    DTYPES,
    Operands,
    by_head,
    load_tile,
    padded,
    precision,
    scale,
    serves,
    source,
    store_tile,
)
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration, choose, run
from glide_fast.ops import dispatch

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _key_gradients(
    query,
    key,
    value,
    output,
    grad,
    log_sum,
    grad_key,  # [B, length, N, D]
    grad_value,
    batch,
    head,
    first,  # key of the tile
    queries,
    length,
    heads,
    query_strides,
    strides,
    output_strides,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a tile of keys and values of one source gets from all queries; tiles are [COLUMNS, ...]."""
    keys = load_tile(key, batch, head, first, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
    values = load_tile(value, batch, head, first, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
    key_total = tl.zeros([COLUMNS, DIM], tl.float32)
    value_total = tl.zeros([COLUMNS, DIM], tl.float32)
    for start in range(0, queries, ROWS):
        query_tile = load_tile(query, batch, head, start, queries, query_strides, D, ROWS, DIM, DESCRIPTORS)
        grads = load_tile(grad, batch, head, start, queries, output_strides, D, ROWS, DIM, DESCRIPTORS)
        outputs = load_tile(output, batch, head, start, queries, output_strides, D, ROWS, DIM, False)
        rows = start + tl.arange(0, ROWS)
        # An infinite sum takes queries behind the last one out.
        sums = tl.load(log_sum + rows, mask=rows < queries, other=float("inf")) * 1.4426950408889634
        inner = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
        scores = tl.dot(keys, query_tile.T, input_precision=PRECISION)
        shares = tl.exp2(scores * SCALE - sums[None, :])
        value_total = tl.dot(shares.to(grads.dtype), grads, value_total, input_precision=PRECISION)
        slopes = shares * (tl.dot(values, grads.T, input_precision=PRECISION) - inner[None, :])
        key_total = tl.dot(slopes.to(grads.dtype), query_tile, key_total, input_precision=PRECISION)
    # SCALE is in units of log 2.
    key_total = key_total * (SCALE * 0.6931471805599453)
    store_tile(grad_key, key_total, batch, head, first, length, heads, D, COLUMNS, DIM)
    store_tile(grad_value, value_total, batch, head, first, length, heads, D, COLUMNS, DIM)


@triton.jit
def _query_gradients(
    total,  # [ROWS, DIM]
    query_tile,
    grads,
    sums,  # [ROWS], in units of log 2
    inner,
    key,
    value,
    batch,
    head,
    length,
    strides,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to a tile of queries what it gets from all keys of one source."""
    for start in range(0, length, COLUMNS):
        keys = load_tile(key, batch, head, start, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
        values = load_tile(value, batch, head, start, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
        scores = tl.dot(query_tile, keys.T, input_precision=PRECISION)
        shares = tl.exp2(scores * SCALE - sums[:, None])
        if not EVEN:
            shares = tl.where((start + tl.arange(0, COLUMNS) < length)[None, :], shares, 0.0)
        slopes = shares * (tl.dot(grads, values.T, input_precision=PRECISION) - inner[:, None])
        total = tl.dot(slopes.to(keys.dtype), keys, total, input_precision=PRECISION)
    return total


@triton.jit
def _backward(
    query,
    key,
    value,
    text_key,  # or None
    text_value,
    output,  # [B, T, N, D], dense
    grad,
    log_sum,  # [B, N, T]
    grad_query,
    grad_key,
    grad_value,
    grad_text_key,
    grad_text_value,
    queries,
    text,
    heads,
    strides,
    text_strides,
    output_strides,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    text_tiles = tl.cdiv(text, COLUMNS)
    key_tiles = text_tiles + tl.cdiv(queries, COLUMNS)
    tiles = key_tiles + tl.cdiv(queries, ROWS)
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = pair // heads
    head = pair % heads
    log_sum += pair.to(tl.int64) * queries
    if tile >= key_tiles:
        first = (tile - key_tiles) * ROWS
        rows = first + tl.arange(0, ROWS)
        query_tile = load_tile(query, batch, head, first, queries, strides, D, ROWS, DIM, DESCRIPTORS)
        grads = load_tile(grad, batch, head, first, queries, output_strides, D, ROWS, DIM, DESCRIPTORS)
        outputs = load_tile(output, batch, head, first, queries, output_strides, D, ROWS, DIM, False)
        sums = tl.load(log_sum + rows, mask=rows < queries, other=float("inf")) * 1.4426950408889634
        inner = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
        total = tl.zeros([ROWS, DIM], tl.float32)
        if text_key is not None:
            total = _query_gradients(
                total, query_tile, grads, sums, inner, text_key, text_value, batch, head, text, text_strides,
                D, SCALE, EVEN, DESCRIPTORS, COLUMNS, DIM, PRECISION,
            )  # fmt: skip
        total = _query_gradients(
            total, query_tile, grads, sums, inner, key, value, batch, head, queries, strides,
            D, SCALE, EVEN, DESCRIPTORS, COLUMNS, DIM, PRECISION,
        )  # fmt: skip
        total = total * (SCALE * 0.6931471805599453)
        store_tile(grad_query, total, batch, head, first, queries, heads, D, ROWS, DIM)
    elif tile >= text_tiles:
        _key_gradients(
            query, key, value, output, grad, log_sum, grad_key, grad_value, batch, head,
            (tile - text_tiles) * COLUMNS, queries, queries, heads, strides, strides, output_strides,
            D, SCALE, DESCRIPTORS, ROWS, COLUMNS, DIM, PRECISION,
        )  # fmt: skip
    elif text_key is not None:
        _key_gradients(
            query, text_key, text_value, output, grad, log_sum, grad_text_key, grad_text_value, batch, head,
            tile * COLUMNS, queries, text, heads, strides, text_strides, output_strides,
            D, SCALE, DESCRIPTORS, ROWS, COLUMNS, DIM, PRECISION,
        )  # fmt: skip


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor | None,
    text_value: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
) -> _Gradients:
    """The op `attention_backward`: gradients of query, key, value, text_key, text_value."""
    if not serves(query):
        default = dispatch.default("attention_backward")
        plain: _Gradients = default(grad, query, key, value, text_key, text_value, output, log_sum)
        return plain
    operands = Operands.of(query, key, value, text_key, text_value)
    gradients = run(
        "attention_backward",
        query.device,
        8 * query.element_size(),
        operands.dim,
        lambda cut: _launch(operands, output.contiguous(), grad.contiguous(), log_sum.contiguous(), cut),
    )
    absent = [query.new_empty(0 if tensor is None else tensor.shape) for tensor in (text_key, text_value)]
    return (*gradients[:3], *(gradients[3:] or absent))


def _launch(
    operands: Operands, output: Tensor, grad: Tensor, log_sum: Tensor, cut: Configuration
) -> list[Tensor]:
    query = operands.image[0]
    batch, queries, heads, dim = query.shape
    text = operands.text[0].shape[1] if operands.text else 0
    gradients = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (*operands.image, *operands.text)
    ]
    # Products of float32 take their factors from registers: going through descriptors costs more of them.
    descriptors = operands.has_descriptors(grad) and query.dtype is not torch.float32

    def tiles(tensor: Tensor, rows: int) -> Any:
        return by_head(tensor, rows, operands.dim, descriptors)

    programs = (
        triton.cdiv(text, cut.columns) + triton.cdiv(queries, cut.columns) + triton.cdiv(queries, cut.rows)
    )
    _backward[(programs * batch * heads,)](
        tiles(query, cut.rows),
        *(tiles(tensor, cut.columns) for tensor in operands.image[1:]),
        *([tiles(tensor, cut.columns) for tensor in operands.text] or (None, None)),
        output,
        tiles(grad, cut.rows),
        log_sum,
        *gradients[:3],
        *(gradients[3:] or (None, None)),
        queries,
        text,
        heads,
        query.stride()[:3],
        operands.text[0].stride()[:3] if text else (0, 0, 0),
        output.stride()[:3],
        D=dim,
        SCALE=scale(dim),
        EVEN=operands.is_even(cut.columns),
        DESCRIPTORS=descriptors,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        DIM=operands.dim,
        PRECISION=precision(launch.architecture(query.device), query.dtype),
        **cut.options,
    )
    return gradients


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources: text and image, keys not a multiple of the tile."""
    return [_case(target, kind, dim) for kind, dim in CASES]


def _case(target: str, kind: str, dim: int) -> Case:
    cut = choose("attention_backward", target, int(kind[-2:]), padded(dim))
    dtype = next(dtype for dtype, name in DTYPES.items() if name == kind)
    descriptors = launch.number(target) >= 90 and dtype is not torch.float32
    rows, columns = (source(kind, size, dim, descriptors) for size in (cut.rows, cut.columns))
    signature: dict[str, str | tuple[str, ...]] = {"query": rows}
    signature |= dict.fromkeys(("key", "value", "text_key", "text_value"), columns)
    signature |= {"output": f"*{kind}:16", "grad": rows, "log_sum": "*fp32:16"}
    gradients = ("grad_query", "grad_key", "grad_value", "grad_text_key", "grad_text_value")
    signature |= dict.fromkeys(gradients, f"*{kind}:16")
    constants = {
        "D": dim,
        "SCALE": scale(dim),
        "EVEN": False,
        "DESCRIPTORS": descriptors,
        "ROWS": cut.rows,
        "COLUMNS": cut.columns,
        "DIM": padded(dim),
        "PRECISION": precision(target, dtype),
    }
    signature |= {"queries": "i32:16", "text": "i32:16", "heads": "i32"}
    signature |= dict.fromkeys(("strides", "text_strides", "output_strides"), ("i32:16",) * 3)
    signature |= dict.fromkeys(constants, "constexpr")
    return Case(f"attention_backward {kind} D={dim}", _backward, signature, constants, cut.warps, cut.stages)
