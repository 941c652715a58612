"""The statistics that a product left of its output, kept until the next GroupNorm asks for them.

A product by our kernels leaves, beside its output, the moments of each
channel over each tile of pixels: the norm behind it then reads some numbers a tile in place of the whole
map, and models need not know. Moments are kept beside the very tensor that they are of, die with it, and
count only while it is as it was: an operation in place raises its version, and they are forgotten. Outputs
of our kernels count their versions in inference mode too; those that compiled code asks for have no moments,
because it writes to them in place without telling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glide_fast.kernels import configurations, launch
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.group_norm_tiles import Statistics, power_of_two
from glide_fast.kernels.plan import Launch
from glide_fast.kernels.product import Moments, cut, runs
from glide_fast.ops.eager import is_eager

FEWEST_PIXELS = 1025  # of a picture: smaller maps are normalised in one launch, which reads them anyway

_remembered: Any = WeakTensorKeyDictionary()


def pay(pixels: int) -> bool:
    """Whether a norm of maps with so many pixels is faster with moments at hand."""
    return pixels >= FEWEST_PIXELS


def empty(shape: tuple[int, ...], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A result's memory. It counts its versions in inference mode too, so that its moments can be trusted."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def remember(output: Tensor, moments: Moments | None) -> None:
    """Keep the moments of a map [B, K, H, W] or [B, T, K] that nobody has changed yet; in eager code only."""
    if moments is not None and is_eager():
        _remembered[output] = output._version, moments


def recall(x: Tensor) -> Moments | None:
    """The moments of a map [B, C, *space], itself or a view of what a product wrote, if they still hold."""
    whole = x if x in _remembered or x._base is None else x._base
    if whole not in _remembered:
        return None
    version, moments = _remembered[whole]
    same = (
        x.shape[0] == moments.tiles.batch
        and x.shape[1] == moments.values.shape[-1]
        and x.numel() == whole.numel()
    )
    pixels = x.permute(0, *range(2, x.ndim), 1)
    if version != whole._version or not same or not pixels.is_contiguous():
        return None
    return moments  # type: ignore[no-any-return]


@triton.jit
def group_sums(
    means, squares, center, batch, channel, lanes, channels, height, width, tiles, tiles_wide, rows, columns,
    SQUARES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of a group's lanes in one map: the sum over all pixels, or that of squared distances to ``center``."""
    total = 0.0
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        count = tl.minimum(rows, height - tile // tiles_wide * rows)
        count = (count * tl.minimum(columns, width - tile % tiles_wide * columns)).to(tl.float32)
        there = (tile < tiles)[:, None] & lanes[None]
        at = (batch * tiles + tile)[:, None] * channels + channel[None]
        away = tl.load(means + at, mask=there, other=0.0)
        if SQUARES:
            away = tl.where(there, away - center, 0.0)
            away = tl.load(squares + at, mask=there, other=0.0) + away * away * count[:, None]
        else:
            away = away * count[:, None]
        total += tl.sum(tl.sum(away, axis=1), axis=0)
    return total


# Bytes: 8 · B · tiles · C read, a sixteenth of the map or less.
@triton.jit
def combine_kernel(
    means,  # [B, tiles, split] float32
    squares,
    skip_means,  # [B, tiles of the skip, C - split] float32
    skip_squares,
    mean,  # [B, G] float32
    rstd,
    height, width, tiles, tiles_wide, rows, columns,
    skip_height, skip_width, skip_tiles, skip_tiles_wide, skip_rows, skip_columns,
    split, channels, group_channels, eps,
    SKIP: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of a group: first all means, then all squares (Chan, Golub and LeVeque, 1979)."""
    groups = channels // group_channels
    batch, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    lane = tl.arange(0, CHANNELS)
    channel = group * group_channels + lane
    own = (lane < group_channels) & (channel < split)
    other = (lane < group_channels) & (channel >= split)
    total = (height * width).to(tl.float32) * group_channels
    group_mean = 0.0
    variance = 0.0
    for square in tl.static_range(2):
        found = group_sums(
            means, squares, group_mean, batch, channel, own, split, height, width, tiles, tiles_wide, rows,
            columns, square, TILES,
        )  # fmt: skip
        if SKIP:
            found += group_sums(
                skip_means, skip_squares, group_mean, batch, channel - split, other, channels - split,
                skip_height, skip_width, skip_tiles, skip_tiles_wide, skip_rows, skip_columns, square, TILES,
            )  # fmt: skip
        if square:
            variance = found / total
        else:
            group_mean = found / total
    at = batch * groups + group
    tl.store(mean + at, group_mean)
    tl.store(rstd + at, tl.rsqrt(variance + eps))


def statistics(x: Tensor, skip: Tensor | None, groups: int, eps: float) -> Statistics | None:
    """Mean and 1/deviation [B, G] of the groups of x, or of x and ``skip`` side by side, from kept moments.

    None where moments are missing: the norm reads the maps then.
    """
    own = recall(x)
    other = None if skip is None or own is None else recall(skip)
    if own is None or (skip is not None and other is None):
        return None
    result = Statistics.empty(x, groups)
    configuration = configurations.choose("moments", launch.architecture(x.device), 32)
    _combining(own, other, result, eps, configuration).start()
    return result


def _combining(
    own: Moments, other: Moments | None, result: Statistics, eps: float, configuration: Configuration
) -> Launch:
    means, squares = own.values.unbind()
    second = own if other is None else other
    skip_means, skip_squares = second.values.unbind()
    split = means.shape[2]
    channels = split + (0 if other is None else skip_means.shape[2])
    groups = result.mean.shape[1]
    lanes = power_of_two(channels // groups)
    arguments = {
        "means": means, "squares": squares, "skip_means": skip_means, "skip_squares": skip_squares,
        "mean": result.mean, "rstd": result.rstd, "split": split, "channels": channels,
        "group_channels": channels // groups, "eps": eps, "SKIP": other is not None, "CHANNELS": lanes,
        "TILES": max(configuration.rows * configuration.columns // lanes, 1),
    }  # fmt: skip
    for prefix, tiles in (("", own.tiles), ("skip_", second.tiles)):
        arguments |= {
            f"{prefix}height": tiles.height, f"{prefix}width": tiles.width, f"{prefix}tiles": tiles.each,
            f"{prefix}tiles_wide": tiles.wide, f"{prefix}rows": tiles.rows, f"{prefix}columns": tiles.columns,
        }  # fmt: skip
    return Launch(combine_kernel, own.tiles.batch * groups, arguments, configuration)


def cases(target: str) -> list[Case]:
    """What is compiled to see the kernel's resources: a decoder's norm at 64 px."""
    own, other = (
        Moments(tiles, torch.empty(2, 2, tiles.each, channels, device="meta"))
        for tiles, channels in ((runs(2, 4096, 64), 384), (cut(2, 64, 64, 128), 192))
    )
    result = Statistics.empty(own.values, 32)
    configuration = configurations.choose("moments", target, 32)
    return [_combining(own, other, result, 1e-5, configuration).case("moments 64²x384+192")]
