"""cuDNN's convolution and what is added to it: bias, a picture's own bias, residual, in one launch.

PyTorch's convolution of channels-last maps adds its bias by a second kernel, and a residual by a third. Here
one kernel adds all of them to the convolution's output, in place, in float32, rounded once. Of large maps it
leaves the moments (`glide_fast.kernels.moments`): each program has a run of pixels in its registers anyway.

Bytes of 16-bit maps: 6 an element with a residual (two reads, one write), 4 without; moments a sixteenth of
the map at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch, moments, product
from glide_fast.kernels import group_norm_tiles as tiles
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch, start
from glide_fast.kernels.product import Moments, Plan
from glide_fast.ops import reference
from glide_fast.ops.composed_convolution import convolve as composed

# Pixels, channels, whether the residual is of half the size, of what is compiled to be measured.
CASES = ((64, 768, False), (4096, 192, False), (4096, 192, True))
MOST_RUNS = 128  # of a picture whose moments are left: a norm's programs read as many of each channel
SHORTEST_RUN = 64  # pixels, likewise


@triton.jit
def sum_kernel(
    y, bias, residual, means, squares, bias_row, y_batch, y_pixel, y_step, residual_batch, residual_pixel,
    residual_step, pixels, width, channels, blocks, runs, run_pixels,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr, MOMENTS: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Add to one run of pixels of y [B, P, C]; a residual of HALF the size is doubled."""
    program = tl.program_id(0)
    channel = program % blocks * LANES + tl.arange(0, LANES)
    run = program // blocks % runs
    batch = program // blocks // runs
    lanes = channel < channels
    y += batch.to(tl.int64) * y_batch
    residual += batch.to(tl.int64) * residual_batch
    bias += batch * bias_row
    start, stop = run * run_pixels, tl.minimum(run * run_pixels + run_pixels, pixels)
    center = tl.zeros([LANES], tl.float32)  # the mean of the first tile
    distance, square = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    for first in range(start, stop, ROWS):
        pixel = first + tl.arange(0, ROWS)
        inside = pixel < stop
        there = inside[:, None] & lanes[None, :]
        at = y + pixel[:, None] * y_pixel + (channel * y_step)[None, :]
        total = tl.load(at, mask=there, other=0.0).to(tl.float32)
        if BIAS:
            values = tl.load(bias + channel, mask=lanes, other=0.0).to(tl.float32)
            total += values[None, :]
        if RESIDUAL:
            if HALF:
                pixel = pixel // width // 2 * (width // 2) + pixel % width // 2
            near = pixel[:, None] * residual_pixel + (channel * residual_step)[None, :]
            values = tl.load(residual + near, mask=there, other=0.0)
            total += values.to(tl.float32)
        rounded = total.to(y.dtype.element_ty)
        tl.store(at, rounded, mask=there)
        if MOMENTS:
            z = rounded.to(tl.float32)
            if first == start:
                center = tl.sum(tl.where(there, z, 0.0), axis=0) / tl.minimum(stop - first, ROWS).to(
                    tl.float32
                )
            away = tl.where(there, z - center[None, :], 0.0)
            distance += away
            square += away * away
    if MOMENTS:
        count = (stop - start).to(tl.float32)
        off = tl.sum(distance, axis=0) / count
        at = (batch * runs + run) * channels + channel
        tl.store(means + at, center + off, mask=lanes)
        tl.store(squares + at, tl.sum(square, axis=0) - off * off * count, mask=lanes)


def _work(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes and FLOP of a launch."""
    moved = 2 * arguments["y"].nbytes
    for flag, names in (("BIAS", ("bias",)), ("RESIDUAL", ("residual",)), ("MOMENTS", ("means", "squares"))):
        moved += sum(arguments[name].nbytes for name in names) if arguments[flag] else 0
    return moved, 2 * arguments["y"].numel()


WORK = {"sum_kernel": _work}  # for who counts what is launched


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """conv(x) + bias + residual, channels-last; ``bias`` [K] or [B, K], the residual as large or half so.

    The moments of a large sum are remembered.
    """
    half = residual is not None and residual.shape[2:] != x.shape[2:]
    if not tiles.covered(x, reference.RESAMPLE_UP if half else reference.RESAMPLE_NONE, weight.shape[0]):
        return composed(x, weight, bias, residual)
    with torch.inference_mode(False), torch.no_grad():  # so that it counts its versions
        y = reference.convolve(x, weight).contiguous(memory_format=reference.channels_last(x))
    if y.numel() > 0 and (bias is not None or residual is not None):
        architecture = launch.architecture(y.device)
        configuration = configurations.choose("convolution_sum", architecture, 8 * y.element_size())
        launches, left = _plan(y, bias, residual, configuration)
        start(launches)
        moments.remember(y, left)
    return y


def _plan(y: Tensor, bias: Tensor | None, residual: Tensor | None, configuration: Configuration) -> Plan:
    own, other = tiles.as_map(y), tiles.as_map(y if residual is None else residual)
    pixels, channels = tiles.pixels_of(y), y.shape[1]
    lanes = min(configuration.columns, tiles.power_of_two(channels))
    blocks = triton.cdiv(channels, lanes)
    kept = moments.pay(pixels) and own.channel == 1
    runs, run_pixels = tiles.divide(pixels, configuration.rows, pixels)
    if kept:
        most = min(MOST_RUNS, tiles.PROGRAMS // (y.shape[0] * blocks))
        runs, run_pixels = tiles.divide(pixels, SHORTEST_RUN, most)
    left, means, squares = None, y, y
    if kept:
        values = y.new_empty((2, y.shape[0], runs, channels), dtype=torch.float32)
        left = Moments(product.runs(y.shape[0], pixels, run_pixels), values)
        means, squares = values.unbind()
    added = y if bias is None else launch.dense_last(bias)
    arguments = {
        "y": y, "bias": added, "residual": other.tensor, "means": means, "squares": squares,
        "bias_row": added.stride(0) if added.ndim == 2 else 0,
        "y_batch": own.batch, "y_pixel": own.pixel, "y_step": own.channel, "residual_batch": other.batch,
        "residual_pixel": other.pixel, "residual_step": other.channel, "pixels": pixels, "width": y.shape[-1],
        "channels": channels, "blocks": blocks, "runs": runs, "run_pixels": run_pixels,
        "BIAS": bias is not None, "RESIDUAL": residual is not None,
        "HALF": residual is not None and residual.shape != y.shape, "MOMENTS": left is not None,
        "ROWS": configuration.rows, "LANES": lanes,
    }  # fmt: skip
    return Plan((Launch(sum_kernel, y.shape[0] * blocks * runs, arguments, configuration),), left)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: the maps of the models, in 16 bits."""
    configuration = configurations.choose("convolution_sum", target, 16)
    for pixels, channels, half in CASES:
        side = math.isqrt(pixels)
        y, residual = (
            torch.empty(2, channels, size, size, dtype=torch.float16, device="meta").contiguous(
                memory_format=torch.channels_last
            )
            for size in (side, side // 2 if half else side)
        )
        name = f"convolution_sum {side}²x{channels} {'half' if half else 'whole'} residual"
        (found,) = _plan(y, y.new_empty(2, channels), residual, configuration).launches
        yield found.case(name)
