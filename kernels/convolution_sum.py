"""cuDNN's convolution and what is added to it: bias, a picture's own bias, residual, in one launch.

PyTorch's convolution of channels-last maps adds its bias by a second kernel, and a residual by a third. Here
one kernel adds all of them to the convolution's output, in place, in float32, rounded once.

Bytes of 16-bit maps: 6 an element with a residual (two reads, one write), 4 without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations, launch
from glide_fast.kernels import group_norm_tiles as tiles
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import reference
from glide_fast.ops.norm_convolution import convolve as composed

# Pixels, channels, whether the residual is of half the size, of what is compiled to be measured.
CASES = ((64, 768, False), (4096, 192, False), (4096, 192, True))


@triton.jit
def sum_kernel(
    y, bias, residual, bias_row, y_batch, y_pixel, y_step, residual_batch, residual_pixel, residual_step,
    pixels, width, channels, blocks, runs,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add to one tile of y [B, P, C]; a residual of HALF the size is doubled."""
    program = tl.program_id(0)
    channel = program % blocks * LANES + tl.arange(0, LANES)
    pixel = program // blocks % runs * ROWS + tl.arange(0, ROWS)
    batch = program // blocks // runs
    picture = batch.to(tl.int64)
    lanes = channel < channels
    there = (pixel < pixels)[:, None] & lanes[None, :]
    at = y + picture * y_batch + pixel[:, None] * y_pixel + (channel * y_step)[None, :]
    total = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        values = tl.load(bias + batch * bias_row + channel, mask=lanes, other=0.0).to(tl.float32)
        total += values[None, :]
    if RESIDUAL:
        if HALF:
            pixel = pixel // width // 2 * (width // 2) + pixel % width // 2
        near = pixel[:, None] * residual_pixel + (channel * residual_step)[None, :]
        values = tl.load(residual + picture * residual_batch + near, mask=there, other=0.0)
        total += values.to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=there)


def _work(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes and FLOP of a launch."""
    moved = 2 * arguments["y"].nbytes
    for name in ("BIAS", "RESIDUAL"):
        moved += arguments[name.lower()].nbytes if arguments[name] else 0
    return moved, 2 * arguments["y"].numel()


WORK = {"sum_kernel": _work}  # for who counts what is launched


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """conv(x) + bias + residual, channels-last; ``bias`` [K] or [B, K], the residual as large or half so."""
    half = residual is not None and residual.shape[2:] != x.shape[2:]
    if not tiles.covered(x, reference.RESAMPLE_UP if half else reference.RESAMPLE_NONE, weight.shape[0]):
        return composed(x, weight, bias, residual)
    y = reference.convolve(x, weight).contiguous(memory_format=reference.channels_last(x))
    if y.numel() > 0 and (bias is not None or residual is not None):
        architecture = launch.architecture(y.device)
        configuration = configurations.choose("convolution_sum", architecture, 8 * y.element_size())
        _launch(y, bias, residual, configuration).start()
    return y


def _launch(y: Tensor, bias: Tensor | None, residual: Tensor | None, configuration: Configuration) -> Launch:
    own, other = tiles.as_map(y), tiles.as_map(y if residual is None else residual)
    pixels, channels = tiles.pixels_of(y), y.shape[1]
    lanes = min(configuration.columns, tiles.power_of_two(channels))
    blocks, runs = triton.cdiv(channels, lanes), triton.cdiv(pixels, configuration.rows)
    added = y if bias is None else launch.dense_last(bias)
    arguments = {
        "y": y, "bias": added, "residual": other.tensor,
        "bias_row": added.stride(0) if added.ndim == 2 else 0,
        "y_batch": own.batch, "y_pixel": own.pixel, "y_step": own.channel, "residual_batch": other.batch,
        "residual_pixel": other.pixel, "residual_step": other.channel, "pixels": pixels, "width": y.shape[-1],
        "channels": channels, "blocks": blocks, "runs": runs, "BIAS": bias is not None,
        "RESIDUAL": residual is not None, "HALF": residual is not None and residual.shape != y.shape,
        "ROWS": configuration.rows, "LANES": lanes,
    }  # fmt: skip
    return Launch(sum_kernel, y.shape[0] * blocks * runs, arguments, configuration)


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
        yield _launch(y, y.new_empty(2, channels), residual, configuration).case(name)
