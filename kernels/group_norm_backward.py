"""Gradients of GroupNorm with affine, FiLM, SiLU and 2x resampling, in two launches.

With n the normalised input, z = n gain + offset, and dz the gradient that arrives at z, every gradient is
made of two sums over the pixels of a channel, S = sum dz and T = sum dz n:

    dscale = T weight + S bias        dweight = sum over pictures of T (1 + scale)
    dshift = S                        dbias = sum over pictures of S (1 + scale)
    dx = (dz gain - mean of dz gain over the group - n times mean of dz gain n over the group) / deviation

`sums` writes S and T of every (chunk of pixels, channel), and what they come to for groups; `dx` computes n
and dz again, puts its groups' sums together in a fixed order, and its first programs write the parameters'
gradients. Saved are x, the statistics and nothing else. There are no atomics; all arithmetic is float32.

Bytes of 16-bit maps: 10 an element (x and the gradient twice, dx), of which L2 gives 4 back where they fit;
2 more with a summand, which is another path's gradient of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
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
    entry,
    film,
    group_block,
    group_totals,
    members,
    to_lanes,
    to_slots,
)
from glide_fast.kernels.plan import Launch, start
from glide_fast.ops import dispatch, reference
from glide_fast.ops.group_norm import resampled_shape

# Pixels, channels, FiLM, resampling of what is compiled to be measured.
CASES = (
    (64, 768, True, reference.RESAMPLE_NONE),
    (1024, 384, True, reference.RESAMPLE_NONE),
    (1024, 576, False, reference.RESAMPLE_UP),
    (4096, 192, True, reference.RESAMPLE_NONE),
    (4096, 192, False, reference.RESAMPLE_DOWN),
)


@triton.jit
def load_gradient(
    grad, pixel, inside, channel, lanes, width, height, grad_pixel, grad_step, MODE: tl.constexpr
):  # fmt: skip
    """What arrives at the map before it was resampled, float32 [ROWS, LANES]."""
    columns = (channel * grad_step)[None, :]
    if MODE == MODE_UP:
        corner = pixel // width * 4 * width + pixel % width * 2
        total = tl.zeros([pixel.shape[0], channel.shape[0]], tl.float32)
        for place in tl.static_range(4):
            near = corner + place // 2 * 2 * width + place % 2
            near = near[:, None] * grad_pixel + columns
            total += tl.load(grad + near, mask=inside[:, None] & lanes[None, :], other=0.0).to(tl.float32)
        return total
    if MODE == MODE_DOWN:
        row = pixel // width
        column = pixel % width
        inside &= (row < height // 2 * 2) & (column < width // 2 * 2)
        pixel = row // 2 * (width // 2) + column // 2
    at = pixel[:, None] * grad_pixel + columns
    tile = tl.load(grad + at, mask=inside[:, None] & lanes[None, :], other=0.0).to(tl.float32)
    if MODE == MODE_DOWN:
        tile *= 0.25
    return tile


@triton.jit
def tile_gradient(
    x, grad, first, stop, channel, lanes, mean, gain, offset, width, height, x_pixel, step, grad_pixel,
    grad_step, seed, largest_dropped, factor, batch, first_channel, channels, SILU: tl.constexpr,
    MODE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """x - mean of the pixels from `first` on, and what arrives at z = (x - mean) gain + offset."""
    pixel = first + tl.arange(0, ROWS)
    inside = pixel < stop
    if DROPOUT:
        kept = dropout.kept(seed, largest_dropped, batch, pixel, first_channel, channels, LANES)
    at = pixel[:, None] * x_pixel + (channel * step)[None, :]
    tile = tl.load(x + at, mask=inside[:, None] & lanes[None, :], other=0.0).to(tl.float32)
    centred = tile - mean[None, :]
    dz = load_gradient(grad, pixel, inside, channel, lanes, width, height, grad_pixel, grad_step, MODE)
    if SILU:
        z = centred * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    if DROPOUT:
        dz = tl.where(kept, dz * factor, 0.0)
    return centred, dz


@triton.jit(do_not_specialize=dropout.PLAIN)
def sums_kernel(
    x, grad, weight, bias, scale, shift, mean, rstd, channel_sums, group_sums, channel_plane, group_plane,
    x_batch, x_pixel, step, grad_batch, grad_pixel, grad_step, scale_row, shift_row, pixels, width, height,
    channels, groups, chunks, chunk_pixels, parts, blocks, seed, largest_dropped, factor,
    FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """S and T [2, B, chunks, C] of a chunk of pixels, and what they come to for the groups' parts of it.

    T is that of x - mean, not divided by the deviation yet; the groups' sums [2, B, G, chunks, parts] are
    those of S gain / deviation and T gain / deviation.
    """
    program = tl.program_id(0)
    block = program % blocks
    chunk = program // blocks % chunks
    batch = program // blocks // chunks
    group_channels = channels // groups
    channel = block * LANES + tl.arange(0, LANES)
    lanes = channel < channels
    statistic = batch * groups + channel // group_channels
    lane_mean = tl.load(mean + statistic, mask=lanes, other=0.0)
    gain, offset = film(weight, bias, scale, shift, batch, scale_row, shift_row, channel, lanes, FILM)
    gain *= tl.load(rstd + statistic, mask=lanes, other=0.0)
    picture = batch.to(tl.int64)
    x += picture * x_batch
    grad += picture * grad_batch
    first_sums = tl.zeros([ROWS, LANES], tl.float32)
    second_sums = tl.zeros([ROWS, LANES], tl.float32)
    begin = chunk * chunk_pixels
    stop = tl.minimum(begin + chunk_pixels, pixels)
    for first in range(begin, stop, ROWS):
        centred, dz = tile_gradient(
            x, grad, first, stop, channel, lanes, lane_mean, gain, offset, width, height, x_pixel, step,
            grad_pixel, grad_step, seed, largest_dropped, factor, batch, block * LANES, channels, SILU, MODE,
            DROPOUT, ROWS, LANES,
        )  # fmt: skip
        first_sums += dz
        second_sums += dz * centred
    total = tl.sum(first_sums, axis=0)
    centred_total = tl.sum(second_sums, axis=0)
    at = (batch * chunks + chunk) * channels + channel
    tl.store(channel_sums + at, total, mask=lanes)
    tl.store(channel_sums + channel_plane + at, centred_total, mask=lanes)
    first_group = block * LANES // group_channels
    member = members(channel, lanes, first_group, group_channels, SLOTS)
    group = first_group + tl.arange(0, SLOTS)
    part = block - group * group_channels // LANES
    at = entry(batch, group, groups, chunk, chunks, part, parts)
    there = (group < groups) & (group_block(group, part, group_channels, LANES) > 0)
    tl.store(group_sums + at, to_slots(gain * total, member), mask=there)
    tl.store(group_sums + group_plane + at, to_slots(gain * centred_total, member), mask=there)


@triton.jit
def write_parameters(
    channel_sums, plane, rstd, scale, scale_row, grad_weight, grad_bias, rows, chunks, channels, groups,
    channel, lanes, FILM: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of a tile column: sums over the batch and its chunks."""
    weight_total = tl.zeros([LANES], tl.float32)
    bias_total = tl.zeros([LANES], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & lanes[None, :]
        at = row[:, None] * channels + channel[None, :]
        total = tl.load(channel_sums + at, mask=there, other=0.0)
        normal_total = tl.load(channel_sums + plane + at, mask=there, other=0.0)
        at = (row // chunks * groups)[:, None] + (channel // (channels // groups))[None, :]
        normal_total *= tl.load(rstd + at, mask=there, other=0.0)
        if FILM:
            at = (row // chunks)[:, None] * scale_row + channel[None, :]
            factor = 1.0 + tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
            total *= factor
            normal_total *= factor
        bias_total += tl.sum(total, axis=0)
        weight_total += tl.sum(normal_total, axis=0)
    tl.store(grad_weight + channel, weight_total.to(grad_weight.dtype.element_ty), mask=lanes)
    tl.store(grad_bias + channel, bias_total.to(grad_bias.dtype.element_ty), mask=lanes)


@triton.jit
def write_film(
    channel_sums, plane, rstd, weight, bias, grad_scale, grad_shift, batch, chunks, channels, groups, channel,
    lanes, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dscale and dshift of a picture's tile column."""
    chunk = tl.arange(0, CHUNKS)
    at = (batch * chunks + chunk)[:, None] * channels + channel[None, :]
    there = (chunk < chunks)[:, None] & lanes[None, :]
    total = tl.sum(tl.load(channel_sums + at, mask=there, other=0.0), axis=0)
    normal_total = tl.sum(tl.load(channel_sums + plane + at, mask=there, other=0.0), axis=0)
    factor = tl.load(weight + channel, mask=lanes, other=0.0).to(tl.float32)
    summand = tl.load(bias + channel, mask=lanes, other=0.0).to(tl.float32)
    at = batch * groups + channel // (channels // groups)
    scale = normal_total * tl.load(rstd + at, mask=lanes, other=0.0) * factor + total * summand
    at = batch * channels + channel
    tl.store(grad_scale + at, scale.to(grad_scale.dtype.element_ty), mask=lanes)
    tl.store(grad_shift + at, total.to(grad_shift.dtype.element_ty), mask=lanes)


@triton.jit(do_not_specialize=dropout.PLAIN)
def dx_kernel(
    x, grad, weight, bias, scale, shift, mean, rstd, channel_sums, group_sums, grad_x, grad_weight, grad_bias,
    grad_scale, grad_shift, summand, channel_plane, group_plane, x_batch, x_pixel, step, grad_batch,
    grad_pixel, grad_step, summand_batch, summand_pixel, summand_step, dx_batch, dx_pixel, dx_step,
    scale_row, shift_row, batches, pixels, width, height, channels, groups, chunks, parts, blocks, runs,
    run_pixels, seed, largest_dropped, factor,
    FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, SUMMAND: tl.constexpr,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients by the first `blocks` programs, those of x and FiLM by the others."""
    block = tl.program_id(0) % blocks
    channel = block * LANES + tl.arange(0, LANES)
    lanes = channel < channels
    if tl.program_id(0) < blocks:
        write_parameters(
            channel_sums, channel_plane, rstd, scale, scale_row, grad_weight, grad_bias, batches * chunks,
            chunks, channels, groups, channel, lanes, FILM, ROWS, LANES,
        )  # fmt: skip
    else:
        program = tl.program_id(0) // blocks - 1
        run = program % runs
        batch = program // runs
        group_channels = channels // groups
        if FILM and run == 0:
            write_film(
                channel_sums, channel_plane, rstd, weight, bias, grad_scale, grad_shift, batch, chunks,
                channels, groups, channel, lanes, CHUNKS,
            )  # fmt: skip
        first_group = block * LANES // group_channels
        group = first_group + tl.arange(0, SLOTS)
        member = members(channel, lanes, first_group, group_channels, SLOTS)
        share = 1.0 / (pixels * 1.0 * group_channels)
        group_share = share * group_totals(
            group_sums, batch, group, groups, group_channels, chunks, parts, LANES, CHUNKS
        )
        group_slope = share * group_totals(
            group_sums + group_plane, batch, group, groups, group_channels, chunks, parts, LANES, CHUNKS
        )
        statistic = batch * groups + channel // group_channels
        lane_mean = tl.load(mean + statistic, mask=lanes, other=0.0)
        lane_rstd = tl.load(rstd + statistic, mask=lanes, other=0.0)
        gain, offset = film(weight, bias, scale, shift, batch, scale_row, shift_row, channel, lanes, FILM)
        gain *= lane_rstd
        lane_share = to_lanes(group_share, member)
        lane_slope = to_lanes(group_slope, member) * lane_rstd * lane_rstd
        picture = batch.to(tl.int64)
        begin = run * run_pixels
        stop = tl.minimum(begin + run_pixels, pixels)
        for first in range(begin, stop, ROWS):
            centred, dz = tile_gradient(
                x + picture * x_batch, grad + picture * grad_batch, first, stop, channel, lanes, lane_mean,
                gain, offset, width, height, x_pixel, step, grad_pixel, grad_step, seed, largest_dropped,
                factor, batch, block * LANES, channels, SILU, MODE, DROPOUT, ROWS, LANES,
            )  # fmt: skip
            dx = dz * gain[None, :] - lane_share[None, :] - centred * lane_slope[None, :]
            pixel = first + tl.arange(0, ROWS)
            at = pixel[:, None] * dx_pixel + (channel * dx_step)[None, :]
            within = (pixel < stop)[:, None] & lanes[None, :]
            if SUMMAND:
                near = pixel[:, None] * summand_pixel + (channel * summand_step)[None, :]
                more = tl.load(summand + picture * summand_batch + near, mask=within, other=0.0)
                dx += more.to(tl.float32)
            tl.store(grad_x + picture * dx_batch + at, dx.to(grad_x.dtype.element_ty), mask=within)


class _Call:
    """One call: its gradients, and the launches that fill them."""

    def __init__(
        self, norm: Norm, grad: Tensor, x: Tensor, statistics: Statistics, summand: Tensor | None
    ) -> None:
        own, arriving = tiles.as_map(x), tiles.as_map(grad)
        added = own if summand is None else tiles.as_map(summand)
        self.batch, self.channels = x.shape[:2]
        self.groups = statistics.mean.shape[1]
        self.pixels = tiles.pixels_of(x)
        self.x = torch.empty(
            x.shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x)
        )
        written = tiles.as_map(self.x)
        self.parameters = [torch.empty_like(each) for each in (norm.weight, norm.bias)]
        self.film = [
            x.new_empty(0) if each is None else each.new_empty(each.shape)
            for each in (norm.scale, norm.shift)
        ]
        self.maps: dict[str, Any] = {
            **norm.arguments, "x": own.tensor, "grad": arriving.tensor, "mean": statistics.mean,
            "rstd": statistics.rstd, "x_batch": own.batch, "x_pixel": own.pixel, "step": own.channel,
            "grad_batch": arriving.batch, "grad_pixel": arriving.pixel, "grad_step": arriving.channel,
            "pixels": self.pixels, "width": x.shape[-1], "height": x.shape[2], "channels": self.channels,
            "groups": self.groups,
        }  # fmt: skip
        self.results: dict[str, Any] = {
            "grad_x": self.x, "grad_weight": self.parameters[0], "grad_bias": self.parameters[1],
            "grad_scale": self.film[0], "grad_shift": self.film[1], "dx_batch": written.batch,
            "dx_pixel": written.pixel, "dx_step": written.channel, "batches": self.batch,
            "summand": added.tensor, "summand_batch": added.batch, "summand_pixel": added.pixel,
            "summand_step": added.channel, "SUMMAND": summand is not None,
        }  # fmt: skip

    @property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those of x, weight, bias, scale, shift; the last two are empty where FiLM is absent."""
        return self.x, self.parameters[0], self.parameters[1], self.film[0], self.film[1]

    @property
    def table(self) -> str:
        """The rows of the table of configurations that serve this call."""
        return "dropped_group_norm_backward" if self.maps["DROPOUT"] else "group_norm_backward"

    def launches(self, configuration: Configuration) -> list[Launch]:
        """Both launches, by a configuration of `table`."""
        cut = Cut.of(self.batch, self.channels, self.groups, self.pixels, configuration)
        shapes = ((self.batch, cut.chunks, self.channels), (self.batch, self.groups, cut.chunks, cut.parts))
        channel_sums, group_sums = (
            torch.empty((2, *shape), dtype=torch.float32, device=self.x.device) for shape in shapes
        )
        arguments = {
            **self.maps, **cut.arguments, "channel_sums": channel_sums, "group_sums": group_sums,
            "channel_plane": channel_sums.numel() // 2, "group_plane": group_sums.numel() // 2,
        }  # fmt: skip
        limited = tiles.unlimited(configuration, self.channels)
        sums = Launch(sums_kernel, self.batch * cut.blocks * cut.chunks, arguments, limited)
        runs, run_pixels = tiles.divide(self.pixels, cut.rows, tiles.PROGRAMS // (self.batch * cut.blocks))
        arguments = {
            **arguments, **self.results, "runs": runs, "run_pixels": run_pixels,
            "CHUNKS": tiles.power_of_two(cut.chunks),
        }  # fmt: skip
        free = replace(configuration, registers=None)  # it needs no more anyway but on the smallest maps
        dx = Launch(dx_kernel, cut.blocks * (1 + self.batch * runs), arguments, free)
        return [sums, dx]


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    mode: int,
    summand: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `group_norm_backward`; what the kernels do not cover goes to the default."""
    if not tiles.covered(x, mode):
        result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = dispatch.default("group_norm_backward")(
            grad, x, weight, bias, scale, shift, mean, rstd, silu, mode, summand
        )
        return result
    norm = Norm(weight, bias, scale, shift, mean.shape[1], 0.0, silu, mode)
    return gradients(norm, grad, x, Statistics(mean, rstd), summand)


def gradients(
    norm: Norm, grad: Tensor, x: Tensor, statistics: Statistics, summand: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a norm's gradient comes to for x (plus ``summand``), weight, bias, scale, shift."""
    call = _Call(norm, grad, x, statistics, summand)
    if x.numel() == 0:
        for each in call.parameters:
            each.zero_()
        return call.gradients
    bits = 8 * x.element_size()
    configurations.run(call.table, x.device, bits, call.pixels, lambda each: start(call.launches(each)))
    return call.gradients


def cases(target: str, dropout: float = 0.0) -> Iterator[Case]:
    """What is compiled to be measured: the maps of the models, in 16 bits; if dropped, those that are."""
    for pixels, channels, modulated, mode in CASES:
        if dropout and mode:
            continue
        side = math.isqrt(pixels)
        x = torch.empty(2, channels, side, side, dtype=torch.float16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        norm = Norm.blank(channels, batch=2, film=modulated, mode=mode, dropout=dropout)
        grad = x.new_empty(resampled_shape(x, mode)).contiguous(memory_format=torch.channels_last)
        call = _Call(norm, grad, x, Statistics.empty(x, norm.groups), None if dropout else x)
        kind = f"{side}²x{channels} film {modulated} mode {mode}{' dropout' if dropout else ''}"
        for launch in call.launches(configurations.choose(call.table, target, 16, pixels)):
            name = launch.kernel.__name__.removesuffix("_kernel")
            yield launch.case(f"group_norm_backward {name} {kind}")
