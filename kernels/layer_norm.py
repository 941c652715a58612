"""LayerNorm over the last dimension, forward in one launch, backward in one or two.

A program holds whole rows in registers and takes their variance in two passes over them. In the backward
pass each program also sums what its rows give to weight and bias, and if asked the rows that it writes, and a
second kernel puts those sums together, in a fixed order: there are no atomics. All arithmetic is float32.

Bytes in 16 bits: 4 an element forward (read, write), 6 backward (x and the gradient read, dx written); 2 more
with a summand, which is another path's gradient of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch, start
from glide_fast.ops import dispatch

WIDEST = 16384  # channels that a program holds
PROGRAMS = 256  # that share the rows of a backward pass: each leaves one row of sums
# Rows and channels of what is compiled to be measured: GLIDE's text, CLIP's text and pictures.
CASES = ((256, 512), (154, 768), (514, 1024), (4096, 2048))


@triton.jit
def layer_norm_kernel(
    x, weight, bias, y, mean, rstd, x_row, rows, channels, eps, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Normalise ROWS rows; write their mean and 1/deviation."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, LANES)
    lanes = channel < channels
    there = (row < rows)[:, None] & lanes[None, :]
    wide_row = row.to(tl.int64)[:, None]
    tile = tl.load(x + wide_row * x_row + channel[None, :], mask=there, other=0.0).to(tl.float32)
    row_mean = tl.sum(tile, axis=1) / channels
    deviation = tl.where(there, tile - row_mean[:, None], 0.0)
    row_rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=1) / channels + eps)
    gain = tl.load(weight + channel, mask=lanes, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=lanes, other=0.0).to(tl.float32)
    result = deviation * row_rstd[:, None] * gain[None, :] + offset[None, :]
    tl.store(y + wide_row * channels + channel[None, :], result.to(y.dtype.element_ty), mask=there)
    tl.store(mean + row, row_mean, mask=row < rows)
    tl.store(rstd + row, row_rstd, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    grad, x, weight, mean, rstd, summand, dx, sums, plane, grad_row, x_row, summand_row, rows, channels,
    programs, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, SUMMAND: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx of every `programs`-th block of rows; sums [planes, programs, C] for weight, bias and of dx."""
    program = tl.program_id(0)
    channel = tl.arange(0, LANES)
    lanes = channel < channels
    gain = tl.load(weight + channel, mask=lanes, other=0.0).to(tl.float32)
    weight_sums = tl.zeros([ROWS, LANES], tl.float32)
    bias_sums = tl.zeros([ROWS, LANES], tl.float32)
    dx_sums = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        there = inside[:, None] & lanes[None, :]
        wide_row = row.to(tl.int64)[:, None]
        tile = tl.load(x + wide_row * x_row + channel[None, :], mask=there, other=0.0).to(tl.float32)
        arriving = tl.load(grad + wide_row * grad_row + channel[None, :], mask=there, other=0.0).to(
            tl.float32
        )
        row_mean = tl.load(mean + row, mask=inside, other=0.0)
        row_rstd = tl.load(rstd + row, mask=inside, other=0.0)
        normal = tl.where(there, (tile - row_mean[:, None]) * row_rstd[:, None], 0.0)
        if NEEDS_WEIGHT:
            weight_sums += arriving * normal
            bias_sums += arriving
        if NEEDS_X:
            inner = arriving * gain[None, :]
            share = tl.sum(inner, axis=1) / channels
            slope = tl.sum(inner * normal, axis=1) / channels
            result = (inner - share[:, None] - normal * slope[:, None]) * row_rstd[:, None]
            if SUMMAND:
                near = summand + wide_row * summand_row + channel[None, :]
                result += tl.load(near, mask=there, other=0.0).to(tl.float32)
            tl.store(dx + wide_row * channels + channel[None, :], result.to(dx.dtype.element_ty), mask=there)
            if COPIES:
                dx_sums += result  # 0 in rows behind the last
    at = sums + program * channels + channel
    if NEEDS_WEIGHT:
        tl.store(at, tl.sum(weight_sums, axis=0), mask=lanes)
        tl.store(at + plane, tl.sum(bias_sums, axis=0), mask=lanes)
    if COPIES:
        tl.store(at + 2 * NEEDS_WEIGHT * plane, tl.sum(dx_sums, axis=0), mask=lanes)


@triton.jit
def parameters_kernel(
    sums, plane, grad_weight, grad_bias, columns, programs, channels, NEEDS_WEIGHT: tl.constexpr,
    COPIES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The sums of LANES channels over all programs; those of dx as often as they are wanted."""
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    lanes = channel < channels
    weight_sums = tl.zeros([ROWS, LANES], tl.float32)
    bias_sums = tl.zeros([ROWS, LANES], tl.float32)
    dx_sums = tl.zeros([ROWS, LANES], tl.float32)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)
        there = (program < programs)[:, None] & lanes[None, :]
        at = sums + program[:, None] * channels + channel[None, :]
        if NEEDS_WEIGHT:
            weight_sums += tl.load(at, mask=there, other=0.0)
            bias_sums += tl.load(at + plane, mask=there, other=0.0)
        if COPIES:
            dx_sums += tl.load(at + 2 * NEEDS_WEIGHT * plane, mask=there, other=0.0)
    if NEEDS_WEIGHT:
        weight_total, bias_total = tl.sum(weight_sums, axis=0), tl.sum(bias_sums, axis=0)
        tl.store(grad_weight + channel, weight_total.to(grad_weight.dtype.element_ty), mask=lanes)
        tl.store(grad_bias + channel, bias_total.to(grad_bias.dtype.element_ty), mask=lanes)
    dx_total = tl.sum(dx_sums, axis=0).to(columns.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        tl.store(columns + copy * channels + channel, dx_total, mask=lanes)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op `layer_norm`; what the kernels do not cover goes to the default."""
    if not _covered(x, weight):
        result: tuple[Tensor, Tensor, Tensor] = dispatch.default("layer_norm")(x, weight, bias, eps)
        return result
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if y.numel() > 0:
        configurations.run(
            "layer_norm", x.device, 8 * x.element_size(), x.shape[-1],
            lambda each: _forward(x, weight, bias, eps, y, mean, rstd, each).start(),
        )  # fmt: skip
    return y, mean, rstd


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor, mean: Tensor, rstd: Tensor,
    configuration: Configuration,
) -> Launch:  # fmt: skip
    flat = _rows(x)
    rows, channels = flat.shape
    lanes = triton.next_power_of_2(channels)
    each = max(configuration.rows * configuration.columns // lanes, 1)
    arguments = {
        "x": flat, "weight": weight.contiguous(), "bias": bias.contiguous(), "y": y, "mean": mean,
        "rstd": rstd, "x_row": flat.stride(0), "rows": rows, "channels": channels, "eps": eps, "ROWS": each,
        "LANES": lanes,
    }  # fmt: skip
    return Launch(layer_norm_kernel, triton.cdiv(rows, each), arguments, configuration)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs_x: bool, needs_weight: bool,
    summand: Tensor | None = None, sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op `layer_norm_backward`; what the kernels do not cover goes to the default."""
    if not _covered(x, weight):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.default("layer_norm_backward")(
            grad, x, weight, mean, rstd, needs_x, needs_weight, summand, sums
        )
        return result
    dx = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    fresh = torch.empty if x.numel() > 0 else torch.zeros
    parameters = weight.shape if needs_weight else 0
    grad_weight, grad_bias = (fresh(parameters, dtype=weight.dtype, device=x.device) for _ in range(2))
    columns = fresh((sums, x.shape[-1]) if sums and needs_x else 0, dtype=x.dtype, device=x.device)
    if x.numel() > 0 and (needs_x or needs_weight):
        results = dx, grad_weight, grad_bias, columns
        configurations.run(
            "layer_norm_backward", x.device, 8 * x.element_size(), x.shape[-1],
            lambda each: start(_backward(grad, x, weight, mean, rstd, summand, results, each)),
        )  # fmt: skip
    return dx, grad_weight, grad_bias, columns


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, summand: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor, Tensor], configuration: Configuration,
) -> list[Launch]:  # fmt: skip
    dx, grad_weight, grad_bias, columns = results
    arriving, flat = _rows(grad), _rows(x)
    added = flat if summand is None else _rows(summand)
    rows, channels = flat.shape
    lanes = triton.next_power_of_2(channels)
    each = max(configuration.rows * configuration.columns // lanes, 1)
    needs_x, needs_weight, copies = dx.numel() > 0, grad_weight.numel() > 0, columns.numel() // channels
    programs = min(triton.cdiv(rows, each), PROGRAMS)
    planes = 2 * needs_weight + (copies > 0)
    sums = torch.empty(planes, programs, channels, dtype=torch.float32, device=x.device)
    arguments: dict[str, Any] = {
        "grad": arriving, "x": flat, "weight": weight.contiguous(), "mean": mean.contiguous(),
        "rstd": rstd.contiguous(), "summand": added, "dx": dx, "sums": sums, "plane": programs * channels,
        "grad_row": arriving.stride(0), "x_row": flat.stride(0), "summand_row": added.stride(0),
        "rows": rows, "channels": channels, "programs": programs, "NEEDS_X": needs_x,
        "NEEDS_WEIGHT": needs_weight, "SUMMAND": summand is not None, "COPIES": copies, "ROWS": each,
        "LANES": lanes,
    }  # fmt: skip
    first = Launch(layer_norm_backward_kernel, programs, arguments, configuration)
    if planes == 0:
        return [first]
    cut = configurations.choose("layer_norm_parameters", launch.architecture(x.device), 32)
    parameters: dict[str, Any] = {"grad_weight": grad_weight, "grad_bias": grad_bias, "columns": columns}
    parameters |= {"ROWS": cut.rows, "LANES": cut.columns}
    blocks = triton.cdiv(channels, cut.columns)
    return [first, Launch(parameters_kernel, blocks, {**arguments, **parameters}, cut)]


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with dense rows; a copy only where strides leave no other way."""
    return launch.dense_last(x.reshape(-1, x.shape[-1]))


def _covered(x: Tensor, weight: Tensor) -> bool:
    wide = torch.float64 in (x.dtype, weight.dtype)
    return not wide and x.shape[-1] <= WIDEST


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: the models' tokens, in 16 bits, with float32 parameters."""
    for rows, channels in CASES:
        x = torch.empty(rows, channels, dtype=torch.float16, device="meta")
        weight, bias = torch.empty(2, channels, device="meta")
        mean, rstd = torch.empty(2, rows, device="meta")
        name = f"{rows}x{channels}"
        forward = configurations.choose("layer_norm", target, 16, channels)
        launched = _forward(x, weight, bias, 1e-5, x, mean, rstd, forward)
        yield launched.case(f"layer_norm forward {name}")
        configuration = configurations.choose("layer_norm_backward", target, 16, channels)
        for copies, sums in ((0, ""), (2, " and sums")):
            results = x, weight, bias, x[:copies]
            backward = _backward(x, x, weight, mean, rstd, x, results, configuration)
            yield from (
                each.case(f"layer_norm {part}{sums} {name}")
                for each, part in zip(backward, ("backward", "parameters"), strict=True)
            )
