"""Group normalisation, FiLM and SiLU with dropout behind them, whose mask is drawn twice and never stored.

    y = keep silu((normalise(x) * weight + bias) * (1 + scale) + shift) / (1 - p)

Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014). What is kept
is decided by Philox-4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), a
function of a seed and a position: the backward pass computes it again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from glide_fast.ops import column_sums, reference
from glide_fast.ops.dispatch import define, differentiable, has_kernel, needs_gradient
from glide_fast.ops.group_norm import check, fake_backward, fake_forward, group_norm

WORDS = 4  # that one counter of Philox gives: those of four neighbouring channels
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the mask of others is PyTorch's


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four words for each counter of four words, int64 tensors of 32-bit numbers."""
    first, second, third, fourth = counter
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        low, high = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]  # modulo 2^64, whose bits are right
        first, third = (high >> 32 & _WORD) ^ second ^ keys[0], (low >> 32 & _WORD) ^ fourth ^ keys[1]
        second, fourth = high & _WORD, low & _WORD
        keys = [key + step & _WORD for key, step in zip(keys, _INCREMENTS, strict=True)]
    return first, second, third, fourth


def largest_dropped(dropout: float) -> int:
    """The largest of the 2^32 words whose element is dropped: the share is met to 2^-32."""
    return max(round(dropout * 2**32) - 1, 0)


def kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Which elements of [B, C, *space] stay, whatever their order in memory.

    The word of a channel is number channel % 4 of counter (pixel · ⌈C / 4⌉ + channel // 4, picture, 0, 0).
    """
    batch, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    blocks = -(-channels // WORDS)
    place = torch.arange(pixels * blocks, device=x.device).bitwise_and(_WORD).expand(batch, -1)
    picture = torch.arange(batch, device=x.device)[:, None].expand_as(place)
    none = torch.zeros_like(place)
    words = torch.stack(philox((place, picture, none, none), seed), dim=2)
    words = words.reshape(batch, pixels, blocks * WORDS)[:, :, :channels]
    return (words > largest_dropped(dropout)).transpose(1, 2).reshape(x.shape)


def _dropped(y: Tensor, dropout: float, seed: int) -> Tensor:
    return torch.where(kept(y, dropout, seed), y / (1 - dropout), 0)


def _reference(
    x: Tensor,  # [B, C, *space]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    groups: int,
    eps: float,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch."""
    wide = x.to(reference.compute_dtype(x.dtype))
    settings = (groups, eps, True, reference.RESAMPLE_NONE)
    y, mean, rstd = reference.group_norm(wide, weight, bias, scale, shift, *settings)
    y = _dropped(y, dropout, seed).to(x.dtype)
    return y.contiguous(memory_format=reference.memory_format(x)), mean, rstd


def _reference_backward(
    grad: Tensor,  # like x
    x: Tensor,  # [B, C, *space]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    scale: Tensor | None,  # [B, C]
    shift: Tensor | None,  # [B, C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    dropout: float,
    seed: int,
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, scale, shift, those two empty without FiLM; and sums of the first."""
    arriving = _dropped(grad.to(reference.compute_dtype(x.dtype)), dropout, seed)
    return reference.group_norm_backward(
        arriving, x, weight, bias, scale, shift, mean, rstd, True, reference.RESAMPLE_NONE, None, sums
    )


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,  # noqa: ARG001 (a fake has the op's signature)
    seed: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_forward(x, weight, bias, scale, shift, groups, eps, True, reference.RESAMPLE_NONE)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,  # noqa: ARG001 (a fake has the op's signature)
    seed: int,  # noqa: ARG001
    sums: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = reference.RESAMPLE_NONE
    return fake_backward(grad, x, weight, bias, scale, shift, mean, rstd, True, none, None, sums)


FORWARD = define(
    "dropped_group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps,"
    " float dropout, int seed) -> (Tensor output, Tensor mean, Tensor rstd)",
    _reference,
    _fake_forward,
)
BACKWARD = define(
    "dropped_group_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor mean,"
    " Tensor rstd, float dropout, int seed, int sums=0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference_backward,
    _fake_backward,
)


class _DroppedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, rstd = FORWARD.redispatch(
            keyset & torch._C._after_autograd_keyset, x, weight, bias, scale, shift, *settings
        )
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.drawn = settings[2:]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return output, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        learning = any(ctx.needs_input_grad[2:4])
        sums = column_sums.wanted("dropped_group_norm_backward", x, learning=learning)
        gradients = BACKWARD(grad, x, weight, bias, scale, shift, mean, rstd, *ctx.drawn, sums)
        column_sums.remember(gradients[0], 1, gradients[5])
        film = gradients[3:5] if scale is not None else (None, None)
        return None, *gradients[:3], *film, None, None, None, None


def _autograd(keyset: Any, *args: Any) -> Any:
    if needs_gradient(args[:5]):
        return _DroppedGroupNorm.apply(keyset, *args)  # type: ignore[no-untyped-call]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *args)


differentiable("dropped_group_norm", _autograd)


def draw_seed() -> int:
    """A seed from PyTorch's default generator of the CPU, which no device is waited for.

    Whoever saves and sets that generator's state, as activation checkpointing does, gets the same mask again.
    """
    with no_dispatch():  # it is a number also where tensors have no memory
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _is_capturing() -> bool:
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def _is_fused(x: Tensor) -> bool:
    """Whether a kernel serves x now: compiled and captured code would repeat the seed it was made with."""
    return (
        x.ndim in (3, 4, 5)
        and x.dtype in _DTYPES
        and not _is_capturing()
        and has_kernel("dropped_group_norm", x)
    )


def dropped_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout: float,
) -> Tensor:
    """Normalise each group of channels, then affine, FiLM, SiLU and dropout, as in training.

    Where a GPU has a kernel for it, this is one operation, and its mask comes from one number of PyTorch's
    default generator of the CPU. Elsewhere it is ``group_norm`` and PyTorch's dropout.

    Args:
        x: [B, C, *space], space of 1-3 dimensions, contiguous or channels-last; the format is kept.
        weight: [C].
        bias: [C].
        groups: number of groups; divides C.
        eps: added to the variance.
        scale: [B, C], FiLM's factor minus one; together with shift, or None.
        shift: [B, C], FiLM's summand.
        dropout: the probability that an element is set to 0; others are divided by one minus it.

    Returns:
        [B, C, *space] in the dtype of x. Differentiable once.

    Raises:
        ValueError: shapes that do not fit, channels that are not divisible by groups, or no probability.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} is no probability; give one from 0 to 1")
    if not dropout or not _is_fused(x):
        y = group_norm(x, weight, bias, groups=groups, eps=eps, scale=scale, shift=shift, activation="silu")
        return F.dropout(y, dropout)
    check(x.shape[1], x, weight, bias, scale, shift, groups)
    output: Tensor = FORWARD(x, weight, bias, scale, shift, groups, eps, dropout, draw_seed())[0]
    return output
