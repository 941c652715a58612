"""A linear layer over one or two inputs side by side, with bias, activation and residual in its epilogue.

    y = activation([x, second] weight^T + bias) + residual

Rows are the pixels of maps of height one, whose moments are left for the norm behind a large one. Tiles come
by descriptors where there are any, else by pointers. As in a convolution, the tile's product is kept
transposed, channels by rows. Gradients are products without an epilogue, which cuBLAS computes.

FLOP: 2 · rows · (C + S) · K. Bytes at least: inputs, weight, residual and output once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch, moments, product
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import start
from glide_fast.kernels.product import Ending, Moments, Plan, finish, share, store_part
from glide_fast.ops import chosen, dispatch

FEWEST_ROWS = 64  # half a tile; below, a product is read from memory alone, and cuBLAS is better at that


@triton.jit
def load_rows(
    x,  # [rows, C], a descriptor or a pointer
    first_row,
    start,
    rows,
    depth,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Elements start to start + DEPTH of ROWS rows, zero outside."""
    if DESCRIPTORS:
        tile = x.load([first_row, start])
    else:
        row = tl.arange(0, ROWS)
        element = start + tl.arange(0, DEPTH)
        mask = (first_row + row < rows)[:, None] & (element < depth)[None]
        x += first_row.to(tl.int64) * depth
        tile = tl.load(x + row[:, None] * depth + element[None], mask=mask, other=0.0)
    return tile


@triton.jit
def load_weight(
    weight,  # [K, C + S], a descriptor or a pointer
    first_channel,
    start,
    stop,
    channels,
    depth,
    DESCRIPTORS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Columns start to start + DEPTH of CHANNELS rows; descriptors read beyond ``stop``, where x is zero."""
    if DESCRIPTORS:
        tile = weight.load([first_channel, start])
    else:
        channel = first_channel + tl.arange(0, CHANNELS)
        element = start + tl.arange(0, DEPTH)
        mask = (channel < channels)[:, None] & (element < stop)[None]
        tile = tl.load(weight + channel[:, None] * depth + element[None], mask=mask, other=0.0)
    return tile


@triton.jit
def linear_kernel(
    x,  # [rows, C], a descriptor or a pointer, as all three are
    second,  # [rows, S]
    weight,  # [K, C + S]
    bias,
    residual,
    output,  # [rows, K]
    means,
    squares,
    parts,  # [splits, rows, K] float32, where SPLIT
    batch,
    height,
    width,  # a picture's rows: a multiple of the tile's, or all there are
    depth,  # C
    second_depth,  # S
    channels,  # K
    bias_stride,
    tiles_high,
    tiles_wide,
    splits,
    DESCRIPTORS: tl.constexpr,
    SECOND: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    PICTURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of rows by CHANNELS, or one split of its sum."""
    tile, first_channel, split = share(batch, channels, tiles_high * tiles_wide, PICTURES, CHANNELS)
    row = tile * COLUMNS
    rows, whole = batch * width, depth + second_depth
    steps = tl.cdiv(depth, DEPTH)
    first, last = 0, steps
    if SPLIT:
        first, last = steps * split // splits, steps * (split + 1) // splits
    y = tl.zeros((CHANNELS, COLUMNS), tl.float32)
    for step in range(first, last):
        start = step * DEPTH
        a = load_rows(x, row, start, rows, depth, DESCRIPTORS, COLUMNS, DEPTH)
        b = load_weight(weight, first_channel, start, depth, channels, whole, DESCRIPTORS, CHANNELS, DEPTH)
        y = tl.dot(b, a.T, y, input_precision=PRECISION)
    if SECOND:
        steps = tl.cdiv(second_depth, DEPTH)
        first, last = 0, steps
        if SPLIT:
            first, last = steps * split // splits, steps * (split + 1) // splits
        for step in range(first, last):
            start = step * DEPTH
            a = load_rows(second, row, start, rows, second_depth, DESCRIPTORS, COLUMNS, DEPTH)
            b = load_weight(
                weight, first_channel, depth + start, whole, channels, whole, DESCRIPTORS, CHANNELS, DEPTH
            )
            y = tl.dot(b, a.T, y, input_precision=PRECISION)
    if SPLIT:
        store_part(
            y.T, parts, split, tile, first_channel, batch, height, width, channels, tiles_high, tiles_wide,
            PICTURES, ROWS, COLUMNS, CHANNELS,
        )  # fmt: skip
    else:
        finish(
            y.T, bias, residual, output, means, squares, tile, first_channel, batch, height, width, channels,
            bias_stride, tiles_high, tiles_wide, BIAS, RESIDUAL, ACTIVATION, MOMENTS, PICTURES, ROWS, COLUMNS,
            CHANNELS,
        )  # fmt: skip


def linear(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: int,
) -> Tensor:
    """The op `linear`: by the kernel where it saves a pass over memory or was chosen, else by cuBLAS.

    cuBLAS neither reads two inputs nor adds a residual to a product with a bias.
    """
    fused = x.element_size() == 2 and (second is not None or residual is not None)
    if not (fused or chosen.is_chosen(weight)) or not _serves(x):
        result: Tensor = dispatch.default("linear")(x, second, weight, bias, residual, kind)
        return result
    return multiply(x, second, weight, bias, residual, kind)


def _serves(x: Tensor) -> bool:
    """Whether the kernel computes products with these inputs: enough rows, in a dtype of tensor cores."""
    known = x.dtype in product.DTYPES.values()
    return known and x.shape[-1] > 0 and x.numel() // x.shape[-1] >= FEWEST_ROWS


def multiply(
    x: Tensor,  # [..., C]
    second: Tensor | None,  # [..., S]
    weight: Tensor,  # [K, C + S, *ones]
    bias: Tensor | None,  # [K]
    residual: Tensor | None,  # [..., K]
    kind: int = 0,
) -> Tensor:
    """activation([x, second] weight^T + bias) + residual; moments of large maps [B, T, K] are remembered."""
    channels = len(weight)
    output = moments.empty((*x.shape[:-1], channels), x, torch.contiguous_format)
    if not output.numel():
        return output
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    others = None if second is None else second.reshape(len(rows), -1).contiguous()
    maps = x.ndim == 3 and moments.pay(x.shape[1])
    shape = (len(x) if maps else 1, 1, x.shape[1] if maps else len(rows), channels)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.reshape(shape).contiguous()
    ending = Ending(output.view(shape), bias, residual, activation=kind, moments=maps)
    matrix = weight.flatten(1).contiguous()

    def run(configuration: Configuration) -> Moments | None:
        architecture = launch.architecture(x.device)
        launches, left = plan(rows, others, matrix, ending, configuration, architecture)
        start(launches)
        return left

    shape_class = product.shape_class(len(rows), channels)
    left = configurations.run("linear", x.device, 8 * x.element_size(), shape_class, run)
    moments.remember(output, left)
    return output


def plan(
    x: Tensor,  # [rows, C]
    second: Tensor | None,  # [rows, S]
    weight: Tensor,  # [K, C + S]
    ending: Ending,
    configuration: Configuration,
    architecture: str,
) -> Plan:
    """The launches of a linear layer."""
    rows, depth = x.shape
    second_depth = 0 if second is None else second.shape[-1]
    batch, _, width, _ = ending.output.shape
    if width % configuration.rows:  # tiles would reach from one picture into the next
        ending = replace(ending, output=ending.output.view(1, 1, rows, -1), moments=False)
        batch, width = 1, rows
    tiles = product.runs(batch, width, configuration.rows)
    block = product.block_depth(x)
    descriptors = launch.number(architecture) >= 90 and launch.takes_descriptors(x, second, weight)
    factors: dict[str, Any] = {"x": x, "second": x if second is None else second, "weight": weight}
    if descriptors:
        tile = tiles.columns, block
        factors["x"] = launch.descriptor(x, tile)
        factors["second"] = launch.descriptor(factors["second"], tile)
        factors["weight"] = launch.descriptor(weight, (configuration.columns, block))
    factors |= {
        "depth": depth,
        "second_depth": second_depth,
        "DESCRIPTORS": descriptors,
        "SECOND": second is not None,
        "PRECISION": product.precision(architecture, torch.backends.cuda.matmul.allow_tf32),
        "DEPTH": block,
    }
    steps = -(-depth // block) + -(-second_depth // block)
    return product.plan(linear_kernel, factors, steps, ending, tiles, configuration, architecture)


# Rows, channels of x and of the second input, of the output: an attention block's projections and a
# decoder's 1x1 convolution of GLIDE, a transformer's layer, and a small map, which is summed in splits.
SHAPES = (
    (2048, 384, 0, 1152),
    (8192, 384, 192, 192),
    (2048, 512, 0, 2048),
    (128, 768, 768, 768),
)


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources; the transformer's layer has a GELU."""
    each = [("fp16", *shape) for shape in SHAPES] + [("bf16", *SHAPES[2]), ("fp32", *SHAPES[1])]
    return [case for shape in each for case in _cases(target, *shape)]


def _cases(target: str, kind: str, rows: int, depth: int, second_depth: int, channels: int) -> list[Case]:
    dtype = product.DTYPES[kind]

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, second = empty(rows, depth), empty(rows, second_depth) if second_depth else None
    output = empty(1, 1, rows, channels)
    ending = Ending(output, empty(channels), output, activation=int(depth == 512), moments=second is not None)
    shape_class = product.shape_class(rows, channels)
    cut = configurations.choose("linear", target, 8 * dtype.itemsize, shape_class)
    launches = plan(x, second, empty(channels, depth + second_depth), ending, cut, target).launches
    name = f"linear {kind} {rows}x{depth}+{second_depth} to {channels}"
    return [each.case(f"{name} {each.kernel.__name__}") for each in launches]
