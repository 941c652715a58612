"""The first launch of GroupNorm's gradients: the sums over pixels that all of them are made of.

With n the normalised input, z = n gain + offset, and dz the gradient that arrives at z, `sums_kernel` writes
S = sum dz and T = sum dz n of every (chunk of pixels, channel), and what they come to for groups. As it has z
at hand it also writes the activated map, where that is wanted for the gradient of what followed.

Bytes of 16-bit maps: 4 an element (x and the gradient), 2 more with the activated map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from glide_fast.kernels import dropout
from glide_fast.kernels.group_norm_tiles import (
    MODE_DOWN,
    MODE_UP,
    entry,
    film,
    group_block,
    load_tile,
    members,
    to_slots,
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
    x, skip, grad, first, stop, channel, lanes, split, mean, gain, offset, width, height, x_pixel, skip_pixel,
    step, grad_pixel, grad_step, seed, largest_dropped, factor, batch, first_channel, channels,
    SKIP: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Of the pixels from `first` on: x - mean, what arrives at z = (x - mean) gain + offset, activated z."""
    pixel = first + tl.arange(0, ROWS)
    inside = pixel < stop
    if DROPOUT:
        kept = dropout.kept(seed, largest_dropped, batch, pixel, first_channel, channels, LANES)
    tile = load_tile(x, skip, pixel, inside, channel, lanes, split, x_pixel, skip_pixel, step, SKIP)
    centred = tile - mean[None, :]
    dz = load_gradient(grad, pixel, inside, channel, lanes, width, height, grad_pixel, grad_step, MODE)
    z = centred * gain[None, :] + offset[None, :]
    if SILU:
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        z *= sigmoid
    if DROPOUT:
        dz = tl.where(kept, dz * factor, 0.0)
    return centred, dz, z


@triton.jit(do_not_specialize=dropout.PLAIN)
def sums_kernel(
    x, skip, grad, weight, bias, scale, shift, mean, rstd, channel_sums, group_sums, activated, arrived,
    channel_plane, group_plane, x_batch, x_pixel, skip_batch, skip_pixel, step, grad_batch, grad_pixel,
    grad_step, activated_batch, activated_pixel, activated_step, scale_row, shift_row, pixels, width, height,
    split, channels, groups, chunks, chunk_pixels, parts, blocks, seed, largest_dropped, factor,
    SKIP: tl.constexpr, FILM: tl.constexpr, SILU: tl.constexpr, MODE: tl.constexpr, DROPOUT: tl.constexpr,
    ACTIVATED: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """S and T [2, B, chunks, C] of a chunk of pixels, and what they come to for the groups' parts of it.

    T is that of x - mean, not divided by the deviation yet; the groups' sums [2, B, G, chunks, parts] are
    those of S gain / deviation and T gain / deviation. `activated` [B, C, *space] is written if wanted, and
    the counters [blocks] of `dx_kernel` are set to 0.
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
    skip += picture * skip_batch
    grad += picture * grad_batch
    activated += picture * activated_batch
    first_sums = tl.zeros([ROWS, LANES], tl.float32)
    second_sums = tl.zeros([ROWS, LANES], tl.float32)
    begin = chunk * chunk_pixels
    stop = tl.minimum(begin + chunk_pixels, pixels)
    for first in range(begin, stop, ROWS):
        centred, dz, y = tile_gradient(
            x, skip, grad, first, stop, channel, lanes, split, lane_mean, gain, offset, width, height,
            x_pixel, skip_pixel, step, grad_pixel, grad_step, seed, largest_dropped, factor, batch,
            block * LANES, channels, SKIP, SILU, MODE, DROPOUT, ROWS, LANES,
        )  # fmt: skip
        first_sums += dz
        second_sums += dz * centred
        if ACTIVATED:
            pixel = first + tl.arange(0, ROWS)
            place = pixel[:, None] * activated_pixel + (channel * activated_step)[None, :]
            within = (pixel < stop)[:, None] & lanes[None, :]
            tl.store(activated + place, y.to(activated.dtype.element_ty), mask=within)
    total = tl.sum(first_sums, axis=0)
    centred_total = tl.sum(second_sums, axis=0)
    at = (batch * chunks + chunk) * channels + channel
    tl.store(channel_sums + at, total, mask=lanes)
    tl.store(channel_sums + channel_plane + at, centred_total, mask=lanes)
    if COPIES and tl.program_id(0) < blocks:
        tl.store(arrived + tl.program_id(0), 0)
    first_group = block * LANES // group_channels
    member = members(channel, lanes, first_group, group_channels, SLOTS)
    group = first_group + tl.arange(0, SLOTS)
    part = block - group * group_channels // LANES
    at = entry(batch, group, groups, chunk, chunks, part, parts)
    there = (group < groups) & (group_block(group, part, group_channels, LANES) > 0)
    tl.store(group_sums + at, to_slots(gain * total, member), mask=there)
    tl.store(group_sums + group_plane + at, to_slots(gain * centred_total, member), mask=there)
