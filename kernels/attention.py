"""U-Net attention on a GPU: one pass over the text's keys, then the image's, with a running softmax.

    y = softmax(query [text_key, key]^T / sqrt(D)) [text_value, value]

A program owns a tile of queries of one head and reads keys and values tile by tile, so that scores never
leave the chip (Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691). Queries, keys and values
stay where their projections wrote them: views with strides of one product, the text's of another; nothing is
joined. From sm_90 on host tensor descriptors read them, elsewhere and where strides do not fit, pointers.

Memory: e B N D (2 T + 2 (S + T)) bytes at e bytes an element, keys and values once from DRAM and again from
L2 for every tile of queries, and 4 B N T for log_sum. Work: 4 B N T (S + T) D FLOP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import launch
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration, choose, run
from glide_fast.ops import dispatch

LARGEST_HEAD = 128
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = (("fp16", 32), ("fp16", 64), ("fp16", 96), ("bf16", 128), ("fp32", 64), ("fp32", 128))
_SMALLEST_TILE = 16  # that a matrix instruction takes
_LOG2_E = math.log2(math.e)


@triton.jit
def load_tile(
    source,  # descriptor of [B, N, T, D], or pointer to [B, T, N, D]
    batch,
    head,
    start,
    length,
    strides,  # of batch, position and head
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Positions from `start` of one head, [ROWS, DIM]; zero behind `length` and behind D."""
    if DESCRIPTORS:
        tile = source.load([batch, head, start, 0]).reshape([ROWS, DIM])
    else:
        rows = start + tl.arange(0, ROWS)
        columns = tl.arange(0, DIM)
        at = source + batch.to(tl.int64) * strides[0] + head * strides[2]
        inside = (rows < length)[:, None] & (columns < D)[None, :]
        tile = tl.load(at + rows[:, None] * strides[1] + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    target,  # pointer to [B, T, N, D], dense
    tile,  # [ROWS, DIM]
    batch,
    head,
    start,
    length,
    heads,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write a tile of one head, rounded once, up to `length` and D."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    at = target + (batch.to(tl.int64) * length * heads + head) * D
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(
        at + rows[:, None] * (heads * D) + columns[None, :], tile.to(target.dtype.element_ty), mask=inside
    )


@triton.jit
def _attend(
    total,  # [ROWS, DIM], sum of the values seen so far, times exp2(-largest)
    largest,  # [ROWS], of the scores seen so far, in units of log 2
    weight,  # [ROWS], sum of their exp2(score - largest)
    query_tile,  # [ROWS, DIM]
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
    """Let a tile of queries see all keys and values of one source."""
    for start in range(0, length, COLUMNS):
        keys = load_tile(key, batch, head, start, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
        scores = tl.dot(query_tile, keys.T, input_precision=PRECISION)
        if not EVEN:
            inside = start + tl.arange(0, COLUMNS) < length
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        shares = tl.exp2(scores * SCALE - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        weight = weight * shrink + tl.sum(shares, 1)
        total = total * shrink[:, None]
        values = load_tile(value, batch, head, start, length, strides, D, COLUMNS, DIM, DESCRIPTORS)
        total = tl.dot(shares.to(values.dtype), values, total, input_precision=PRECISION)
        largest = new_largest
    return total, largest, weight


@triton.jit
def _forward(
    query,
    key,
    value,
    text_key,  # or None
    text_value,
    output,  # [B, T, N, D]
    log_sum,  # [B, N, T]
    queries,
    text,
    heads,
    strides,
    text_strides,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(queries, ROWS)
    pair = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * ROWS
    batch = pair // heads
    head = pair % heads
    query_tile = load_tile(query, batch, head, first, queries, strides, D, ROWS, DIM, DESCRIPTORS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    if text_key is not None:
        total, largest, weight = _attend(
            total, largest, weight, query_tile, text_key, text_value, batch, head, text, text_strides,
            D, SCALE, EVEN, DESCRIPTORS, COLUMNS, DIM, PRECISION,
        )  # fmt: skip
    total, largest, weight = _attend(
        total, largest, weight, query_tile, key, value, batch, head, queries, strides,
        D, SCALE, EVEN, DESCRIPTORS, COLUMNS, DIM, PRECISION,
    )  # fmt: skip
    store_tile(output, total / weight[:, None], batch, head, first, queries, heads, D, ROWS, DIM)
    rows = first + tl.arange(0, ROWS)
    natural = (largest + tl.log2(weight)) * 0.6931471805599453
    tl.store(log_sum + pair.to(tl.int64) * queries + rows, natural, mask=rows < queries)


@dataclass(frozen=True)
class Operands:
    """The inputs of an attention as the kernels read them: views of one layout, the text's of another."""

    image: tuple[Tensor, ...]  # query, key, value: [B, T, N, D], of the same strides, D dense
    text: tuple[Tensor, ...]  # text_key, text_value: likewise; empty where there is no text

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
    ) -> Operands:
        """Take the op's inputs as they are where their strides agree, and copy them where not."""
        text: tuple[Tensor, ...] = ()
        if text_key is not None and text_value is not None and text_key.numel() > 0:
            text = _alike(text_key, text_value)
        return cls(_alike(query, key, value), text)

    @property
    def dim(self) -> int:
        """Columns of a tile: the head dimension up to a power of two."""
        return padded(self.image[0].shape[3])

    def has_descriptors(self, *more: Tensor) -> bool:
        """Whether these and more tensors can all be read by descriptors."""
        return launch.takes_descriptors(*self.image, *self.text, *more)

    def is_even(self, columns: int) -> bool:
        """Whether tiles of so many keys leave no rest."""
        lengths = [tensors[0].shape[1] for tensors in (self.image, self.text) if tensors]
        return all(length % columns == 0 for length in lengths)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    strides = tensors[0].stride()
    if strides[3] == 1 and all(tensor.stride() == strides for tensor in tensors):
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def padded(dim: int) -> int:
    """The head dimension up to the next power of two that a matrix instruction takes."""
    return max(_SMALLEST_TILE, triton.next_power_of_2(dim))


def by_head(tensor: Tensor, rows: int, dim: int, descriptors: bool) -> Any:
    """What `load_tile` reads: a descriptor of [B, N, T, D] in tiles, or the tensor itself."""
    return launch.descriptor(tensor.transpose(1, 2), (1, 1, rows, dim)) if descriptors else tensor


def scale(dim: int) -> float:
    """Scores are multiplied by this before exp2."""
    return dim**-0.5 * _LOG2_E


def precision(architecture: str, dtype: torch.dtype) -> str:
    """How products of float32 are computed: three of TF32 are as exact as one; AMD has them in float32."""
    return "tf32x3" if dtype is torch.float32 and launch.number(architecture) else "ieee"


def serves(query: Tensor) -> bool:
    """Whether the kernels compute in this dtype and head dimension, and there is anything to compute."""
    return query.dtype in DTYPES and query.shape[3] <= LARGEST_HEAD and query.numel() > 0


def attention(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op `attention`: output [B, T, N, D], logarithm of the softmax's sum [B, N, T]."""
    if not serves(query):
        plain: tuple[Tensor, Tensor] = dispatch.default("attention")(query, key, value, text_key, text_value)
        return plain
    operands = Operands.of(query, key, value, text_key, text_value)
    bits = 8 * query.element_size()
    return run("attention", query.device, bits, operands.dim, lambda cut: _launch(operands, cut))


def _launch(operands: Operands, cut: Configuration) -> tuple[Tensor, Tensor]:
    query = operands.image[0]
    batch, queries, heads, dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    log_sum = query.new_empty((batch, heads, queries), dtype=torch.float32)
    descriptors = operands.has_descriptors()
    image = [
        by_head(tensor, rows, operands.dim, descriptors)
        for tensor, rows in zip(operands.image, (cut.rows, cut.columns, cut.columns), strict=True)
    ]
    text = [by_head(tensor, cut.columns, operands.dim, descriptors) for tensor in operands.text]
    _forward[(triton.cdiv(queries, cut.rows) * batch * heads,)](
        *image,
        *(text or (None, None)),
        output,
        log_sum,
        queries,
        operands.text[0].shape[1] if text else 0,
        heads,
        query.stride()[:3],
        operands.text[0].stride()[:3] if text else (0, 0, 0),
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
    return output, log_sum


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources: text and image, keys not a multiple of the tile."""
    return [_case(target, kind, dim, launch.number(target) >= 90) for kind, dim in CASES]


def _case(target: str, kind: str, dim: int, descriptors: bool) -> Case:
    bits = int(kind[-2:])
    cut = choose("attention", target, bits, padded(dim))
    dtype = next(dtype for dtype, name in DTYPES.items() if name == kind)
    signature: dict[str, str | tuple[str, ...]] = {"query": source(kind, cut.rows, dim, descriptors)}
    for name in ("key", "value", "text_key", "text_value"):
        signature[name] = source(kind, cut.columns, dim, descriptors)
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
    signature |= {"output": f"*{kind}:16", "log_sum": "*fp32:16", "queries": "i32:16", "text": "i32:16"}
    signature |= {"heads": "i32", "strides": ("i32:16",) * 3, "text_strides": ("i32:16",) * 3}
    signature |= dict.fromkeys(constants, "constexpr")
    return Case(f"attention {kind} D={dim}", _forward, signature, constants, cut.warps, cut.stages)


def source(kind: str, rows: int, dim: int, descriptors: bool) -> str:
    """The type of what `load_tile` reads, in a case's signature."""
    return f"tensordesc<{kind}[1,1,{rows},{padded(dim)}]>" if descriptors else f"*{kind}:16"
