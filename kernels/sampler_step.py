"""A sampler's step as one kernel: guidance, the guess of x_0, its clip, the move, the noise of its deviation.

    x_0 = clip(guess_x x + guess_output epsilon)
    x'  = mean_start x_0 + mean_direction direction + deviation z

A program owns a run of elements of one picture, so that the row of coefficients, read by the timestep on the
device, is loaded once. PyTorch's operators need 20 to 30 launches for the same.

Bytes an element of float32 pictures: x, z, x' and x_0 16, the output 4, with guidance 4 more, with a learned
deviation 4 more (half of these for 16-bit outputs). About 20 FLOP: launching is what this costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch
from glide_fast.ops import reference_elements as reference
from glide_fast.ops.sampler_step import COLUMNS

TABLE_COLUMNS = len(COLUMNS)
LEARNED = tl.constexpr(reference.DEVIATION_LEARNED)
FROM_TABLE = tl.constexpr(reference.DEVIATION_TABLE)
TO_NOISE = tl.constexpr(reference.DIRECTION_NOISE)
TO_OUTPUT = tl.constexpr(reference.DIRECTION_OUTPUT)
# Pictures, side, guidance, deviation, direction of what is compiled to be measured.
CASES = (
    (2, 64, True, reference.DEVIATION_LEARNED + 1, reference.DIRECTION_X),
    (2, 64, True, reference.DEVIATION_TABLE, reference.DIRECTION_NOISE),
    (1, 256, False, reference.DEVIATION_TABLE, reference.DIRECTION_NOISE),
)


@triton.jit
def deviation_of(value, low, high, DEVIATION: tl.constexpr):
    """The deviation whose log-variance an output's channel tells."""
    if DEVIATION != LEARNED:
        share = (value + 1) * 0.5
        value = share * high + (1 - share) * low
    return tl.exp(0.5 * value)


@triton.jit
def sampler_step_kernel(
    x, output, noise, table, t, guidance, following, start, elements, pixels, channels, blocks, batch,
    output_row, output_channel, output_pixel, GUIDED: tl.constexpr, NOISY: tl.constexpr,
    DEVIATION: tl.constexpr, DIRECTION: tl.constexpr, CLIP: tl.constexpr, DENSE: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One run of elements of one picture; DENSE: a picture's output has no gaps."""
    program = tl.program_id(0)
    picture = (program // blocks).to(tl.int64)
    index = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    step = tl.load(t + picture)
    row = table + step * COLUMNS
    place = index
    if not DENSE:
        place = index // pixels * output_channel + index % pixels * output_pixel
    conditional = output + picture * output_row

    here = picture * elements + index
    own = tl.load(x + here, inside, other=0.0)
    told = tl.load(conditional + place, inside, other=0.0).to(tl.float32)
    if GUIDED:
        plain = tl.load(conditional + batch * output_row + place, inside, other=0.0).to(tl.float32)
        told = plain + tl.load(guidance) * (told - plain)
    guess = tl.load(row) * own + tl.load(row + 1) * told
    if CLIP:
        guess = tl.where(guess < -1, -1.0, guess)  # so that a NaN stays one
        guess = tl.where(guess > 1, 1.0, guess)
    if DIRECTION == TO_OUTPUT:
        mean = told
    else:
        direction = own
        if DIRECTION == TO_NOISE:
            direction = (tl.load(row + 4) * own - guess) / tl.load(row + 5)
        mean = tl.load(row + 2) * guess + tl.load(row + 3) * direction
    if NOISY:
        spread = tl.load(row + 6)
        if DEVIATION != FROM_TABLE:
            told = tl.load(conditional + channels * output_channel + place, inside, other=0.0).to(tl.float32)
            spread = deviation_of(told, spread, tl.load(row + 7), DEVIATION)
        mean = tl.where(step == 0, mean, mean + spread * tl.load(noise + here, inside, other=0.0))
    tl.store(following + here, mean, inside)
    tl.store(start + here, guess, inside)


def sampler_step(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    table: Tensor,
    t: Tensor,
    guidance: Tensor | None,
    deviation: int,
    direction: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """The op `sampler_step`; pictures that are not float32 go to the default."""
    arguments = (x, output, noise, table, t, guidance, deviation, direction, clip)
    if x.dtype is not torch.float32 or output.dtype is torch.float64:
        result: tuple[Tensor, Tensor] = dispatch.default("sampler_step")(*arguments)
        return result
    following, x_start = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel():

        def launch(configuration: Configuration) -> None:
            plan(*arguments, following, x_start, configuration).start()

        configurations.run("sampler_step", x.device, 32, math.prod(x.shape[1:]), launch)
    return following, x_start


def plan(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    table: Tensor,
    t: Tensor,
    guidance: Tensor | None,
    deviation: int,
    direction: int,
    clip: bool,
    following: Tensor,
    x_start: Tensor,
    configuration: Configuration,
) -> Launch:
    """The launch that fills `following` and `x_start`."""
    batch, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    output = flat(output)
    elements, block = channels * pixels, configuration.rows
    blocks = triton.cdiv(elements, block)
    row, channel, pixel = output.stride()
    arguments: dict[str, Any] = {
        "x": x.contiguous(), "output": output, "noise": x if noise is None else noise.contiguous(),
        "table": table.float().contiguous(), "t": t.contiguous(), "following": following, "start": x_start,
        "guidance": table if guidance is None else guidance.float(), "elements": elements, "pixels": pixels,
        "channels": channels, "blocks": blocks, "batch": batch, "output_row": row, "output_channel": channel,
        "output_pixel": pixel, "GUIDED": guidance is not None, "NOISY": noise is not None,
        "DEVIATION": deviation, "DIRECTION": direction, "CLIP": clip,
        "DENSE": (channel, pixel) == (pixels, 1), "COLUMNS": TABLE_COLUMNS, "BLOCK": block,
    }  # fmt: skip
    return Launch(sampler_step_kernel, batch * blocks, arguments, configuration)


def flat(output: Tensor) -> Tensor:
    """[B, C, *space] as [B, C, pixels], a copy only where strides do not allow a view."""
    if output.ndim == 4 and output.stride(2) != output.stride(3) * output.shape[3]:
        output = output.contiguous()
    return output.flatten(2) if output.ndim > 2 else output.unsqueeze(2)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: the steps of the base model and of the upsampler."""
    for batch, side, guided, deviation, direction in CASES:
        x = torch.empty(batch, 3, side, side, device="meta")
        output = torch.empty(batch * (2 if guided else 1), 6, side, side, device="meta")
        table, t = torch.empty(50, TABLE_COLUMNS, device="meta"), torch.empty(batch, device="meta").long()
        configuration = configurations.choose("sampler_step", target, 32, 3 * side * side)
        scale = table if guided else None
        launch = plan(x, output, x, table, t, scale, deviation, direction, True, x, x, configuration)
        yield launch.case(f"sampler_step {side}² guidance {guided} deviation {deviation} to {direction}")
