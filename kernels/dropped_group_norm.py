"""The op `dropped_group_norm` and its gradients: GroupNorm's own kernels, which drop what they write or read.

The mask moves no byte; it takes ten rounds of Philox for every four channels, in the forward pass and in
both launches of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from glide_fast.kernels import group_norm, group_norm_backward
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.group_norm import normalise
from glide_fast.kernels.group_norm_backward import Further
from glide_fast.kernels.group_norm_tiles import Norm, Statistics, covered
from glide_fast.ops import dispatch, reference

NONE = reference.RESAMPLE_NONE


def dropped_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; what the kernels do not cover goes to the default."""
    if not covered(x, NONE):
        result: tuple[Tensor, Tensor, Tensor] = dispatch.default("dropped_group_norm")(
            x, weight, bias, scale, shift, groups, eps, dropout, seed
        )
        return result
    norm = Norm(weight, bias, scale, shift, groups, eps, True, NONE, dropout, seed)
    y, statistics = normalise(norm, x, memory_format=reference.memory_format(x))
    return y, statistics.mean, statistics.rstd


def dropped_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    seed: int,
    sums: int = 0,
) -> group_norm_backward.Gradients:
    """The op's gradients; what the kernels do not cover goes to the default."""
    if not covered(x, NONE):
        result: group_norm_backward.Gradients = dispatch.default("dropped_group_norm_backward")(
            grad, x, weight, bias, scale, shift, mean, rstd, dropout, seed, sums
        )
        return result
    norm = Norm(weight, bias, scale, shift, mean.shape[1], 0.0, True, NONE, dropout, seed)
    return group_norm_backward.gradients(norm, grad, x, Statistics(mean, rstd), Further(sums=sums))


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: the maps of the models, in 16 bits."""
    yield from group_norm.cases(target, dropout=0.1)
    yield from group_norm_backward.cases(target, dropout=0.1)
