"""Gradients of GroupNorm with affine, FiLM, SiLU and 2x resampling, of one map or two, in two launches.

With n the normalised input, z = n gain + offset, and dz the gradient that arrives at z, every gradient is
made of two sums over the pixels of a channel, S = sum dz and T = sum dz n:

    dscale = T weight + S bias        dweight = sum over pictures of T (1 + scale)
    dshift = S                        dbias = sum over pictures of S (1 + scale)
    dx = (dz gain - mean of dz gain over the group - n times mean of dz gain n over the group) / deviation

`sums_kernel` writes S and T of every (chunk of pixels, channel), and what they come to for groups;
`dx_kernel` computes n and dz again, puts its groups' sums together in a fixed order, and its first programs
write the parameters' gradients. Saved are x, the statistics and nothing else. All arithmetic is float32.
Two maps are read where they lie, and have one gradient, whose first channels are those of x.

The sums of dx over all pixels, the gradient of a bias before the norm, are made of parts that each program
leaves: who arrives last at a counter of its tile column adds them, in a fixed order. A number is counted so,
none is summed: the bits are the same every time.

Bytes of 16-bit maps: 10 an element (x and the gradient twice, dx), of which L2 gives 4 back where they fit;
2 more for each summand, which is another path's gradient of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, dropout
from glide_fast.kernels import group_norm_tiles as tiles
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.group_norm_sums import sums_kernel, tile_gradient
from glide_fast.kernels.group_norm_tiles import (
    Cut,
    Norm,
    Statistics,
    film,
    group_totals,
    members,
    to_lanes,
)
from glide_fast.kernels.plan import Launch, start
from glide_fast.ops import dispatch, reference
from glide_fast.ops.column_sums import COPIES
from glide_fast.ops.group_norm import resampled_shape

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Pixels, channels of x and of the skip, FiLM, resampling of what is compiled to be measured.
CASES = (
    (64, 768, 0, True, reference.RESAMPLE_NONE),
    (1024, 384, 0, True, reference.RESAMPLE_NONE),
    (1024, 576, 0, False, reference.RESAMPLE_UP),
    (4096, 192, 0, True, reference.RESAMPLE_NONE),
    (4096, 384, 192, False, reference.RESAMPLE_NONE),
    (4096, 192, 0, False, reference.RESAMPLE_DOWN),
)


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


@triton.jit
def load_summand(summand, pixel, within, channel, summand_pixel, summand_step):
    """Another path's gradient of a tile, float32 [ROWS, LANES]."""
    near = pixel[:, None] * summand_pixel + (channel * summand_step)[None, :]
    return tl.load(summand + near, mask=within, other=0.0).to(tl.float32)


@triton.jit
def write_column_sums(
    total, column_parts, column_sums, arrived, part, parts, channels, channel, lanes, COPIES: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Leave a program's part [C] of the sums of dx; the last one of a tile column puts all together."""
    tl.store(column_parts + part * channels + channel, total, mask=lanes)
    tl.debug_barrier()  # all threads have stored before one of them counts
    if tl.atomic_add(arrived, 1, sem="acq_rel") == parts - 1:
        sums = tl.zeros([ROWS, LANES], tl.float32)
        for first in range(0, parts, ROWS):
            row = first + tl.arange(0, ROWS)
            there = (row < parts)[:, None] & lanes[None, :]
            at = row[:, None] * channels + channel[None, :]
            sums += tl.load(column_parts + at, mask=there, other=0.0, cache_modifier=".cg")
        result = tl.sum(sums, axis=0).to(column_sums.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(column_sums + copy * channels + channel, result, mask=lanes)


@triton.jit(do_not_specialize=dropout.PLAIN)
def dx_kernel(
    x, skip, grad, weight, bias, scale, shift, mean, rstd, channel_sums, group_sums, grad_x, grad_weight,
    grad_bias, grad_scale, grad_shift, summand, second, column_parts, column_sums, arrived, channel_plane,
    group_plane, x_batch, x_pixel, skip_batch, skip_pixel, step, grad_batch, grad_pixel, grad_step,
    summand_batch, summand_pixel, summand_step, second_batch, second_pixel, second_step, dx_batch, dx_pixel,
    dx_step, scale_row, shift_row, batches, pixels, width, height, split, channels, groups, chunks, parts,
    blocks, runs, run_pixels, seed, largest_dropped, factor,
    SKIP: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, SUMMANDS: tl.constexpr,
    DROPOUT: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
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
        lane_slope = to_lanes(group_slope, member) * lane_rstd * lane_rstd
        # With x as it is, not centred, a thread keeps one number a channel less.
        offset -= lane_mean * gain
        lane_share = to_lanes(group_share, member) - lane_mean * lane_slope
        center = tl.zeros([LANES], tl.float32)
        picture = batch.to(tl.int64)
        begin = run * run_pixels
        stop = tl.minimum(begin + run_pixels, pixels)
        columns = tl.zeros([ROWS, LANES], tl.float32)
        for first in range(begin, stop, ROWS):
            tile, dz, _ = tile_gradient(
                x + picture * x_batch, skip + picture * skip_batch, grad + picture * grad_batch, first, stop,
                channel, lanes, split, center, gain, offset, width, height, x_pixel, skip_pixel, step,
                grad_pixel, grad_step, seed, largest_dropped, factor, batch, block * LANES, channels, SKIP,
                SILU, MODE, DROPOUT, ROWS, LANES,
            )  # fmt: skip
            dx = dz * gain[None, :] - lane_share[None, :] - tile * lane_slope[None, :]
            pixel = first + tl.arange(0, ROWS)
            at = pixel[:, None] * dx_pixel + (channel * dx_step)[None, :]
            within = (pixel < stop)[:, None] & lanes[None, :]
            if SUMMANDS > 0:
                near = summand + picture * summand_batch
                dx += load_summand(near, pixel, within, channel, summand_pixel, summand_step)
            if SUMMANDS > 1:
                near = second + picture * second_batch
                dx += load_summand(near, pixel, within, channel, second_pixel, second_step)
            tl.store(grad_x + picture * dx_batch + at, dx.to(grad_x.dtype.element_ty), mask=within)
            if COPIES:
                columns += tl.where(within, dx, 0.0)
        if COPIES:
            write_column_sums(
                tl.sum(columns, axis=0), column_parts, column_sums, arrived + block, program,
                batches * runs, channels, channel, lanes, COPIES, ROWS, LANES,
            )  # fmt: skip


@dataclass(frozen=True)
class Further:
    """What one call reads besides, and what it leaves."""

    summand: Tensor | None = None  # like x, added to its gradient
    second: Tensor | None = None  # likewise; only with a summand
    sums: int = 0  # copies of the sums of x's gradient over all pixels
    activated: Tensor | None = None  # like x, to be filled with the norm's own result
    skip: Tensor | None = None  # more channels behind those of x; then the maps above have both


class _Call:
    """One call: its gradients, and the launches that fill them."""

    def __init__(self, norm: Norm, grad: Tensor, x: Tensor, statistics: Statistics, further: Further) -> None:
        (own, other), arriving = tiles.side_by_side(x, further.skip), tiles.as_map(grad)
        self.batch, self.channels = len(x), len(norm.weight)
        self.groups = statistics.mean.shape[1]
        self.pixels = tiles.pixels_of(x)
        shape = (self.batch, self.channels, *x.shape[2:])
        self.x = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))
        self.parameters = [torch.empty_like(each) for each in (norm.weight, norm.bias)]
        self.film = [
            x.new_empty(0) if each is None else each.new_empty(each.shape)
            for each in (norm.scale, norm.shift)
        ]
        self.sums = reference.empty_sums(x, self.channels, further.sums)
        self.maps: dict[str, Any] = {
            **norm.arguments, **_map("x", own), **_map("skip", other), "step": own.channel,
            "split": x.shape[1], "SKIP": further.skip is not None, **_map("grad", arriving),
            "grad_step": arriving.channel, "mean": statistics.mean, "rstd": statistics.rstd,
            **_strided("activated", further.activated, x), "ACTIVATED": further.activated is not None,
            "pixels": self.pixels, "width": x.shape[-1], "height": x.shape[2], "channels": self.channels,
            "groups": self.groups, "COPIES": further.sums,
        }  # fmt: skip
        written = tiles.as_map(self.x)
        self.results: dict[str, Any] = {
            "grad_x": self.x, "grad_weight": self.parameters[0], "grad_bias": self.parameters[1],
            "grad_scale": self.film[0], "grad_shift": self.film[1], "dx_batch": written.batch,
            "dx_pixel": written.pixel, "dx_step": written.channel, "batches": self.batch,
            **_strided("summand", further.summand, x), **_strided("second", further.second, x),
            "SUMMANDS": sum(each is not None for each in (further.summand, further.second)),
            "column_sums": self.sums,
        }  # fmt: skip

    @property
    def gradients(self) -> Gradients:
        """Those of x, weight, bias, scale, shift, and x's sums; empty are FiLM's where it is absent."""
        return self.x, self.parameters[0], self.parameters[1], self.film[0], self.film[1], self.sums

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
            "arrived": torch.empty(cut.blocks, dtype=torch.int32, device=self.x.device),
        }  # fmt: skip
        limited = tiles.unlimited(configuration, self.channels, self.maps["split"])
        sums = Launch(sums_kernel, self.batch * cut.blocks * cut.chunks, arguments, limited)
        runs, run_pixels = tiles.divide(self.pixels, cut.rows, tiles.PROGRAMS // (self.batch * cut.blocks))
        parts = (self.batch * runs, self.channels) if len(self.sums) else 0
        arguments = {
            **arguments, **self.results, "runs": runs, "run_pixels": run_pixels,
            "column_parts": torch.empty(parts, dtype=torch.float32, device=self.x.device),
            "CHUNKS": tiles.power_of_two(cut.chunks),
        }  # fmt: skip
        dx = Launch(dx_kernel, cut.blocks * (1 + self.batch * runs), arguments, limited)
        return [sums, dx]


def _map(name: str, view: tiles.Map) -> dict[str, Any]:
    return {name: view.tensor, f"{name}_batch": view.batch, f"{name}_pixel": view.pixel}


def _strided(name: str, tensor: Tensor | None, instead: Tensor) -> dict[str, Any]:
    """A map with a step of its own between channels; where it is absent, one that is not read."""
    view = tiles.as_map(instead if tensor is None else tensor)
    return {**_map(name, view), f"{name}_step": view.channel}


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
    sums: int = 0,
) -> Gradients:
    """The op `group_norm_backward`; what the kernels do not cover goes to the default."""
    if not tiles.covered(x, mode):
        result: Gradients = dispatch.default("group_norm_backward")(
            grad, x, weight, bias, scale, shift, mean, rstd, silu, mode, summand, sums
        )
        return result
    norm = Norm(weight, bias, scale, shift, mean.shape[1], 0.0, silu, mode)
    return gradients(norm, grad, x, Statistics(mean, rstd), Further(summand, sums=sums))


def gradients(norm: Norm, grad: Tensor, x: Tensor, statistics: Statistics, further: Further) -> Gradients:
    """What a norm's gradient comes to for x (plus summands), weight, bias, scale, shift; and x's sums."""
    call = _Call(norm, grad, x, statistics, further)
    if x.numel() == 0:
        for each in (*call.parameters, call.sums):
            each.zero_()
        return call.gradients
    bits = 8 * x.element_size()
    configurations.run(call.table, x.device, bits, call.pixels, lambda each: start(call.launches(each)))
    return call.gradients


def cases(target: str, dropout: float = 0.0) -> Iterator[Case]:
    """What is compiled to be measured: the maps of the models, in 16 bits; if dropped, those that are."""
    for pixels, channels, skip, modulated, mode in CASES:
        if dropout and (skip or mode):
            continue
        side = math.isqrt(pixels)
        x, other, both = (
            torch.empty(2, each, side, side, dtype=torch.float16, device="meta").contiguous(
                memory_format=torch.channels_last
            )
            for each in (channels, skip, channels + skip)
        )
        norm = Norm.blank(channels + skip, batch=2, film=modulated, mode=mode, dropout=dropout)
        grad = x.new_empty(resampled_shape(both, mode)).contiguous(memory_format=torch.channels_last)
        activated = None if mode or dropout else both
        further = Further(None if dropout else both, None, COPIES, activated, other if skip else None)
        call = _Call(norm, grad, x, Statistics.empty(x, norm.groups), further)
        width = f"{channels}+{skip}" if skip else f"{channels}"
        kind = f"{side}²x{width} film {modulated} mode {mode}{' dropout' if dropout else ''}"
        for launch in call.launches(configurations.choose(call.table, target, 16, pixels)):
            name = launch.kernel.__name__.removesuffix("_kernel")
            yield launch.case(f"group_norm_backward {name} {kind}")
