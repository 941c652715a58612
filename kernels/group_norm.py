"""GroupNorm with affine, FiLM, SiLU and 2x resampling, of one map or two side by side, in one launch or two.

    y = resample(silu((normalise([x, skip]) * weight + bias) * (1 + scale) + shift))

Maps are read as [B, pixels, channels] by strides: channels-last and contiguous ones alike, of any number of
dimensions of space. Small maps take one launch: each program owns whole groups and reads them twice, the
second time from cache. Large ones take two: `statistics` writes the moments of every (chunk of pixels, tile
column) of a group, and each program of `apply` puts together those of its own groups, in a fixed order: there
are no atomics. All arithmetic is float32.

Bytes of 16-bit maps: 4 an element in one pass (read, write), 6 split (read, read, write), of which L2 gives 2
back where the map fits. About 12 FLOP an element: memory is what limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, dropout
from glide_fast.kernels import group_norm_tiles as tiles
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.group_norm_tiles import (
    MODE_DOWN,
    MODE_UP,
    Cut,
    Norm,
    Statistics,
    channel_moments,
    combine,
    entry,
    film,
    load_tile,
    members,
    slot_moments,
    to_lanes,
)
from glide_fast.kernels.moments import statistics as statistics_of
from glide_fast.kernels.plan import Launch, start
from glide_fast.ops import dispatch, reference
from glide_fast.ops.group_norm import resampled_shape

ONE_PASS_PIXELS = 1024  # larger maps have too few groups a picture to fill a GPU with a program each
ONE_PASS_LANES = 256
# Pixels, channels of x and of the skip, FiLM, resampling of what is compiled to be measured.
CASES = (
    (64, 768, 0, True, reference.RESAMPLE_NONE),
    (64, 768, 768, False, reference.RESAMPLE_NONE),
    (256, 576, 0, True, reference.RESAMPLE_NONE),
    (1024, 384, 0, True, reference.RESAMPLE_NONE),
    (1024, 576, 0, False, reference.RESAMPLE_UP),
    (4096, 192, 0, True, reference.RESAMPLE_NONE),
    (4096, 384, 192, False, reference.RESAMPLE_NONE),
    (4096, 192, 0, False, reference.RESAMPLE_DOWN),
    (65536, 192, 192, False, reference.RESAMPLE_NONE),
)


@triton.jit
def normalise_tile(tile, mean, gain, offset, SILU: tl.constexpr):
    """(tile - mean) gain + offset, activated; the gain holds 1/deviation."""
    z = (tile - mean[None, :]) * gain[None, :] + offset[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def write_rows(
    x, skip, y, start, stop, width, mean, gain, offset, channel, lanes, split, x_pixel, skip_pixel, step,
    y_pixel, y_step, seed, largest_dropped, factor, batch, first_channel, channels, SKIP: tl.constexpr,
    SILU: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Normalise and write pixels start to stop: the input's, or the output's where that is the smaller."""
    columns = (channel * y_step)[None, :]
    for first in range(start, stop, ROWS):
        pixel = first + tl.arange(0, ROWS)
        inside = pixel < stop
        if MODE == MODE_DOWN:
            half = width // 2
            corner = pixel // half * 2 * width + pixel % half * 2
            z = tl.zeros([ROWS, channel.shape[0]], tl.float32)
            for place in tl.static_range(4):
                near = corner + place // 2 * width + place % 2
                tile = load_tile(
                    x, skip, near, inside, channel, lanes, split, x_pixel, skip_pixel, step, SKIP
                )
                z += 0.25 * normalise_tile(tile, mean, gain, offset, SILU)
        else:
            tile = load_tile(x, skip, pixel, inside, channel, lanes, split, x_pixel, skip_pixel, step, SKIP)
            z = normalise_tile(tile, mean, gain, offset, SILU)
        if DROPOUT:
            stays = dropout.kept(seed, largest_dropped, batch, pixel, first_channel, channels, LANES)
            z = tl.where(stays, z * factor, 0.0)
        within = inside[:, None] & lanes[None, :]
        z = z.to(y.dtype.element_ty)
        if MODE == MODE_UP:
            corner = pixel // width * 4 * width + pixel % width * 2
            for place in tl.static_range(4):
                near = corner + place // 2 * 2 * width + place % 2
                tl.store(y + near[:, None] * y_pixel + columns, z, mask=within)
        else:
            tl.store(y + pixel[:, None] * y_pixel + columns, z, mask=within)


@triton.jit
def statistics_kernel(
    x, skip, moments, plane, x_batch, x_pixel, skip_batch, skip_pixel, step, pixels, split, channels, groups,
    chunks, chunk_pixels, parts, blocks,
    SKIP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Moments [2, B, G, chunks, parts] of each group's channels in each tile column and chunk of pixels."""
    program = tl.program_id(0)
    group_channels = channels // groups
    block = program % blocks
    chunk = program // blocks % chunks
    batch = program // blocks // chunks
    channel = block * LANES + tl.arange(0, LANES)
    start = chunk * chunk_pixels
    stop = tl.minimum(start + chunk_pixels, pixels)
    picture = batch.to(tl.int64)
    lanes = channel < channels
    mean, squares = channel_moments(
        x + picture * x_batch, skip + picture * skip_batch, start, stop, channel, lanes, split, x_pixel,
        skip_pixel, step, SKIP, ROWS, LANES,
    )  # fmt: skip
    first_group = block * LANES // group_channels
    member = members(channel, lanes, first_group, group_channels, SLOTS)
    width, slot_mean, slot_squares = slot_moments(mean, squares, (stop - start).to(tl.float32), member)
    group = first_group + tl.arange(0, SLOTS)
    at = entry(batch, group, groups, chunk, chunks, block - group * group_channels // LANES, parts)
    tl.store(moments + at, slot_mean, mask=width > 0.0)
    tl.store(moments + plane + at, slot_squares, mask=width > 0.0)


@triton.jit(do_not_specialize=dropout.PLAIN)
def apply_kernel(
    x, skip, weight, bias, scale, shift, moments, mean, rstd, y, plane, x_batch, x_pixel, skip_batch,
    skip_pixel, step, scale_row, shift_row, y_batch, y_pixel, y_step, pixels, items, width, split, channels,
    groups, chunks, chunk_pixels, parts, blocks, runs, run_items, eps, seed, largest_dropped, factor,
    SAVED: tl.constexpr, SKIP: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Combine a tile column's moments (or read SAVED statistics), normalise a run of its pixels."""
    program = tl.program_id(0)
    group_channels = channels // groups
    block = program % blocks
    run = program // blocks % runs
    batch = program // blocks // runs
    channel = block * LANES + tl.arange(0, LANES)
    lanes = channel < channels
    if SAVED:
        at = batch * groups + channel // group_channels
        lane_mean = tl.load(mean + at, mask=lanes, other=0.0)
        lane_rstd = tl.load(rstd + at, mask=lanes, other=0.0)
    else:
        first_group = block * LANES // group_channels
        group = first_group + tl.arange(0, SLOTS)
        group_mean, group_rstd = combine(
            moments, plane, batch, group, groups, group_channels, chunks, parts, chunk_pixels, pixels, eps,
            LANES, CHUNKS,
        )  # fmt: skip
        if run == 0:
            owned = (group < groups) & (group * group_channels // LANES == block)
            tl.store(mean + batch * groups + group, group_mean, mask=owned)
            tl.store(rstd + batch * groups + group, group_rstd, mask=owned)
        member = members(channel, lanes, first_group, group_channels, SLOTS)
        lane_mean, lane_rstd = to_lanes(group_mean, member), to_lanes(group_rstd, member)
    gain, offset = film(weight, bias, scale, shift, batch, scale_row, shift_row, channel, lanes, FILM)
    picture = batch.to(tl.int64)
    start = run * run_items
    write_rows(
        x + picture * x_batch, skip + picture * skip_batch, y + picture * y_batch, start,
        tl.minimum(start + run_items, items), width, lane_mean, gain * lane_rstd, offset, channel, lanes,
        split, x_pixel, skip_pixel, step, y_pixel, y_step, seed, largest_dropped, factor, batch,
        block * LANES, channels, SKIP, SILU, MODE, DROPOUT, ROWS, LANES,
    )  # fmt: skip


@triton.jit(do_not_specialize=dropout.PLAIN)
def one_pass_kernel(
    x, skip, weight, bias, scale, shift, mean, rstd, y, x_batch, x_pixel, skip_batch, skip_pixel, step,
    scale_row, shift_row, y_batch, y_pixel, y_step, pixels, items, width, split, channels, groups, blocks,
    eps, seed, largest_dropped, factor,
    SKIP: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Statistics of SLOTS whole groups of a picture, then their normalised pixels."""
    block = tl.program_id(0) % blocks
    batch = tl.program_id(0) // blocks
    first_group = block * SLOTS
    lane = tl.arange(0, LANES)
    channel = block * (SLOTS * GROUP_CHANNELS) + lane
    lanes = (lane < SLOTS * GROUP_CHANNELS) & (channel < channels)
    picture = batch.to(tl.int64)
    x += picture * x_batch
    skip += picture * skip_batch
    lane_mean, squares = channel_moments(
        x, skip, 0, pixels, channel, lanes, split, x_pixel, skip_pixel, step, SKIP, ROWS, LANES
    )
    member = members(channel, lanes, first_group, GROUP_CHANNELS, SLOTS)
    _, group_mean, group_squares = slot_moments(lane_mean, squares, pixels * 1.0, member)
    group_rstd = tl.rsqrt(group_squares / (pixels * 1.0 * GROUP_CHANNELS) + eps)
    group = first_group + tl.arange(0, SLOTS)
    tl.store(mean + batch * groups + group, group_mean, mask=group < groups)
    tl.store(rstd + batch * groups + group, group_rstd, mask=group < groups)
    gain, offset = film(weight, bias, scale, shift, batch, scale_row, shift_row, channel, lanes, FILM)
    write_rows(
        x, skip, y + picture * y_batch, 0, items, width, to_lanes(group_mean, member),
        gain * to_lanes(group_rstd, member), offset, channel, lanes, split, x_pixel, skip_pixel, step,
        y_pixel, y_step, seed, largest_dropped, factor, batch, block * (SLOTS * GROUP_CHANNELS), channels,
        SKIP, SILU, MODE, DROPOUT, ROWS, LANES,
    )  # fmt: skip


def normalise(
    norm: Norm,
    x: Tensor,  # [B, C, *space]
    skip: Tensor | None = None,  # [B, S, *space]
    *,
    memory_format: torch.memory_format,
    saved: Statistics | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Statistics]:
    """The norm of x and skip side by side in ``dtype``, or in theirs, and its statistics.

    These are not computed where they are `saved` already, nor read from maps whose moments are at hand.
    """
    saved = saved or statistics_of(x, skip, norm.groups, norm.eps)
    call = _Call(norm, x, skip, memory_format, saved, dtype or x.dtype)
    if call.y.numel() > 0:
        configurations.run(
            call.table, x.device, 8 * x.element_size(), call.pixels, lambda each: start(call.launches(each))
        )
    return call.y, call.statistics


class _Call:
    """One call: its results, and the launches that fill them."""

    def __init__(
        self,
        norm: Norm,
        x: Tensor,
        skip: Tensor | None,
        memory_format: torch.memory_format,
        saved: Statistics | None,
        dtype: torch.dtype,
    ) -> None:
        own, other = tiles.side_by_side(x, skip)
        self.batch, self.groups = x.shape[0], norm.groups
        self.channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        self.group_channels = self.channels // norm.groups
        shape = [self.batch, self.channels, *resampled_shape(x, norm.mode)[2:]]
        self.y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
        self.saved = saved is not None
        self.statistics = saved or Statistics.empty(x, norm.groups)
        self.pixels = tiles.pixels_of(x)
        self.items = min(self.pixels, tiles.pixels_of(self.y))  # what the loops of `write_rows` count
        result = tiles.as_map(self.y)
        self.maps: dict[str, Any] = {
            "x": own.tensor, "skip": other.tensor, "x_batch": own.batch, "x_pixel": own.pixel,
            "skip_batch": other.batch, "skip_pixel": other.pixel, "step": own.channel, "pixels": self.pixels,
            "split": x.shape[1], "channels": self.channels, "SKIP": skip is not None, "groups": norm.groups,
        }  # fmt: skip
        self.results: dict[str, Any] = {
            **norm.arguments, "mean": self.statistics.mean, "rstd": self.statistics.rstd, "y": self.y,
            "y_batch": result.batch, "y_pixel": result.pixel, "y_step": result.channel, "items": self.items,
            "width": x.shape[-1], "eps": norm.eps,
        }  # fmt: skip

    @property
    def table(self) -> str:
        """The rows of the table of configurations that serve this call."""
        small = self.pixels <= ONE_PASS_PIXELS and self._own_lanes <= ONE_PASS_LANES
        if small and not self.saved:
            return "group_norm_one_pass"
        return "dropped_group_norm" if self.results["DROPOUT"] else "group_norm"

    def launches(self, configuration: Configuration) -> list[Launch]:
        """The launches, by a configuration of `table`."""
        if self.table == "group_norm_one_pass":
            return [self._one_pass(configuration)]
        configuration = tiles.unlimited(configuration, self.channels, self.maps["split"])
        cut = Cut.of(self.batch, self.channels, self.groups, self.pixels, configuration)
        if self.saved:
            absent = {"moments": self.statistics.mean, "plane": 0, **cut.arguments, "chunks": 1}
            return [self._apply(configuration, cut, absent)]
        moments = self.statistics.mean.new_empty((2, self.batch, self.groups, cut.chunks, cut.parts))
        partial = {"moments": moments, "plane": moments.numel() // 2, **cut.arguments}
        programs = self.batch * cut.blocks * cut.chunks
        first = Launch(statistics_kernel, programs, {**self.maps, **partial}, configuration)
        return [first, self._apply(configuration, cut, partial)]

    @property
    def _own_groups(self) -> int:
        """Groups of a one-pass program: their channels are a multiple of 8, 16 bytes of 16-bit numbers."""
        return 8 // math.gcd(8, self.group_channels)

    @property
    def _own_lanes(self) -> int:
        return tiles.power_of_two(self.group_channels * self._own_groups)

    def _one_pass(self, configuration: Configuration) -> Launch:
        rows = max(configuration.rows * configuration.columns // self._own_lanes, 1)
        blocks = triton.cdiv(self.groups, self._own_groups)
        cut = {
            "blocks": blocks, "ROWS": min(rows, tiles.power_of_two(self.pixels)), "LANES": self._own_lanes,
            "SLOTS": self._own_groups, "GROUP_CHANNELS": self.group_channels,
        }  # fmt: skip
        arguments = {**self.maps, **self.results, **cut}
        return Launch(one_pass_kernel, self.batch * blocks, arguments, configuration)

    def _apply(self, configuration: Configuration, cut: Cut, moments: dict[str, Any]) -> Launch:
        halved = self.items < self.pixels  # each tile is the sum of four
        rows = max(cut.rows // 2, 1) if halved else cut.rows
        runs, run_items = tiles.divide(self.items, rows, tiles.PROGRAMS // (self.batch * cut.blocks))
        arguments = {
            **self.maps, **self.results, **moments, "runs": runs, "run_items": run_items, "SAVED": self.saved,
            "ROWS": rows, "CHUNKS": tiles.power_of_two(moments["chunks"]),
        }  # fmt: skip
        return Launch(apply_kernel, self.batch * cut.blocks * runs, arguments, configuration)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `group_norm`; what the kernels do not cover goes to the default."""
    if not tiles.covered(x, mode):
        result: tuple[Tensor, Tensor, Tensor] = dispatch.default("group_norm")(
            x, weight, bias, scale, shift, groups, eps, silu, mode
        )
        return result
    norm = Norm(weight, bias, scale, shift, groups, eps, silu, mode)
    y, statistics = normalise(norm, x, memory_format=reference.memory_format(x))
    return y, statistics.mean, statistics.rstd


def cases(target: str, dropout: float = 0.0) -> Iterator[Case]:
    """What is compiled to be measured: the maps of the models, in 16 bits; if dropped, those that are."""
    for pixels, channels, skip, modulated, mode in CASES:
        if dropout and (skip or mode):
            continue
        side = math.isqrt(pixels)
        own, other = (
            torch.empty(2, each, side, side, dtype=torch.float16, device="meta").contiguous(
                memory_format=torch.channels_last
            )
            for each in (channels, skip)
        )
        norm = Norm.blank(channels + skip, batch=2, film=modulated, mode=mode, dropout=dropout)
        call = _Call(norm, own, other if skip else None, torch.channels_last, None, own.dtype)
        configuration = configurations.choose(call.table, target, 16, pixels)
        kind = f"{side}²x{channels}+{skip} film {modulated} mode {mode}{' dropout' if dropout else ''}"
        for launch in call.launches(configuration):
            name = launch.kernel.__name__.removesuffix("_kernel")
            yield launch.case(f"group_norm {name} {kind}")
