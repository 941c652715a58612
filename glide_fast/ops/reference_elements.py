"""The references of the ops that treat each element by itself: see :mod:`glide_fast.ops.reference`.

Shapes: B batch, C channels, T timesteps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.ops.reference import compute_dtype, memory_format, per_channel

DEVIATION_TABLE, DEVIATION_LEARNED = 0, 1
NEVER_ZERO = 1e-6  # added to a norm that is divided by, as torch.nn.utils.clip_grad_norm_ does
DIRECTION_X, DIRECTION_NOISE, DIRECTION_OUTPUT = 0, 1, 2


def sampler_step(
    x: Tensor,  # [B, C, *space]
    output: Tensor,  # [B or 2B, C or 2C, *space]
    noise: Tensor | None,  # [B, C, *space]
    table: Tensor,  # [T, 8]
    t: Tensor,  # [B]
    guidance: Tensor | None,  # one number
    deviation: int,
    direction: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """The pictures of the next timestep, and the guess of the clean ones: see :mod:`..ops.sampler_step`."""
    dtype, channels = compute_dtype(x.dtype), x.shape[1]
    wide, given = x.to(dtype), output.to(dtype)
    guess_x, guess_output, mean_start, mean_direction, noise_x, noise_start, low, high = (
        column.view(-1, *[1] * (x.ndim - 1)) for column in table.to(dtype)[t].unbind(1)
    )
    conditional = given[: x.shape[0]]
    prediction = conditional[:, :channels]
    if guidance is not None:
        unconditional = given[x.shape[0] :, :channels]
        prediction = unconditional + guidance.to(dtype) * (prediction - unconditional)
    x_start = guess_x * wide + guess_output * prediction
    if clip:
        x_start = x_start.clamp(-1, 1)
    if direction == DIRECTION_OUTPUT:
        mean = prediction
    elif direction == DIRECTION_NOISE:
        mean = mean_start * x_start + mean_direction * ((noise_x * wide - x_start) / noise_start)
    else:
        mean = mean_start * x_start + mean_direction * wide
    if noise is not None:
        spread = low
        if deviation != DEVIATION_TABLE:
            log_variance = conditional[:, channels:]
            if deviation != DEVIATION_LEARNED:
                share = (log_variance + 1) / 2  # the v of Improved DDPM, equation 15
                log_variance = share * high + (1 - share) * low
            spread = torch.exp(0.5 * log_variance)
        last = (t == 0).view(low.shape)
        mean = torch.where(last, mean, mean + spread * noise.to(dtype))
    following, guess = x.new_empty(x.shape), x.new_empty(x.shape)
    return following.copy_(mean), guess.copy_(x_start)


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    average: list[Tensor],
    copies: list[Tensor],
    numbers: Tensor,  # [N, 8]
    factor: Tensor | None,  # one number
) -> None:
    """One step of AdamW on N tensors, their averages and copies, in place: see :mod:`..ops.adamw`."""
    if not parameters:
        return
    first_share, beta2, second_share, eps, decay, step_size, root, share = numbers.double().t().tolist()
    wide = [gradient.to(each.dtype) for gradient, each in zip(gradients, parameters, strict=True)]
    if factor is not None:
        wide = list(torch._foreach_mul(wide, factor.to(wide[0].dtype).reshape(())))
    torch._foreach_mul_(parameters, [1 - each for each in decay])
    torch._foreach_lerp_(first, wide, first_share)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, wide, wide, second_share)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(parameters, first, denominators, [-each for each in step_size])
    if average:
        torch._foreach_lerp_(average, parameters, share)
    if copies:
        torch._foreach_copy_(copies, parameters)


def gradient_norm(gradients: list[Tensor], limit: float, scale: float) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, divided by ``scale``, and the factor that clips them."""
    return clip_factor(norm_of(gradients), limit, scale)


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, float32 []; their dtypes may differ."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(each.dtype for each in gradients):
        alike = [each for each in gradients if each.dtype is dtype]
        wide = torch._foreach_norm(alike, 2, torch.promote_types(dtype, torch.float32))
        norms += [each.float() for each in wide]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_factor(norm: Tensor, limit: float, scale: float) -> tuple[Tensor, Tensor]:
    """The norm divided by ``scale``, and what clips gradients to ``limit`` and divides them likewise."""
    if scale != 1:
        norm = norm / scale
    factor = (limit / (norm + NEVER_ZERO)).clamp(max=1)
    return norm, factor if scale == 1 else factor / scale


def by_group(x: Tensor, groups: int) -> Tensor:
    """[B, C, *space] -> [B, G, C / G, *space], without a copy in any memory format."""
    return x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def norm_apply(
    x: Tensor,  # [B, C, *space]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    silu: bool,
) -> Tensor:
    """silu(((x - mean) rstd weight + bias) (1 + scale) + shift), like x."""
    dtype, groups = compute_dtype(x.dtype), mean.shape[1]
    broadcast = (*mean.shape, *[1] * (x.ndim - 1))
    centred = by_group(x.to(dtype), groups) - mean.to(dtype).view(broadcast)
    y = (centred * rstd.to(dtype).view(broadcast)).flatten(1, 2)
    y = y * per_channel(weight.to(dtype), x.ndim) + per_channel(bias.to(dtype), x.ndim)
    if scale is not None and shift is not None:
        y = y * per_channel(1 + scale.to(dtype), x.ndim) + per_channel(shift.to(dtype), x.ndim)
    y = F.silu(y) if silu else y
    return x.new_empty(x.shape).contiguous(memory_format=memory_format(x)).copy_(y)
