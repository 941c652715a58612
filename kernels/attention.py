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
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch

LARGEST_HEAD = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[str, int, int, int, int, int | None]
# Dtype, batch, queries, heads, head dimension and text of what is compiled to see its resources: GLIDE's base
# network in inference and training, odd lengths, the heads of Improved DDPM.
SHAPES: tuple[Shape, ...] = (
    ("fp16", 2, 1024, 6, 64, 128),
    ("bf16", 64, 1024, 6, 64, 128),
    ("fp16", 1, 197, 12, 32, 77),
    ("fp16", 2, 256, 4, 96, None),
    ("bf16", 2, 64, 4, 128, 77),
    ("fp32", 2, 1024, 6, 64, 128),
    ("fp32", 2, 70, 4, 128, 77),
)
_WARPGROUPS = (90, 100, 103)  # architectures whose matrix instructions four warps issue together
_MANY = 4 * 132 * 128  # queries: four tiles of 128 for every multiprocessor of an H100
_SMALLEST_TILE = 16  # that a matrix instruction takes


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
    target,  # pointer to [B, T, N, D], D dense
    tile,  # [ROWS, DIM]
    batch,
    head,
    start,
    length,
    strides,  # of batch, position and head
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Write a tile of one head, rounded once, up to `length` and D."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    at = target + batch.to(tl.int64) * strides[0] + head * strides[2]
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(
        at + rows[:, None] * strides[1] + columns[None, :], tile.to(target.dtype.element_ty), mask=inside
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
    dense = (queries * heads * D, heads * D, D)
    store_tile(output, total / weight[:, None], batch, head, first, queries, dense, D, ROWS, DIM)
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
        """Columns of a tile: the head dimension up to a power of two that a matrix instruction takes."""
        return max(_SMALLEST_TILE, triton.next_power_of_2(self.image[0].shape[3]))

    def take_descriptors(self, *more: Tensor) -> bool:
        """Whether these and more tensors can all be read by descriptors."""
        return launch.takes_descriptors(*self.image, *self.text, *more)

    def arguments(self, cut: Configuration, descriptors: bool) -> dict[str, Any]:
        """What both kernels are told of their operands: rows are queries, columns keys."""
        query, key, value = self.image
        text_key, text_value = self.text or (None, None)
        dim, lengths = query.shape[3], [tensors[0].shape[1] for tensors in (self.image, self.text) if tensors]

        def tiles(tensor: Tensor | None, rows: int) -> Any:
            return by_head(tensor, rows, self.dim) if descriptors and tensor is not None else tensor

        return {
            "query": tiles(query, cut.rows),
            "key": tiles(key, cut.columns),
            "value": tiles(value, cut.columns),
            "text_key": tiles(text_key, cut.columns),
            "text_value": tiles(text_value, cut.columns),
            "queries": query.shape[1],
            "text": 0 if text_key is None else text_key.shape[1],
            "heads": query.shape[2],
            "strides": query.stride()[:3],
            "text_strides": (0, 0, 0) if text_key is None else text_key.stride()[:3],
            "D": dim,
            "SCALE": dim**-0.5 * math.log2(math.e),
            "EVEN": all(length % cut.columns == 0 for length in lengths),
            "DESCRIPTORS": descriptors,
            "ROWS": cut.rows,
            "COLUMNS": cut.columns,
            "DIM": self.dim,
        }


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    strides = tensors[0].stride()
    if strides[3] == 1 and all(tensor.stride() == strides for tensor in tensors):
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def by_head(tensor: Tensor, rows: int, dim: int) -> Any:
    """A descriptor of [B, N, T, D] in tiles of one head's positions, for `load_tile`."""
    return launch.descriptor(tensor.transpose(1, 2), (1, 1, rows, dim))


def precision(architecture: str, dtype: torch.dtype) -> str:
    """How products of float32 are computed: three of TF32 are as exact as one; AMD has them in float32."""
    return "tf32x3" if dtype is torch.float32 and launch.number(architecture) else "ieee"


def serves(query: Tensor) -> bool:
    """Whether the kernels compute in this dtype and head dimension, and there is anything to compute."""
    return query.dtype in DTYPES.values() and query.shape[3] <= LARGEST_HEAD and query.numel() > 0


def attention(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor | None, text_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op `attention`: output [B, T, N, D], logarithm of the softmax's sum [B, N, T]."""
    if not serves(query):
        plain: tuple[Tensor, Tensor] = dispatch.default("attention")(query, key, value, text_key, text_value)
        return plain
    operands = Operands.of(query, key, value, text_key, text_value)
    architecture = launch.architecture(query.device)

    def start(cut: Configuration) -> tuple[Tensor, Tensor]:
        planned = plan(operands, cut, architecture)
        planned.start()
        return planned.arguments["output"], planned.arguments["log_sum"]

    return run(_row(query, architecture), query.device, 8 * query.element_size(), operands.dim, start)


def _row(query: Tensor, architecture: str) -> str:
    """The kernel's name in the table: two warpgroups share keys and values where queries are many."""
    shared = launch.number(architecture) in _WARPGROUPS and query.element_size() == 2
    batch, queries, heads, _ = query.shape
    return "attention_of_many" if shared and batch * heads * queries >= _MANY else "attention"


def plan(operands: Operands, cut: Configuration, architecture: str) -> Launch:
    """The launch, with the memory of its results `output` and `log_sum`."""
    query = operands.image[0]
    batch, queries, heads, _ = query.shape
    descriptors = launch.number(architecture) >= 90 and operands.take_descriptors()
    arguments = operands.arguments(cut, descriptors) | {
        "output": torch.empty_like(query, memory_format=torch.contiguous_format),
        "log_sum": query.new_empty((batch, heads, queries), dtype=torch.float32),
        "PRECISION": precision(architecture, query.dtype),
    }
    return Launch(_forward, triton.cdiv(queries, cut.rows) * batch * heads, arguments, cut)


def case_inputs(shape: Shape) -> list[Tensor | None]:
    """Inputs without memory of one of SHAPES, laid out as the networks' projections are."""
    kind, batch, queries, heads, dim, text = shape

    def views(length: int, parts: int) -> tuple[Tensor, ...]:
        product = torch.empty(batch, length, heads, parts, dim, dtype=DTYPES[kind], device="meta")
        return product.unbind(3)

    return [*views(queries, 3), *(views(text, 2) if text else (None, None))]


def case_name(op: str, shape: Shape) -> str:
    """Name of a case in reports."""
    kind, batch, queries, heads, dim, text = shape
    return f"{op} {kind} {batch}x{queries}x{heads}x{dim} text {text}"


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources."""
    found = []
    for shape in SHAPES:
        operands = Operands.of(*case_inputs(shape))
        query = operands.image[0]
        cut = choose(_row(query, target), target, 8 * query.element_size(), operands.dim)
        found.append(plan(operands, cut, target).case(case_name("attention", shape)))
    return found
