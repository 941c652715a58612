"""Sums over rows, of the parts that programs left of them: what a backward pass ends with, one launch.

Bytes: each part once, 4 a number. Parts are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch

# Rows and columns of what is compiled to be measured: attention's parts, of 64 pictures of 32x32 and 8x8.
CASES = ((1024, 1152), (64, 2304))


@triton.jit
def totals_kernel(
    parts, sums, rows, columns, COPIES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The sums of LANES columns, as often as they are wanted."""
    column = tl.program_id(0) * LANES + tl.arange(0, LANES)
    lanes = column < columns
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & lanes[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(parts + at, mask=there, other=0.0)
    result = tl.sum(total, axis=0).to(sums.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        tl.store(sums + copy * columns + column, result, mask=lanes)


def totals(parts: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    """The sums [copies, C] over the rows of parts [..., C], dense and float32; [0] for no copies."""
    if copies == 0:
        return parts.new_empty(0, dtype=dtype)
    sums = parts.new_empty((copies, parts.shape[-1]), dtype=dtype)
    cut = configurations.choose("column_sums", launch.architecture(parts.device), 32)
    _plan(parts, sums, cut).start()
    return sums


def _plan(parts: Tensor, sums: Tensor, cut: Configuration) -> Launch:
    copies, columns = sums.shape
    arguments = {
        "parts": parts, "sums": sums, "rows": parts.numel() // columns, "columns": columns, "COPIES": copies,
        "ROWS": cut.rows, "LANES": cut.columns,
    }  # fmt: skip
    return Launch(totals_kernel, triton.cdiv(columns, cut.columns), arguments, cut)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured."""
    cut = configurations.choose("column_sums", target, 32)
    for rows, columns in CASES:
        parts = torch.empty(rows, columns, device="meta")
        sums = torch.empty(1, columns, dtype=torch.bfloat16, device="meta")
        yield _plan(parts, sums, cut).case(f"column_sums {rows}x{columns}")
