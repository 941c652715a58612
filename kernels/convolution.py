"""A 3x3 same-size convolution of channels-last maps as a product, with what follows it in its epilogue.

    y[b, h, w, k] = Σ_dy,dx,c x[b, h + dy - 1, w + dx - 1, c] weight[k, c, dy, dx] + bias + residual

For each of the nine places of the kernel a tile of the map is read, shifted by it, and multiplied by the
weights of that place: nothing is unfolded in memory. On GPUs with a tensor memory accelerator shifted tiles
come by descriptors, whose zeros outside the map are the padding; elsewhere by pointers. Weights are read as
PyTorch's channels-last parameters lie, [K, 3, 3, C]. The tile's product is kept transposed, channels by
pixels, because the second factor of a tensor core's product may be a reshaped tile in shared memory and the
first may not.

Maps with few tiles are cut along the sum, whose parts `product.parts_kernel` adds in order. The gradient of x
is the same convolution with the kernel turned by half a turn and its channels exchanged; that of the weight
is cuDNN's.

FLOP: 18 · B · H · W · C · K. Bytes at least: x, weight, residual and output once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch, moments, product
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import start
from glide_fast.kernels.product import Ending, Moments, Plan, finish, place, share, store_part

PLACES = 9


@triton.jit
def convolution_kernel(
    x,  # [B, H, W, C], a descriptor or a pointer
    weight,  # [K, 9 C], or TURNED: [C, 9 K]; likewise
    bias,
    residual,
    output,  # [B, H, W, K]
    means,
    squares,
    parts,  # [splits, B, H, W, K] float32, where SPLIT
    batch,
    height,
    width,
    depth,  # C, of the sum
    channels,  # K, of the output
    bias_stride,
    tiles_high,
    tiles_wide,
    splits,
    DESCRIPTORS: tl.constexpr,
    TURNED: tl.constexpr,
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
    """One tile of pixels by CHANNELS, or one split of its sum."""
    PIXELS: tl.constexpr = PICTURES * ROWS * COLUMNS
    tile, first_channel, split = share(batch, channels, tiles_high * tiles_wide, PICTURES, CHANNELS)
    picture, row, column, _ = place(tile, tiles_high, tiles_wide, PICTURES, ROWS, COLUMNS)
    steps = tl.cdiv(depth, DEPTH)
    first, last = 0, 9 * steps
    if SPLIT:
        first, last = 9 * steps * split // splits, 9 * steps * (split + 1) // splits
    if not DESCRIPTORS:
        pixel = tl.arange(0, PIXELS)
        which = picture + pixel // (ROWS * COLUMNS)
        down, across = row + pixel // COLUMNS % ROWS, column + pixel % COLUMNS
        pixels = ((which - picture) * height + down - row) * width + across - column
        x += ((picture.to(tl.int64) * height + row) * width + column) * depth
        element, channel = tl.arange(0, DEPTH), first_channel + tl.arange(0, CHANNELS)
    y = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for step in range(first, last):
        spot = step // steps
        start = step % steps * DEPTH
        dy, dx = spot // 3 - 1, spot % 3 - 1
        if DESCRIPTORS:
            shifted = x.load([picture, row + dy, column + dx, start]).reshape(PIXELS, DEPTH)
            if TURNED:
                factor = weight.load([start, (8 - spot) * channels + first_channel]).T
            else:
                factor = weight.load([first_channel, spot * depth + start])
        else:
            inside = (which < batch) & (down + dy >= 0) & (down + dy < height)
            inside &= (across + dx >= 0) & (across + dx < width)
            there = start + element < depth
            places = (pixels + dy * width + dx)[:, None] * depth + (start + element)[None]
            shifted = tl.load(x + places, mask=inside[:, None] & there[None], other=0.0)
            known = (channel < channels)[:, None] & there[None]
            if TURNED:
                places = ((start + element) * 9 + 8 - spot)[None] * channels + channel[:, None]
            else:
                places = (channel * 9 + spot)[:, None] * depth + (start + element)[None]
            factor = tl.load(weight + places, mask=known, other=0.0)
        y = tl.dot(factor, shifted.T, y, input_precision=PRECISION)
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


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this convolution: of maps, 3x3, in a dtype of tensor cores."""
    known = x.dtype in product.DTYPES.values() and x.dtype is weight.dtype
    return known and x.ndim == 4 and weight.shape[2:] == (3, 3) and 0 not in weight.shape


def convolve(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [K, C, 3, 3]
    bias: Tensor | None = None,  # [K] or [B, K]
    residual: Tensor | None = None,  # [B, K, H, W], or half as large along each side, doubled then
    *,
    turned: bool = False,
) -> Tensor:
    """conv(x) + bias + residual, channels-last; the moments of a large result are remembered.

    ``turned`` makes the gradient of x out of the output's: x is [B, K, H, W] then, the result [B, C, H, W].
    """
    channels = weight.shape[1] if turned else weight.shape[0]
    x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    weight = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1)
    if bias is not None:
        bias = launch.dense_last(bias)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    batch, height, width, _ = x.shape
    output = moments.empty((batch, channels, height, width), x, torch.channels_last)
    tokens = output.permute(0, 2, 3, 1)
    ending = Ending(tokens, bias, residual, moments=not turned and moments.pay(height * width))
    if output.numel():

        def run(configuration: Configuration) -> Moments | None:
            launches, left = plan(x, weight, ending, turned, configuration, launch.architecture(x.device))
            start(launches)
            return left

        shape_class = product.shape_class(batch * height * width, channels)
        bits = 8 * x.element_size()
        moments.remember(output, configurations.run("convolution", x.device, bits, shape_class, run))
    return output


def plan(
    x: Tensor,  # [B, H, W, C]
    weight: Tensor,  # [K, 9 C]
    ending: Ending,
    turned: bool,
    configuration: Configuration,
    architecture: str,
) -> Plan:
    """The launches of a convolution."""
    depth = x.shape[3]
    tiles = product.cut(*x.shape[:3], configuration.rows)
    block = product.block_depth(x)
    descriptors = launch.number(architecture) >= 90 and launch.takes_descriptors(x, weight)
    factors: dict[str, Any] = {"x": x, "weight": weight}
    if descriptors:
        rows, columns = (block, configuration.columns) if turned else (configuration.columns, block)
        factors["x"] = launch.descriptor(x, (tiles.pictures, tiles.rows, tiles.columns, block))
        factors["weight"] = launch.descriptor(weight, (rows, columns))
    factors |= {
        "depth": depth,
        "DESCRIPTORS": descriptors,
        "TURNED": turned,
        "PRECISION": product.precision(architecture, torch.backends.cudnn.allow_tf32),
        "DEPTH": block,
    }
    steps = PLACES * -(-depth // block)
    return product.plan(convolution_kernel, factors, steps, ending, tiles, configuration, architecture)


# Batch, channels, side, channels of the output, for which the products are compiled: GLIDE's at 64 px, the
# upsampler's first level, the smallest maps, which are summed in splits, and the last layer.
SHAPES = ((2, 192, 64, 192), (1, 192, 256, 192), (16, 384, 32, 384), (2, 768, 8, 768), (2, 192, 64, 6))


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernels' resources."""
    each = [("fp16", shape, False) for shape in SHAPES]
    each += [("bf16", SHAPES[2], True), ("fp16", SHAPES[0], True), ("fp32", SHAPES[0], False)]
    return [case for kind, shape, turned in each for case in _cases(target, kind, shape, turned)]


def _cases(target: str, kind: str, shape: tuple[int, int, int, int], turned: bool) -> list[Case]:
    batch, depth, side, channels = shape
    dtype = product.DTYPES[kind]

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, weight = empty(batch, side, side, depth), empty(channels, PLACES * depth)
    output = empty(batch, side, side, channels)
    whole = Ending(output, empty(channels), output, moments=moments.pay(side * side))
    ending = Ending(output) if turned else whole
    cut = configurations.choose(
        "convolution", target, dtype.itemsize * 8, product.shape_class(batch * side * side, channels)
    )
    name = f"convolution{' gradient' if turned else ''} {kind} {batch}x{side}²x{depth} to {channels}"
    launches = plan(x, weight, ending, turned, cut, target).launches
    return [each.case(f"{name} {each.kernel.__name__}") for each in launches]
