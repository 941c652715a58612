"""What the GroupNorm kernels share: tiles [ROWS pixels, LANES channels] of one or two maps, groups, moments.

A group's channels (6, 12, 18, 24, 36, 48) are no power of two, so tiles are cut at multiples of LANES, and a
group may lie in two of them. What a tile contributes to a group goes to one of SLOTS slots, the first of
which is the group of the tile's first channel; `member` [SLOTS, LANES] says which lane belongs to which slot.

Moments are combined by the formula of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise
algorithm for computing sample variances", in a fixed order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import dropout, launch
from glide_fast.kernels.configurations import Configuration
from glide_fast.ops import reference

CHUNKS = 64  # of a picture's pixels at most: a program reads as many moments of each group
PROGRAMS = 1024  # that fill a large GPU several times over
MODE_UP: Any = tl.constexpr(reference.RESAMPLE_UP)
MODE_DOWN: Any = tl.constexpr(reference.RESAMPLE_DOWN)


@triton.jit
def load_tile(x, skip, pixel, inside, channel, lanes, split, x_pixel, skip_pixel, step, SKIP: tl.constexpr):
    """Pixels of x's `split` channels and then of skip's, in float32 [ROWS, LANES]; 0 outside."""
    own = inside[:, None] & (lanes & (channel < split))[None, :]
    places = pixel[:, None] * x_pixel + channel[None, :] * step
    tile = tl.load(x + places, mask=own, other=0.0).to(tl.float32)
    if SKIP:
        other = inside[:, None] & (lanes & (channel >= split))[None, :]
        places = pixel[:, None] * skip_pixel + (channel - split)[None, :] * step
        tile = tl.where(own, tile, tl.load(skip + places, mask=other, other=0.0).to(tl.float32))
    return tile


@triton.jit
def film(weight, bias, scale, shift, batch, scale_row, shift_row, channel, lanes, FILM: tl.constexpr):
    """Gain and offset of each lane: weight (1 + scale), and bias (1 + scale) + shift."""
    gain = tl.load(weight + channel, mask=lanes, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=lanes, other=0.0).to(tl.float32)
    if FILM:
        factor = 1.0 + tl.load(scale + batch * scale_row + channel, mask=lanes, other=0.0).to(tl.float32)
        shifts = tl.load(shift + batch * shift_row + channel, mask=lanes, other=0.0).to(tl.float32)
        gain, offset = gain * factor, offset * factor + shifts
    return gain, offset


@triton.jit
def members(channel, lanes, first_group, group_channels, SLOTS: tl.constexpr):
    """Which lanes belong to which slot."""
    start = (first_group + tl.arange(0, SLOTS)) * group_channels
    ahead = channel[None, :] - start[:, None]
    return (ahead >= 0) & (ahead < group_channels) & lanes[None, :]


@triton.jit
def to_slots(values, member):
    """The sum over a slot's lanes."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def to_lanes(values, member):
    """Each lane's slot's value; 0 without one. A NaN stays in its group."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def entry(batch, group, groups, chunk, chunks, part, parts):
    """Where the contribution of one tile column's chunk to a group lies in [B, G, chunks, parts]."""
    return ((batch * groups + group) * chunks + chunk) * parts + part


@triton.jit
def group_block(group, part, group_channels, LANES: tl.constexpr):
    """Channels of a group in the part-th of the tile columns it lies in."""
    block = group * group_channels // LANES + part
    low = tl.maximum(block * LANES, group * group_channels)
    high = tl.minimum((block + 1) * LANES, (group + 1) * group_channels)
    return tl.maximum(high - low, 0)


@triton.jit
def group_totals(
    sums, batch, group, groups, group_channels, chunks, parts, LANES: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """The sums of groups [SLOTS] over their chunks and parts."""
    chunk = tl.arange(0, CHUNKS)
    total = tl.zeros(group.shape, tl.float32)
    for part in range(parts):
        there = (group < groups) & (group_block(group, part, group_channels, LANES) > 0)
        at = entry(batch, group[:, None], groups, chunk[None, :], chunks, part, parts)
        total += tl.sum(
            tl.load(sums + at, mask=there[:, None] & (chunk < chunks)[None, :], other=0.0), axis=1
        )
    return total


@triton.jit
def channel_moments(
    x, skip, start, stop, channel, lanes, split, x_pixel, skip_pixel, step, SKIP: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each lane over pixels start to stop."""
    mean = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    seen = 0.0
    for first in range(start, stop, ROWS):
        pixel = first + tl.arange(0, ROWS)
        inside = pixel < stop
        tile = load_tile(x, skip, pixel, inside, channel, lanes, split, x_pixel, skip_pixel, step, SKIP)
        count = tl.minimum(stop - first, ROWS).to(tl.float32)
        tile_mean = tl.sum(tile, axis=0) / count
        deviation = tl.where(inside[:, None], tile - tile_mean[None, :], 0.0)
        rest = tl.sum(deviation, axis=0) / count  # what rounding left of the tile's mean
        delta = tile_mean + rest - mean
        total = seen + count
        squares += tl.sum(deviation * deviation, axis=0) - rest * rest * count
        squares += delta * delta * (seen * count / total)
        mean += delta * (count / total)
        seen = total
    return mean, squares


@triton.jit
def slot_moments(mean, squares, count, member):
    """Number of lanes, mean and sum of squared deviations of each slot, of lanes with `count` pixels each."""
    width = tl.sum(member.to(tl.float32), axis=1)
    slot_mean = to_slots(mean, member) / tl.maximum(width, 1.0)
    deviation = mean - to_lanes(slot_mean, member)
    return width, slot_mean, to_slots(squares + count * deviation * deviation, member)


@triton.jit
def combine(
    moments, plane, batch, group, groups, group_channels, chunks, parts, chunk_pixels, pixels, eps,
    LANES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of groups [SLOTS] from the moments of their parts: means first, then squares."""
    chunk = tl.arange(0, CHUNKS)
    rows = tl.minimum(pixels - chunk * chunk_pixels, chunk_pixels)
    total = pixels * 1.0 * group_channels
    wanted = (group < groups)[:, None] & (chunk < chunks)[None, :]
    mean = tl.zeros(group.shape, tl.float32)
    for part in range(parts):
        count = group_block(group, part, group_channels, LANES)[:, None] * rows[None, :]
        at = entry(batch, group[:, None], groups, chunk[None, :], chunks, part, parts)
        values = tl.load(moments + at, mask=wanted & (count > 0), other=0.0)
        mean += tl.sum(values * (count.to(tl.float32) / total), axis=1)
    variance = tl.zeros(group.shape, tl.float32)
    for part in range(parts):
        count = group_block(group, part, group_channels, LANES)[:, None] * rows[None, :]
        at = entry(batch, group[:, None], groups, chunk[None, :], chunks, part, parts)
        there = wanted & (count > 0)
        delta = tl.where(there, tl.load(moments + at, mask=there, other=0.0) - mean[:, None], 0.0)
        squares = tl.load(moments + plane + at, mask=there, other=0.0)
        variance += tl.sum(squares + delta * delta * count.to(tl.float32), axis=1)
    return mean, tl.rsqrt(variance / total + eps)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def divide(items: int, unit: int, most: int) -> tuple[int, int]:
    """At most `most` runs of whole units that cover the items: their number and the items of each."""
    units = triton.cdiv(items, unit)
    size = triton.cdiv(units, max(min(units, most), 1)) * unit
    return triton.cdiv(items, size), size


def unlimited(configuration: Configuration, *channels: int) -> Configuration:
    """The configuration; without a limit of registers where channels fill no wide loads, which need more."""
    aligned = all(each % 16 == 0 for each in channels)
    return configuration if aligned else replace(configuration, registers=None)


@dataclass(frozen=True)
class Cut:
    """How the split kernels cut pictures [P, C] into tiles, and a group's moments into parts."""

    rows: int
    lanes: int
    slots: int
    parts: int  # tile columns in which one group can have channels
    blocks: int  # tile columns
    chunks: int
    chunk_pixels: int

    @staticmethod
    def of(batch: int, channels: int, groups: int, pixels: int, configuration: Configuration) -> Cut:
        """The cut by a configuration's rows and columns, with programs enough to fill a GPU."""
        lanes = min(configuration.columns, power_of_two(channels))
        members = channels // groups
        aligned = lanes % members == 0 or members % lanes == 0
        slots = max(lanes // members, 1) if aligned else (lanes - 2) // members + 2
        parts = triton.cdiv(members, lanes) if aligned else (members - 2) // lanes + 2
        blocks = triton.cdiv(channels, lanes)
        most = min(CHUNKS, PROGRAMS // (batch * blocks))
        chunks, chunk_pixels = divide(pixels, configuration.rows, most)
        return Cut(configuration.rows, lanes, power_of_two(slots), parts, blocks, chunks, chunk_pixels)

    @property
    def arguments(self) -> dict[str, int]:
        """What the kernels are told of it."""
        return {
            "parts": self.parts, "blocks": self.blocks, "chunks": self.chunks,
            "chunk_pixels": self.chunk_pixels, "ROWS": self.rows, "LANES": self.lanes, "SLOTS": self.slots,
        }  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """What is done to a map's values; the op's arguments after x."""

    weight: Tensor  # [C + S]
    bias: Tensor  # [C + S]
    scale: Tensor | None  # [B, C + S]
    shift: Tensor | None  # [B, C + S]
    groups: int
    eps: float
    silu: bool
    mode: int
    dropout: float = 0.0
    seed: int = 0

    @staticmethod
    def blank(channels: int, *, batch: int, film: bool, mode: int, dropout: float = 0.0) -> Norm:
        """A norm of 32 groups without values, on the meta device."""
        weight, bias = torch.empty(2, channels, device="meta")
        scale, shift = torch.empty(batch, 2 * channels, device="meta", dtype=torch.float16).chunk(2, dim=1)
        modulation = (scale, shift) if film else (None, None)
        return Norm(weight, bias, *modulation, 32, 1e-5, True, mode, dropout, seed=2**62 + 1)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernels are told of it; without FiLM, weights stand where nothing is read."""
        weight, bias = self.weight.contiguous(), self.bias.contiguous()
        scale = weight[None] if self.scale is None else launch.dense_last(self.scale)
        shift = bias[None] if self.shift is None else launch.dense_last(self.shift)
        return {
            "weight": weight, "bias": bias, "scale": scale, "scale_row": scale.stride(0), "shift": shift,
            "shift_row": shift.stride(0), "FILM": self.scale is not None, "SILU": self.silu,
            "MODE": self.mode, **dropout.arguments(self.dropout, self.seed),
        }  # fmt: skip


@dataclass(frozen=True)
class Statistics:
    """Mean and 1/deviation of every group [B, G], float32."""

    mean: Tensor
    rstd: Tensor

    @staticmethod
    def empty(x: Tensor, groups: int) -> Statistics:
        """Unwritten ones for x."""
        mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
        return Statistics(mean, rstd)


@dataclass(frozen=True)
class Map:
    """A tensor [B, C, *space] as [B, P, C]: its strides of batch, pixel and channel."""

    tensor: Tensor
    batch: int
    pixel: int
    channel: int


def as_map(x: Tensor) -> Map:
    """The map of a tensor whose space is one run of pixels; of another, that of a channels-last copy."""
    if not _is_one_run(x):
        x = x.contiguous(memory_format=reference.channels_last(x))
    pixel = next((x.stride(dim) for dim in reversed(range(2, x.ndim)) if x.shape[dim] > 1), 1)
    return Map(x, x.stride(0), pixel, x.stride(1))


def side_by_side(x: Tensor, skip: Tensor | None) -> tuple[Map, Map]:
    """Two maps with the same stride of channels, as copies if need be; x twice where there is no skip."""
    own = as_map(x)
    if skip is None:
        return own, own
    other = as_map(skip)
    if own.channel != other.channel and x.shape[1] > 1 and skip.shape[1] > 1:
        own, other = (as_map(each.contiguous(memory_format=reference.channels_last(x))) for each in (x, skip))
    step = own.channel if x.shape[1] > 1 else other.channel
    return replace(own, channel=step), replace(other, channel=step)


def _is_one_run(x: Tensor) -> bool:
    dims = [dim for dim in range(2, x.ndim) if x.shape[dim] > 1]
    return all(
        x.stride(outer) == x.stride(inner) * x.shape[inner] for outer, inner in itertools.pairwise(dims)
    )


def pixels_of(x: Tensor) -> int:
    """The pixels of a picture of [B, C, *space]."""
    return math.prod(x.shape[2:])


def covered(x: Tensor, mode: int, channels: int | None = None) -> bool:
    """Whether the kernels take x: not float64, resampled only as a picture, positions in 32 bits."""
    reach = 4 * (channels or x.shape[1]) * pixels_of(x)
    resampled = mode != reference.RESAMPLE_NONE
    return x.dtype is not torch.float64 and (x.ndim == 4 or not resampled) and reach < 2**31
