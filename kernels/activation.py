"""GELU and QuickGELU behind a linear layer, and their gradients, one launch each.

    GELU: x times the normal distribution function      QuickGELU: x sigmoid(1.702 x)

cuBLAS adds the bias as it writes its product; the activation then reads and writes it once. All arithmetic is
float32. Bytes in 16 bits: 4 an element forward, 6 backward; memory is what limits. Backward, programs can
also leave the sums of what they write, which a second launch adds up: the gradient of the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import column_sums, configurations
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch, reference

GELU: Any = tl.constexpr(reference.ACTIVATION_GELU)
SLOPE: Any = tl.constexpr(reference.QUICK_GELU_SLOPE)
HALF_ROOT: Any = tl.constexpr(math.sqrt(0.5))
DENSITY: Any = tl.constexpr(1 / math.sqrt(2 * math.pi))
RUNS = 64  # of rows at most, where each leaves its sums


@triton.jit
def activation_kernel(x, y, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    if KIND == GELU:
        values *= 0.5 * (1.0 + tl.erf(values * HALF_ROOT))
    else:
        values *= tl.sigmoid(values * SLOPE)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=at < elements)


@triton.jit
def activation_backward_kernel(
    grad, x, dx, parts, rows, columns, run, blocks, KIND: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx = grad times the activation's slope at x, of some columns of a run of rows; their sums [runs, C]."""
    program = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    lanes = column < columns
    begin = program * run
    stop = tl.minimum(begin + run, rows)
    total = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(begin, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < stop)[:, None] & lanes[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        arriving = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        if KIND == GELU:
            density = tl.exp(-0.5 * values * values) * DENSITY
            slope = 0.5 * (1.0 + tl.erf(values * HALF_ROOT)) + values * density
        else:
            sigmoid = tl.sigmoid(values * SLOPE)
            slope = sigmoid * (1.0 + values * SLOPE * (1.0 - sigmoid))
        result = arriving * slope
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=there)
        if SUMS:
            total += result  # 0 behind the last row
    if SUMS:
        tl.store(parts + program * columns + column, tl.sum(total, axis=0), mask=lanes)


def activation(x: Tensor, kind: int) -> Tensor:
    """The op `activation`; float64 goes to the default."""
    if x.dtype is torch.float64:
        result: Tensor = dispatch.default("activation")(x, kind)
        return result
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        dense = x.contiguous()
        configurations.run(
            "activation", x.device, 8 * x.element_size(), 0,
            lambda each: _forward(dense, y, kind, each).start(),
        )  # fmt: skip
    return y


def _forward(x: Tensor, y: Tensor, kind: int, cut: Configuration) -> Launch:
    elements, block = x.numel(), cut.rows * cut.columns
    arguments = {"x": x, "y": y, "elements": elements, "KIND": kind, "BLOCK": block}
    return Launch(activation_kernel, triton.cdiv(elements, block), arguments, cut)


def activation_backward(grad: Tensor, x: Tensor, kind: int, sums: int = 0) -> tuple[Tensor, Tensor]:
    """The op `activation_backward`; float64 and what is empty go to the default."""
    if x.dtype is torch.float64 or x.numel() == 0:
        result: tuple[Tensor, Tensor] = dispatch.default("activation_backward")(grad, x, kind, sums)
        return result
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = grad.contiguous(), x.contiguous(), dx

    def start(cut: Configuration) -> Tensor:
        planned = _backward(*tensors, kind, sums > 0, cut)
        planned.start()
        parts: Tensor = planned.arguments["parts"]
        return parts

    parts = configurations.run("activation_backward", x.device, 8 * x.element_size(), 0, start)
    return dx, column_sums.totals(parts, sums, x.dtype)


def _backward(grad: Tensor, x: Tensor, dx: Tensor, kind: int, sums: bool, cut: Configuration) -> Launch:
    columns = x.shape[-1] if x.ndim else 1
    rows, blocks = x.numel() // columns, triton.cdiv(columns, cut.columns)
    run = cut.rows * (triton.cdiv(rows, RUNS * cut.rows) if sums else 1)
    runs = triton.cdiv(rows, run)
    parts = x.new_empty((runs if sums else 0, columns), dtype=torch.float32)
    arguments = {
        "grad": grad, "x": x, "dx": dx, "parts": parts, "rows": rows, "columns": columns, "run": run,
        "blocks": blocks, "KIND": kind, "SUMS": sums, "ROWS": cut.rows, "LANES": cut.columns,
    }  # fmt: skip
    return Launch(activation_backward_kernel, runs * blocks, arguments, cut)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: CLIP's hidden layer, in 16 bits."""
    x = torch.empty(154, 3072, dtype=torch.float16, device="meta")
    forward = configurations.choose("activation", target, 16)
    backward = configurations.choose("activation_backward", target, 16)
    for kind, name in ((reference.ACTIVATION_GELU, "gelu"), (reference.ACTIVATION_QUICK_GELU, "quick_gelu")):
        yield _forward(x, x, kind, forward).case(f"activation {name}")
        for sums, more in ((False, ""), (True, " and sums")):
            planned = _backward(x, x, x, kind, sums, backward)
            yield planned.case(f"activation {name} backward{more}")
