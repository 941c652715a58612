"""What the products of this package share: tiles of pixels, and what is done to a tile before it is stored.

A tile is pictures × rows × columns of channels-last maps [B, H, W], each a power of two, so that 128 pixels
fit maps of every size; token sequences [B, T, C] are maps of height one. The epilogue adds bias and
residual, applies an activation, rounds once, and leaves the mean of each channel and its sum of squared
deviations from it over the tile's pixels of each picture: with them the next GroupNorm need not read the
map for its statistics (`glide_fast.kernels.moments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Blocks that give each multiprocessor of a large GPU one; a product of fewer is split along its sum.
_BLOCKS = 132
_NARROW, _WIDE = 64, 128
_MOST_SPLITS = 8
_FEWEST_STEPS = 8  # of the sum in one split


@dataclass(frozen=True)
class Tiles:
    """How maps [batch, height, width] are cut into tiles; the last ones may reach over the edge."""

    batch: int
    height: int
    width: int
    pictures: int
    rows: int
    columns: int

    @property
    def high(self) -> int:
        """Tiles along the height."""
        return -(-self.height // self.rows)

    @property
    def wide(self) -> int:
        """Tiles along the width."""
        return -(-self.width // self.columns)

    @property
    def each(self) -> int:
        """Tiles of one picture."""
        return self.high * self.wide

    @property
    def count(self) -> int:
        """Tiles of the batch."""
        return -(-self.batch // self.pictures) * self.each

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, height and width of the maps."""
        return self.batch, self.height, self.width


def cut(batch: int, height: int, width: int, pixels: int) -> Tiles:
    """The tiles of so many pixels that waste least; among equals those with the longest rows."""

    def power(size: int) -> int:
        return 1 << max(size - 1, 0).bit_length()

    best: tuple[int, Tiles] | None = None
    columns = min(pixels, power(width))
    while columns:
        rows = min(pixels // columns, power(height))
        tiles = Tiles(batch, height, width, pixels // (columns * rows), rows, columns)
        if best is None or tiles.count < best[0]:
            best = tiles.count, tiles
        columns //= 2
    return best[1] if best is not None else Tiles(batch, height, width, pixels, 1, 1)


def runs(batch: int, pixels: int, length: int) -> Tiles:
    """Maps as single rows of pixels, cut into runs of one length."""
    return Tiles(batch, 1, pixels, pictures=1, rows=1, columns=length)


def splits(blocks: int, steps: int) -> int:
    """Into how many parts a sum of so many steps is cut, so that a few blocks still fill a GPU.

    It depends on the shapes alone: the same product is always summed in the same order.
    """
    return max(1, min(_BLOCKS // max(blocks, 1), steps // _FEWEST_STEPS, _MOST_SPLITS))


def shape_class(pixels: int, channels: int) -> int:
    """The widest tile, in channels, of which there are enough to fill a GPU and few are half empty."""
    wide = -(-channels // _WIDE)
    filled = wide * _WIDE <= 1.15 * channels and wide * pixels >= 2 * _BLOCKS * _WIDE
    return _WIDE if filled else _NARROW


def block_depth(x: Tensor) -> int:
    """The length of a step along the sum: 128 bytes, which is what shared memory interleaves; or less."""
    least = 16 if x.element_size() == 2 else 8
    return max(least, min(128 // x.element_size(), 1 << (x.shape[-1] - 1).bit_length()))


def precision(architecture: str, allow_tf32: bool) -> str:
    """How tensor cores multiply float32: rounded to ten bits where PyTorch may, else by three products."""
    if launch.number(architecture) == 0:
        return "ieee"
    return "tf32" if allow_tf32 else "tf32x3"


@triton.jit
def place(tile, tiles_high, tiles_wide, PICTURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's first picture, row and column, and its number in its picture."""
    number = tile % (tiles_high * tiles_wide)
    picture = tile // (tiles_high * tiles_wide) * PICTURES
    return picture, number // tiles_wide * ROWS, number % tiles_wide * COLUMNS, number


@triton.jit
def share(batch, channels, tiles_each, PICTURES: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tile, first channel and split: neighbours share pixels, which then come from cache."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    blocks = tl.cdiv(batch, PICTURES) * tiles_each * channel_tiles
    block = tl.program_id(0) % blocks
    return block // channel_tiles, block % channel_tiles * CHANNELS, tl.program_id(0) // blocks


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """GELU as PyTorch's default has it, or CLIP's approximation."""
    if ACTIVATION == 1:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == 2:
        y = y * tl.sigmoid(1.702 * y)
    return y


@triton.jit
def finish(
    y,  # [pixels of the tile, CHANNELS] float32, the sum
    bias,  # [K], or rows of [B, K]
    residual,  # [B, H, W, K], or where RESIDUAL is 2 [B, H/2, W/2, K], doubled
    output,  # [B, H, W, K]
    means,  # [B, tiles of a picture, K] float32
    squares,
    tile,
    first_channel,
    batch,
    height,
    width,
    channels,
    bias_stride,
    tiles_high,
    tiles_wide,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTS: tl.constexpr,
    PICTURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Bias, activation, residual, rounding, store, moments."""
    PIXELS: tl.constexpr = PICTURES * ROWS * COLUMNS
    picture, row, column, number = place(tile, tiles_high, tiles_wide, PICTURES, ROWS, COLUMNS)
    pixel = tl.arange(0, PIXELS)
    down, across = pixel // COLUMNS % ROWS, pixel % COLUMNS
    inside = (picture + pixel // (ROWS * COLUMNS) < batch) & (row + down < height) & (column + across < width)
    start = ((picture.to(tl.int64) * height + row) * width + column) * channels
    offset = (pixel // (ROWS * COLUMNS) * height + down) * width + across
    channel = first_channel + tl.arange(0, CHANNELS)
    present = channel < channels
    mask = inside[:, None] & present[None]
    offset = offset[:, None] * channels + channel[None]
    if BIAS == 1:
        y += tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)[None]
    if BIAS == 2:
        which = picture + tl.arange(0, PICTURES)
        own = bias + which[:, None] * bias_stride + channel[None]
        own = tl.load(own, mask=(which < batch)[:, None] & present[None], other=0.0).to(tl.float32)
        own = tl.broadcast_to(own[:, None, :], (PICTURES, ROWS * COLUMNS, CHANNELS))
        y += own.reshape(PIXELS, CHANNELS)
    y = activate(y, ACTIVATION)
    if RESIDUAL == 1:
        y += tl.load(residual + start + offset, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL == 2:
        half = residual + picture.to(tl.int64) * (height // 2) * (width // 2) * channels
        at = (pixel // (ROWS * COLUMNS) * (height // 2) + (row + down) // 2) * (width // 2)
        at = (at + (column + across) // 2)[:, None] * channels + channel[None]
        y += tl.load(half + at, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(output.dtype.element_ty)
    tl.store(output + start + offset, rounded, mask=mask)
    if MOMENTS:
        count = tl.minimum(ROWS, height - row) * tl.minimum(COLUMNS, width - column)
        z = tl.where(inside[:, None], rounded.to(tl.float32), 0.0).reshape(PICTURES, ROWS * COLUMNS, CHANNELS)
        mean = tl.sum(z, 1) / count.to(tl.float32)
        away = z - mean[:, None, :]
        away = tl.where(inside.reshape(PICTURES, ROWS * COLUMNS)[:, :, None], away, 0.0)
        which = picture + tl.arange(0, PICTURES)
        at = (which[:, None] * (tiles_high * tiles_wide) + number) * channels + channel[None]
        there = (which < batch)[:, None] & present[None]
        tl.store(means + at, mean, mask=there)
        tl.store(squares + at, tl.sum(away * away, 1), mask=there)


@triton.jit
def store_part(
    y,  # [pixels of the tile, CHANNELS] float32
    parts,  # [splits, B, H, W, K] float32
    split,
    tile,
    first_channel,
    batch,
    height,
    width,
    channels,
    tiles_high,
    tiles_wide,
    PICTURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Leave one split's share of a tile's sum."""
    picture, row, column, _ = place(tile, tiles_high, tiles_wide, PICTURES, ROWS, COLUMNS)
    pixel = tl.arange(0, PICTURES * ROWS * COLUMNS)
    which = picture + pixel // (ROWS * COLUMNS)
    down, across = row + pixel // COLUMNS % ROWS, column + pixel % COLUMNS
    channel = first_channel + tl.arange(0, CHANNELS)
    inside = (which < batch) & (down < height) & (across < width)
    offset = ((which * height + down) * width + across)[:, None] * channels + channel[None]
    parts += split.to(tl.int64) * batch * height * width * channels
    tl.store(parts + offset, y, mask=inside[:, None] & (channel < channels)[None])


# Bytes: 4 · splits · pixels · K read, the output and the residual once. It runs where maps are small.
@triton.jit
def parts_kernel(
    parts,  # [splits, B, H, W, K] float32
    bias,
    residual,
    output,
    means,
    squares,
    batch,
    height,
    width,
    channels,
    bias_stride,
    tiles_high,
    tiles_wide,
    splits,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MOMENTS: tl.constexpr,
    PICTURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the splits' shares in their order; then as every product ends."""
    tile, first_channel, _ = share(batch, channels, tiles_high * tiles_wide, PICTURES, CHANNELS)
    picture, row, column, _ = place(tile, tiles_high, tiles_wide, PICTURES, ROWS, COLUMNS)
    pixel = tl.arange(0, PICTURES * ROWS * COLUMNS)
    which = picture + pixel // (ROWS * COLUMNS)
    down, across = row + pixel // COLUMNS % ROWS, column + pixel % COLUMNS
    channel = first_channel + tl.arange(0, CHANNELS)
    inside = (which < batch) & (down < height) & (across < width)
    mask = inside[:, None] & (channel < channels)[None]
    offset = ((which * height + down) * width + across)[:, None] * channels + channel[None]
    part = tl.full((), 1, tl.int64) * batch * height * width * channels
    y = tl.zeros((PICTURES * ROWS * COLUMNS, CHANNELS), tl.float32)
    for _ in range(splits):
        y += tl.load(parts + offset, mask=mask, other=0.0)
        parts += part
    finish(
        y, bias, residual, output, means, squares, tile, first_channel, batch, height, width, channels,
        bias_stride, tiles_high, tiles_wide, BIAS, RESIDUAL, ACTIVATION, MOMENTS, PICTURES, ROWS, COLUMNS,
        CHANNELS,
    )  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """Of each channel over each tile of each picture of a map: the mean, and the sum of squares about it."""

    tiles: Tiles
    values: Tensor  # [2, B, tiles of a picture, K] float32


@dataclass(frozen=True)
class Ending:
    """What becomes of a product."""

    output: Tensor  # [B, H, W, K]
    bias: Tensor | None = None  # [K] or [B, K], dense in K
    residual: Tensor | None = None  # [B, H, W, K], contiguous, or half as large along each side, doubled then
    activation: int = 0
    moments: bool = False

    def moments_of(self, tiles: Tiles) -> Moments | None:
        """Room for the moments, where they are wanted."""
        if not self.moments:
            return None
        shape = (2, tiles.batch, tiles.each, self.output.shape[-1])
        return Moments(tiles, torch.empty(shape, dtype=torch.float32, device=self.output.device))

    def arguments(self, tiles: Tiles, moments: Moments | None, cut: Configuration) -> dict[str, Any]:
        """The epilogue's arguments by name; the output stands for a tensor that is absent."""
        output, bias, residual = self.output, self.bias, self.residual
        means, squares = (output, output) if moments is None else moments.values.unbind()
        return {
            "bias": output if bias is None else bias,
            "residual": output if residual is None else residual,
            "output": output,
            "means": means,
            "squares": squares,
            "batch": tiles.batch,
            "height": tiles.height,
            "width": tiles.width,
            "channels": output.shape[-1],
            "bias_stride": 0 if bias is None else bias.stride(0),
            "tiles_high": tiles.high,
            "tiles_wide": tiles.wide,
            "BIAS": 0 if bias is None else bias.ndim,
            "RESIDUAL": 0 if residual is None else 1 if residual.numel() == output.numel() else 2,
            "ACTIVATION": self.activation,
            "MOMENTS": moments is not None,
            "PICTURES": tiles.pictures,
            "ROWS": tiles.rows,
            "COLUMNS": tiles.columns,
            "CHANNELS": cut.columns,
        }


class Plan(NamedTuple):
    """The launches of a product, and the moments that they leave."""

    launches: tuple[Launch, ...]
    moments: Moments | None


def plan(
    kernel: Any,
    factors: dict[str, Any],
    steps: int,
    ending: Ending,
    tiles: Tiles,
    configuration: Configuration,
    architecture: str,
) -> Plan:
    """The launches of a product, in splits where its tiles are few.

    Args:
        kernel: takes the factors, the epilogue's arguments, `parts` and `splits`, and is compiled for SPLIT.
        factors: the kernel's own arguments by name.
        steps: of the sum.
        ending: what becomes of the product.
        tiles: how the output's maps are cut.
        configuration: whose columns are channels.
        architecture: chooses the configuration of the sum of the splits.
    """
    output = ending.output
    blocks = tiles.count * -(-output.shape[-1] // configuration.columns)
    count = splits(blocks, steps)
    if count == 1:
        moments = ending.moments_of(tiles)
        arguments = {**factors, **ending.arguments(tiles, moments, configuration), "parts": output}
        arguments |= {"splits": 1, "SPLIT": False}
        return Plan((Launch(kernel, blocks, arguments, configuration),), moments)
    parts = output.new_empty((count, *output.shape), dtype=torch.float32)
    arguments = {**factors, **Ending(output).arguments(tiles, None, configuration), "parts": parts}
    arguments |= {"splits": count, "SPLIT": True}
    first = Launch(kernel, count * blocks, arguments, configuration)
    adding = configurations.choose("product_sum", architecture, 8 * output.element_size())
    tiles = cut(*tiles.shape, adding.rows)
    moments = ending.moments_of(tiles)
    arguments = {**ending.arguments(tiles, moments, adding), "parts": parts, "splits": count}
    blocks = tiles.count * -(-output.shape[-1] // adding.columns)
    return Plan((first, Launch(parts_kernel, blocks, arguments, adding)), moments)
