"""The losses of a diffusion that learns its variance: one launch forward, one backward.

A program of the forward pass sums a run of elements of one picture in a fixed order; more than one program
a picture, and their sums are added by a second launch. A program of the backward pass owns a block of them.
The step's coefficients are loaded once, and a picture at its last step, whose loss is another, takes its own
way. PyTorch's operators need 150 launches for the same.

Bytes an element of pictures: three of them 12, the output 8, backward its gradient 8 more (half of the last
two for 16-bit outputs). About 50 FLOP: launching is what this costs.
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
from glide_fast.kernels.sampler_step import TABLE_COLUMNS, flat
from glide_fast.ops import dispatch

RUN = 16384  # elements that a program of the forward pass sums at most
# The distribution is the sigmoid of GAIN (end + CUBE end^3), of which 0 and 1 are left beyond WIDEST.
GAIN = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBE = tl.constexpr(0.044715)
WIDEST = tl.constexpr(87.0)
HALF_BIN = tl.constexpr(1 / 255)
OUTERMOST = tl.constexpr(0.999)  # pictures beyond it are in the outer bins
LEAST = tl.constexpr(1e-12)  # probability
# Pictures, side, dtype of outputs of what is compiled to be measured.
CASES = ((64, 64, torch.float32), (64, 64, torch.bfloat16), (8, 256, torch.float32))


@triton.jit
def difference_of_means(told, start, own, row):
    """What the posterior's mean has more than the model's, and the model's."""
    guess = tl.load(row) * own + tl.load(row + 1) * told
    weight = tl.load(row + 2)
    return weight * (start - guess), weight * guess + tl.load(row + 3) * own


@triton.jit
def ends(start, mean, low, more):
    """The ends of a picture's bins, in deviations from the mean."""
    inverse = tl.exp(-0.5 * low) * tl.exp(-0.5 * more)
    return inverse * (start - mean + HALF_BIN), inverse * (start - mean - HALF_BIN)


@triton.jit
def logit(end):
    """Of the distribution up to an end."""
    value = GAIN * (end + CUBE * end * end * end)
    value = tl.where(value > WIDEST, WIDEST, value)  # so that a NaN stays one
    return tl.where(value < -WIDEST, -WIDEST, value)


@triton.jit
def between(start, upper, lower):
    """The probability between two logits, exact in the tails too; outer bins reach to infinity."""
    upper = tl.where(start > OUTERMOST, WIDEST, upper)
    lower = tl.where(start < -OUTERMOST, -WIDEST, lower)
    turned = upper + lower < 0  # mirrored, so that it is 1 that both are near
    far = tl.exp(tl.where(turned, lower, -upper))
    near = tl.exp(tl.where(turned, upper, -lower))
    return (near - far) / ((1 + far) * (1 + near))


@triton.jit
def growth(end, value):
    """The derivative of the distribution up to an end, of that logit, by the logarithm of the scale."""
    small = tl.exp(-tl.abs(value))
    return end * GAIN * (1 + 3 * CUBE * end * end) * small / ((1 + small) * (1 + small))


@triton.jit
def excess(x):
    """e^x - 1 - x, by its series where little would be left of the difference."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1 - x)


@triton.jit
def scaled_square(distance, low, more):
    """The square of a distance in variances of the model."""
    return distance * distance * tl.exp(-low) * tl.exp(-more)


@triton.jit
def divergence(distance, low, more):
    """KL of the posterior, whose log-variance is `low`, from the model's, which is `more`, in nats."""
    return 0.5 * (excess(-more) + scaled_square(distance, low, more))


@triton.jit
def divergence_slope(distance, low, more):
    """Its derivative by the model's log-variance."""
    return 0.5 * (more - excess(-more) - scaled_square(distance, low, more))


@triton.jit
def surprise(start, mean, low, more):
    """-ln of a picture's probability."""
    upper, lower = ends(start, mean, low, more)
    probability = between(start, logit(upper), logit(lower))
    return -tl.log(tl.where(probability < LEAST, LEAST, probability))


@triton.jit
def surprise_slope(start, mean, low, more):
    """Its derivative by the log-variance."""
    upper, lower = ends(start, mean, low, more)
    upper_logit, lower_logit = logit(upper), logit(lower)
    probability = between(start, upper_logit, lower_logit)
    grown = tl.where(start > OUTERMOST, 0.0, growth(upper, upper_logit))
    grown -= tl.where(start < -OUTERMOST, 0.0, growth(lower, lower_logit))
    cut = probability < LEAST
    return tl.where(cut, 0.0, 0.5 * grown / tl.where(cut, LEAST, probability))


@triton.jit
def at_elements(outputs, to_value, x_start, x_t, noise, inside, row, span):
    """The error of the noise, the picture, the difference of means, the mean, the log-variance over `low`."""
    told = tl.load(outputs, inside, other=0.0).to(tl.float32)
    value = tl.load(outputs + to_value, inside, other=0.0).to(tl.float32)
    start, own = tl.load(x_start, inside, other=0.0), tl.load(x_t, inside, other=0.0)
    distance, mean = difference_of_means(told, start, own, row)
    return told - tl.load(noise, inside, other=0.0), start, distance, mean, (value + 1) * 0.5 * span


@triton.jit
def hybrid_loss_kernel(
    output, x_start, x_t, noise, t, table, mse, vlb, elements, pixels, channels, runs, mse_share, vlb_share,
    output_row, output_channel, output_pixel, DENSE: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both sums over a run of elements of one picture; DENSE: a picture's output has no gaps."""
    program = tl.program_id(0)
    picture = (program // runs).to(tl.int64)
    begin = program % runs * RUN
    step = tl.load(t + picture)
    row = table + step * COLUMNS
    low = tl.load(row + 6)
    span = tl.load(row + 7) - low
    squares = tl.zeros([BLOCK], tl.float32)
    nats = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, tl.minimum(begin + RUN, elements), BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < elements
        place = index
        if not DENSE:
            place = index // pixels * output_channel + index % pixels * output_pixel
        here = picture * elements + index
        outputs = output + picture * output_row + place
        error, start, distance, mean, more = at_elements(
            outputs, channels * output_channel, x_start + here, x_t + here, noise + here, inside, row, span
        )
        squares += error * error
        if step == 0:
            nats += tl.where(inside, surprise(start, mean, low, more), 0.0)
        else:
            nats += tl.where(inside, divergence(distance, low, more), 0.0)
    tl.store(mse + program, tl.sum(squares, axis=0) * mse_share)
    tl.store(vlb + program, tl.sum(nats, axis=0) * vlb_share)


@triton.jit
def hybrid_loss_backward_kernel(
    grad_mse, grad_vlb, output, x_start, x_t, noise, t, table, grad, mse_stride, vlb_stride, elements, pixels,
    channels, blocks, mse_share, vlb_share, output_row, output_channel, output_pixel, grad_row, grad_channel,
    grad_pixel, DENSE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of elements of both halves of a picture's channels."""
    program = tl.program_id(0)
    picture = (program // blocks).to(tl.int64)
    index = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    step = tl.load(t + picture)
    row = table + step * COLUMNS
    low = tl.load(row + 6)
    span = tl.load(row + 7) - low
    mse_scale = 2 * mse_share * tl.load(grad_mse + picture * mse_stride).to(tl.float32)
    vlb_scale = vlb_share * tl.load(grad_vlb + picture * vlb_stride).to(tl.float32)
    place, written = index, index
    if not DENSE:
        channel, pixel = index // pixels, index % pixels
        place = channel * output_channel + pixel * output_pixel
        written = channel * grad_channel + pixel * grad_pixel
    here = picture * elements + index
    outputs = output + picture * output_row + place
    error, start, distance, mean, more = at_elements(
        outputs, channels * output_channel, x_start + here, x_t + here, noise + here, inside, row, span
    )
    last = step == 0
    slope = surprise_slope(start, mean, low, more) if last else divergence_slope(distance, low, more)
    grads = grad + picture * grad_row + written
    kind = grad.dtype.element_ty
    tl.store(grads, (mse_scale * error).to(kind), inside)
    tl.store(grads + channels * grad_channel, (vlb_scale * slope * 0.5 * span).to(kind), inside)


def hybrid_loss(
    output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The op `hybrid_loss`; pictures that are not float32, and none at all, go to the default."""
    if not _covered(output, x_start, x_t, noise):
        losses: tuple[Tensor, Tensor] = dispatch.default("hybrid_loss")(output, x_start, x_t, noise, t, table)
        return losses
    runs = triton.cdiv(math.prod(x_t.shape[1:]), RUN)
    mse, vlb = x_t.new_empty(len(x_t), runs), x_t.new_empty(len(x_t), runs)

    def launch(configuration: Configuration) -> None:
        _forward_plan(output, x_start, x_t, noise, t, table, mse, vlb, configuration).start()

    configurations.run("hybrid_loss", x_t.device, 32, math.prod(x_t.shape[1:]), launch)
    return (mse.flatten(), vlb.flatten()) if runs == 1 else (mse.sum(1), vlb.sum(1))


def hybrid_loss_backward(
    grad_mse: Tensor,
    grad_vlb: Tensor,
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
) -> Tensor:
    """The op `hybrid_loss_backward`; what the forward op hands to the default goes there too."""
    gradients, inputs = (grad_mse, grad_vlb), (output, x_start, x_t, noise, t, table)
    if not _covered(output, x_start, x_t, noise):
        result: Tensor = dispatch.default("hybrid_loss_backward")(*gradients, *inputs)
        return result
    grad = torch.empty_like(output)
    written = flat(grad)  # a copy where strides do not allow a view

    def launch(configuration: Configuration) -> None:
        _backward_plan(*gradients, *inputs, written, configuration).start()

    configurations.run("hybrid_loss", x_t.device, 32, math.prod(x_t.shape[1:]), launch)
    return grad if written.data_ptr() == grad.data_ptr() else grad.copy_(written.view(grad.shape))


def _covered(output: Tensor, *pictures: Tensor) -> bool:
    return (
        output.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(each.dtype is torch.float32 for each in pictures)
        and output.numel() > 0
    )


def _arguments(
    output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, table: Tensor, block: int
) -> dict[str, Any]:
    """What both kernels take."""
    channels, pixels = x_t.shape[1], math.prod(x_t.shape[2:])
    elements, output = channels * pixels, flat(output)
    row, channel, pixel = output.stride()
    return {
        "output": output, "x_start": x_start.contiguous(), "x_t": x_t.contiguous(),
        "noise": noise.contiguous(), "t": t.contiguous(), "table": table.float().contiguous(),
        "elements": elements, "pixels": pixels, "channels": channels, "mse_share": 1 / elements,
        "vlb_share": 1 / (elements * math.log(2)), "output_row": row, "output_channel": channel,
        "output_pixel": pixel, "DENSE": (channel, pixel) == (pixels, 1), "COLUMNS": TABLE_COLUMNS,
        "BLOCK": block,
    }  # fmt: skip


def _forward_plan(
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
    mse: Tensor,
    vlb: Tensor,
    configuration: Configuration,
) -> Launch:
    arguments = _arguments(output, x_start, x_t, noise, t, table, configuration.rows)
    arguments |= {"mse": mse, "vlb": vlb, "runs": mse.shape[1], "RUN": RUN}
    return Launch(hybrid_loss_kernel, mse.numel(), arguments, configuration)


def _backward_plan(
    grad_mse: Tensor,
    grad_vlb: Tensor,
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
    grad: Tensor,
    configuration: Configuration,
) -> Launch:
    arguments = _arguments(output, x_start, x_t, noise, t, table, configuration.rows)
    blocks = triton.cdiv(arguments["elements"], configuration.rows)
    row, channel, pixel = grad.stride()
    arguments |= {
        "grad_mse": grad_mse, "grad_vlb": grad_vlb, "mse_stride": grad_mse.stride(0),
        "vlb_stride": grad_vlb.stride(0), "grad": grad, "blocks": blocks, "grad_row": row,
        "grad_channel": channel, "grad_pixel": pixel,
        "DENSE": arguments["DENSE"] and (channel, pixel) == (arguments["pixels"], 1),
    }  # fmt: skip
    return Launch(hybrid_loss_backward_kernel, len(x_t) * blocks, arguments, configuration)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: the base model's losses and the upsampler's, both ways."""
    for batch, side, kind in CASES:
        x = torch.empty(batch, 3, side, side, device="meta")
        output = torch.empty(batch, 6, side, side, dtype=kind, device="meta")
        output = output.contiguous(memory_format=torch.channels_last)
        table, t = torch.empty(50, TABLE_COLUMNS, device="meta"), torch.empty(batch, device="meta").long()
        configuration = configurations.choose("hybrid_loss", target, 32, 3 * side * side)
        inputs, sums = (output, x, x, x, t, table), x.new_empty(batch, triton.cdiv(3 * side * side, RUN))
        name = f"{side}² outputs {kind}"
        yield _forward_plan(*inputs, sums, sums, configuration).case(f"hybrid_loss {name}")
        backward = _backward_plan(sums[:, 0], sums[:, 0], *inputs, flat(output), configuration)
        yield backward.case(f"hybrid_loss_backward {name}")
