"""Group normalisation with its neighbours fused: affine, FiLM, SiLU, 2x resampling.

    y = resample(activation((normalise(x) * weight + bias) * (1 + scale) + shift))

Wu & He, "Group Normalization" (2018), https://arxiv.org/abs/1803.08494; scale and shift as in the "adaptive
group normalization" of Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021),
https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import column_sums, reference
from glide_fast.ops.dispatch import define, differentiable, needs_gradient

Activation = Literal["none", "silu"]
Resample = Literal["none", "up", "down"]
_ACTIVATIONS = {"none": False, "silu": True}
RESAMPLES = {
    "none": reference.RESAMPLE_NONE,
    "up": reference.RESAMPLE_UP,
    "down": reference.RESAMPLE_DOWN,
}


def resampled_shape(x: Tensor, mode: int) -> list[int]:
    """The shape of x after resampling by ``mode``."""
    if mode == reference.RESAMPLE_UP:
        return [*x.shape[:2], *(2 * size for size in x.shape[2:])]
    if mode == reference.RESAMPLE_DOWN:
        return [*x.shape[:2], *(size // 2 for size in x.shape[2:])]
    return list(x.shape)


def fake_forward(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    bias: Tensor,  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    shift: Tensor | None,  # noqa: ARG001
    groups: int,
    eps: float,  # noqa: ARG001
    silu: bool,  # noqa: ARG001
    mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/deviation without values."""
    output = x.new_empty(resampled_shape(x, mode)).contiguous(memory_format=reference.memory_format(x))
    statistics = (x.shape[0], groups)
    dtype = reference.compute_dtype(x.dtype)
    return output, x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


def fake_backward(
    grad: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    silu: bool,  # noqa: ARG001
    mode: int,  # noqa: ARG001
    summand: Tensor | None = None,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias, scale and shift, and the sums of the first, without values."""
    grad_x = x.new_empty(x.shape).contiguous(memory_format=reference.memory_format(x))
    grad_scale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    grad_shift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    found = reference.empty_sums(x, x.shape[1], sums)
    parameters = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return grad_x, *parameters, grad_scale, grad_shift, found


FORWARD = define(
    "group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu,"
    " int mode) -> (Tensor output, Tensor mean, Tensor rstd)",
    reference.group_norm,
    fake_forward,
)
BACKWARD = define(
    "group_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor mean,"
    " Tensor rstd, bool silu, int mode, Tensor? summand=None, int sums=0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.group_norm_backward,
    fake_backward,
)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Any],
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The op, by ``call``, and x itself: what comes back for that is another path's gradient of x."""
        output, mean, rstd = call(x, weight, bias, scale, shift, *settings)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.silu, ctx.mode = settings[2:]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return output, mean, rstd, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *further: Tensor | None) -> tuple[Tensor | None, ...]:
        beside = further[2]
        if grad is None:
            return None, beside, *(None,) * 8
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        learning = any(ctx.needs_input_grad[2:4])
        sums = column_sums.wanted("group_norm_backward", x, learning=learning)
        gradients = BACKWARD(
            grad, x, weight, bias, scale, shift, mean, rstd, ctx.silu, ctx.mode, beside, sums
        )
        column_sums.remember(gradients[0], 1, gradients[5])
        film = gradients[3:5] if scale is not None else (None, None)
        return None, *gradients[:3], *film, None, None, None, None


def _autograd(keyset: Any, *args: Any) -> Any:
    if needs_gradient(args[:5]):
        call = functools.partial(FORWARD.redispatch, keyset & torch._C._after_autograd_keyset)
        found: Any = _GroupNorm.apply(call, *args)  # type: ignore[no-untyped-call]
        return found[:3]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *args)


differentiable("group_norm", _autograd)


def mode_of(resample: Resample) -> int:
    """How the ops spell a choice of resampling; ``ValueError`` if there is none of this name."""
    if resample not in RESAMPLES:
        raise ValueError(f"unknown resample {resample!r}; use one of {', '.join(RESAMPLES)}")
    return RESAMPLES[resample]


def check(
    channels: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
) -> None:
    """Raise ``ValueError`` if a norm of so many channels of x does not fit its parameters or its FiLM."""
    batch = x.shape[0]
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels are not divisible into {groups} groups; change one of them")
    if channels == 0 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; only the batch may be empty")
    for name, values in (("weight", weight), ("bias", bias)):
        if values.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; x with {channels} channels needs [{channels}]"
            )
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift belong together; give both or neither")
    for name, film in (("scale", scale), ("shift", shift)):
        if film is not None and film.shape != (batch, channels):
            raise ValueError(f"{name} has shape {tuple(film.shape)}; it must be [{batch}, {channels}]")


def _check_map(x: Tensor) -> None:
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; give [B, C, *space] with 1, 2 or 3 dimensions of space"
        )
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; give a floating-point tensor")


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = "none",
    resample: Resample = "none",
) -> Tensor:
    """Normalise each group of channels, then affine, FiLM, activation and 2x resampling in one pass.

    Statistics are computed in fp32 (fp64 for fp64 input) and the result is rounded once, to x's dtype.

    Args:
        x: [B, C, *space], space of 1-3 dimensions, contiguous or channels-last; the format is kept.
        weight: [C].
        bias: [C].
        groups: number of groups; divides C.
        eps: added to the variance.
        scale: [B, C], FiLM's factor minus one; together with shift, or None.
        shift: [B, C], FiLM's summand.
        activation: "none" or "silu", after FiLM.
        resample: "up" repeats each pixel twice along each dimension of space, "down" averages pairs (an odd
            last row is dropped), "none" keeps the size.

    Returns:
        [B, C, *resampled space] in the dtype of x. Differentiable once.

    Raises:
        ValueError: shapes that do not fit, channels that are not divisible by groups, or an unknown choice.
    """
    _check_map(x)
    check(x.shape[1], x, weight, bias, scale, shift, groups)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(_ACTIVATIONS)}")
    mode = mode_of(resample)
    if mode == reference.RESAMPLE_DOWN and 1 in x.shape[2:]:
        raise ValueError(
            f"space {tuple(x.shape[2:])} is too small to halve; each dimension must be at least 2"
        )
    output: Tensor = FORWARD(x, weight, bias, scale, shift, groups, eps, _ACTIVATIONS[activation], mode)[0]
    return output


def group_norm_beside(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int = 32, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`group_norm` without activation, and x for a path beside it.

    In training the second is a view of x. Who reads it in place of x has its gradient added as the norm's
    backward pass writes its own, which saves autograd a sum of two maps.

    Raises:
        ValueError: as :func:`group_norm`.
    """
    if not needs_gradient([x]) or torch.compiler.is_compiling():
        return group_norm(x, weight, bias, groups=groups, eps=eps), x
    _check_map(x)
    check(x.shape[1], x, weight, bias, None, None, groups)
    found: Any = _GroupNorm.apply(  # type: ignore[no-untyped-call]
        FORWARD, x, weight, bias, None, None, groups, eps, False, reference.RESAMPLE_NONE
    )
    return found[0], found[3]
