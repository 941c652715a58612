"""The gradients of attention in one launch, text included: nothing is added up across programs.

    p = exp(score - log_sum),   dv = p^T dy,   dp = dy v^T,   ds = p (dp - Σ dy y),   dq = ds k,   dk = ds^T q

Some programs own a tile of keys and values, of the text or the image, and go through all queries; the others
own a tile of queries and go through all keys. Scores are computed twice, for which there are no atomics, no
second launch and the same bits every time. The sums Σ dy y are made where they are needed.

If that is asked for, each program also leaves the sum over its rows, and a second launch adds these up: the
gradient of the bias of the layer that projected queries, keys and values.

Memory: e B N D (5 T + 2 S) bytes read and e B N D (3 T + 2 S) written, what is looped over again from L2.
Work: 14 B N T (S + T) D FLOP, 10 of which a pass with atomics would need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import column_sums, launch
from glide_fast.kernels.attention import (
    SHAPES,
    Operands,
    by_head,
    case_inputs,
    case_name,
    load_tile,
    precision,
    serves,
    store_tile,
)
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration, choose, kin, run
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch
from glide_fast.ops.projected_attention import views_of

GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_text_key", "grad_text_value")
SUMS = ("sum_query", "sum_key", "sum_value")
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Result = TypeVar("_Result")


@triton.jit
def _store_sums(
    target,  # [B, places, N, D], float32
    tile,  # [ROWS, DIM], zero where there is nothing
    batch,
    head,
    place,  # of the tile among `tiles`
    tiles,
    places,  # as many as there are tiles, or more
    strides,  # of batch, place and head
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """Leave the sum over a tile's rows in its place, and zeros in those that no tile of its kind has."""
    columns = tl.arange(0, DIM)
    at = target + batch.to(tl.int64) * strides[0] + head * strides[2] + columns
    tl.store(at + place * strides[1], tl.sum(tile, 0), mask=columns < D)
    for vacant in range(place + tiles, places, tiles):
        tl.store(at + vacant * strides[1], tl.zeros([DIM], tl.float32), mask=columns < D)


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
    sum_key,  # or None
    sum_value,
    batch,
    head,
    first,  # key of the tile
    queries,
    length,
    query_strides,
    strides,
    output_strides,
    grad_strides,
    sum_strides,
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
    store_tile(grad_key, key_total, batch, head, first, length, grad_strides, D, COLUMNS, DIM)
    store_tile(grad_value, value_total, batch, head, first, length, grad_strides, D, COLUMNS, DIM)
    if sum_key is not None:
        inside = (first + tl.arange(0, COLUMNS) < length)[:, None]
        place, tiles, places = first // COLUMNS, tl.cdiv(length, COLUMNS), tl.cdiv(length, min(ROWS, COLUMNS))
        key_total = tl.where(inside, key_total, 0.0)
        _store_sums(sum_key, key_total, batch, head, place, tiles, places, sum_strides, D, DIM)
        value_total = tl.where(inside, value_total, 0.0)
        _store_sums(sum_value, value_total, batch, head, place, tiles, places, sum_strides, D, DIM)


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
    sum_query,  # [B, places, N, D], the tiles' sums over their rows, or None
    sum_key,
    sum_value,
    queries,
    text,
    heads,
    strides,
    text_strides,
    output_strides,
    grad_strides,
    grad_text_strides,
    sum_strides,
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
        store_tile(grad_query, total, batch, head, first, queries, grad_strides, D, ROWS, DIM)
        if sum_query is not None:  # of queries behind the last one, gradients are zero
            _store_sums(
                sum_query, total, batch, head, tile - key_tiles, tiles - key_tiles,
                tl.cdiv(queries, min(ROWS, COLUMNS)), sum_strides, D, DIM,
            )  # fmt: skip
    elif tile >= text_tiles:
        _key_gradients(
            query, key, value, output, grad, log_sum, grad_key, grad_value, sum_key, sum_value, batch, head,
            (tile - text_tiles) * COLUMNS, queries, queries, strides, strides, output_strides, grad_strides,
            sum_strides, D, SCALE, DESCRIPTORS, ROWS, COLUMNS, DIM, PRECISION,
        )  # fmt: skip
    elif text_key is not None:
        _key_gradients(
            query, text_key, text_value, output, grad, log_sum, grad_text_key, grad_text_value, None, None,
            batch, head, tile * COLUMNS, queries, text, strides, text_strides, output_strides,
            grad_text_strides, sum_strides, D, SCALE, DESCRIPTORS, ROWS, COLUMNS, DIM, PRECISION,
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
    saved = output.contiguous(), grad.contiguous(), log_sum.contiguous()

    def start(cut: Configuration) -> list[Tensor]:
        given = operands.image + operands.text
        gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in given]
        plan(operands, saved, gradients, (), cut, launch.architecture(query.device)).start()
        return gradients

    found = _run(operands, start)
    absent = [query.new_empty(0 if tensor is None else tensor.shape) for tensor in (text_key, text_value)]
    return (*found[:3], *(found[3:] or absent))


def projected_attention_backward(
    grad: Tensor,
    projection: Tensor,  # [B, T, 3·N·D]
    text: Tensor | None,  # [B, S, 2·N·D]
    output: Tensor,
    log_sum: Tensor,
    heads: int,
    by_head: bool,
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `projected_attention_backward`: each part of a gradient is written where it lies."""
    if not serves(output):
        default = dispatch.default("projected_attention_backward")
        plain: tuple[Tensor, Tensor, Tensor] = default(
            grad, projection, text, output, log_sum, heads, by_head, sums
        )
        return plain
    grad_projection = projection.new_empty(projection.shape)
    grad_text = projection.new_empty(0 if text is None else text.shape)
    operands = Operands.of(*views_of(projection, text, heads, by_head))
    saved = output.contiguous(), grad.contiguous(), log_sum.contiguous()
    targets = views_of(grad_projection, None if text is None else grad_text, heads, by_head)
    gradients = [each for each in targets if each is not None][: len(operands.image + operands.text)]

    def start(cut: Configuration) -> Tensor:
        places = triton.cdiv(projection.shape[1], min(cut.rows, cut.columns)) if sums else 0
        parts = projection.new_empty((len(projection), places, projection.shape[2]), dtype=torch.float32)
        parts_of = views_of(parts, None, heads, by_head)[:3] if sums else ()
        plan(operands, saved, gradients, parts_of, cut, launch.architecture(output.device)).start()
        return parts

    return grad_projection, grad_text, column_sums.totals(_run(operands, start), sums, projection.dtype)


def _run(operands: Operands, start: Callable[[Configuration], _Result]) -> _Result:
    query = operands.image[0]
    return run("attention_backward", query.device, 8 * query.element_size(), operands.dim, start)


def plan(
    operands: Operands,
    saved: tuple[Tensor, Tensor, Tensor],
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    cut: Configuration,
    architecture: str,
) -> Launch:
    """The launch; saved are output, its gradient and log_sum, all dense, gradients alike as operands are.

    Sums are views [B, places, N, D] for queries, keys and values, alike too, or none.
    """
    output, grad, log_sum = saved
    batch, queries, heads, _ = output.shape
    # Products of float32 take their factors from registers: going through descriptors costs more of them.
    descriptors = (
        launch.number(architecture) >= 90
        and grad.dtype is not torch.float32
        and operands.take_descriptors(grad)
    )
    arguments = operands.arguments(cut, descriptors) | {
        "output": output,
        "grad": by_head(grad, cut.rows, operands.dim) if descriptors else grad,
        "log_sum": log_sum,
        "output_strides": output.stride()[:3],
        # On a desktop's GPU float32 is as fast as TF32, and here it needs fewer registers than three of them.
        "PRECISION": "ieee" if kin(architecture) == "sm_120" else precision(architecture, grad.dtype),
    }
    arguments |= dict.fromkeys(GRADIENTS) | dict(zip(GRADIENTS, gradients, strict=False))
    arguments |= dict.fromkeys(SUMS) | dict(zip(SUMS, sums, strict=False))
    arguments["sum_strides"] = sums[0].stride()[:3] if sums else (0, 0, 0)
    arguments["grad_strides"] = gradients[0].stride()[:3]
    arguments["grad_text_strides"] = gradients[-1].stride()[:3]
    key_tiles = triton.cdiv(arguments["text"], cut.columns) + triton.cdiv(queries, cut.columns)
    return Launch(_backward, (key_tiles + triton.cdiv(queries, cut.rows)) * batch * heads, arguments, cut)


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources."""
    found = []
    for shape in SHAPES:
        operands = Operands.of(*case_inputs(shape))
        query = operands.image[0]
        dense = query.contiguous()
        saved = dense, dense, dense.new_empty((query.shape[0], *query.shape[2:0:-1]), dtype=torch.float32)
        cut = choose("attention_backward", target, 8 * query.element_size(), operands.dim)
        gradients = [each.contiguous() for each in operands.image + operands.text]
        batch, queries, heads, dim = query.shape
        places = triton.cdiv(queries, min(cut.rows, cut.columns))
        parts = query.new_empty((batch, places, heads, 3, dim), dtype=torch.float32).unbind(3)
        name = case_name("attention_backward", shape)
        found.append(plan(operands, saved, gradients, (), cut, target).case(name))
        found.append(plan(operands, saved, gradients, parts, cut, target).case(f"{name} and sums"))
    return found
