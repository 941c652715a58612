"""What follows GroupNorm's statistics: the affine map, FiLM and SiLU in one pass; and GroupNorm made of it.

    y = activation((((x - mean) * rstd) * weight + bias) * (1 + scale) + shift)

It is where GroupNorm's own kernel is missing that the op is called: on NVIDIA's GPUs without Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import reference, reference_elements
from glide_fast.ops.dispatch import define


def _fake(
    x: Tensor,
    mean: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    rstd: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    shift: Tensor | None,  # noqa: ARG001
    silu: bool,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape).contiguous(memory_format=reference.memory_format(x))


APPLY = define(
    "norm_apply",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift,"
    " bool silu) -> Tensor",
    reference_elements.norm_apply,
    _fake,
)


def group_norm(
    x: Tensor,  # [B, C, *space]
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `group_norm` of ATen's statistics and `norm_apply`."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return reference.group_norm(x, weight, bias, scale, shift, groups, eps, silu, mode)
    wide = x.float()
    grouped = reference_elements.by_group(wide, groups)
    variance, mean = torch.var_mean(grouped, dim=list(range(2, grouped.ndim)), correction=0)
    rstd = (variance + eps).rsqrt()
    halved = mode == reference.RESAMPLE_DOWN  # the mean of pixels that are not yet rounded
    y = APPLY(wide if halved else x, mean, rstd, weight, bias, scale, shift, silu)
    y = reference.resample(y, mode).to(x.dtype)
    return y.contiguous(memory_format=reference.memory_format(x)), mean, rstd
