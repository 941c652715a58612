"""The two losses of a diffusion that learns its variance, from the model's output in one pass over it.

    mse = mean((epsilon - noise)^2)                                            (arXiv 2006.11239, equation 14)
    vlb = mean(KL(q(x_(t-1) | x_t, x_0) || p)) / ln 2, at t = 0 mean(-ln p(x_0 | x_1)) / ln 2     (equation 5)

The output's first C channels are epsilon, its others say where the log-variance of p lies between the two of
a table (arXiv 2102.09672, equation 15). The bound teaches the variance alone (equation 16 there): it gives no
gradient to the first C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glide_fast.ops import reference_losses as reference
from glide_fast.ops.dispatch import define, differentiable, is_implemented, needs_gradient
from glide_fast.ops.sampler_step import COLUMNS


def _fake_forward(
    output: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    mse = torch.promote_types(x_t.dtype, noise.dtype)
    vlb = torch.promote_types(torch.promote_types(x_t.dtype, x_start.dtype), table.dtype)
    return x_t.new_empty(t.shape, dtype=mse), x_t.new_empty(t.shape, dtype=vlb)


def _fake_backward(
    grad_mse: Tensor,  # noqa: ARG001 (a fake has the op's signature)
    grad_vlb: Tensor,  # noqa: ARG001
    output: Tensor,
    x_start: Tensor,  # noqa: ARG001
    x_t: Tensor,  # noqa: ARG001
    noise: Tensor,  # noqa: ARG001
    t: Tensor,  # noqa: ARG001
    table: Tensor,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(output)


_INPUTS = "Tensor output, Tensor x_start, Tensor x_t, Tensor noise, Tensor t, Tensor table"
FORWARD = define(
    "hybrid_loss", f"({_INPUTS}) -> (Tensor mse, Tensor vlb)", reference.hybrid_loss, _fake_forward
)
BACKWARD = define(
    "hybrid_loss_backward",
    f"(Tensor grad_mse, Tensor grad_vlb, {_INPUTS}) -> Tensor",
    reference.hybrid_loss_backward,
    _fake_backward,
)


class _HybridLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        losses: tuple[Tensor, Tensor] = FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mse: Tensor, grad_vlb: Tensor) -> tuple[Tensor | None, ...]:
        grad = BACKWARD(grad_mse, grad_vlb, *ctx.saved_tensors)
        return None, grad, *[None] * 5


def _autograd(keyset: Any, output: Tensor, *rest: Any) -> Any:
    if needs_gradient((output,)):
        if not is_implemented("hybrid_loss", output.device.type.upper()):
            return reference.hybrid_loss(output, *rest)  # as autograd sees it, nothing is computed twice
        return _HybridLoss.apply(keyset, output, *rest)  # type: ignore[no-untyped-call]
    return FORWARD.redispatch(keyset & torch._C._after_autograd_keyset, output, *rest)


differentiable("hybrid_loss", _autograd)


def hybrid_loss(
    output: Tensor, x_start: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean squared error of the noise, and the bound's term in bits a dimension.

    Args:
        output: the model's answer to x_t, [B, 2C, *space], any floating-point dtype, any strides.
        x_start: the clean pictures, [B, C, *space].
        x_t: the noised pictures, like x_start.
        noise: the noise in them, like x_start.
        t: int64 [B], rows of the table; not checked on a GPU.
        table: float32 [T, 8], the ancestral step's: see :mod:`glide_fast.ops.sampler_step`.

    Returns:
        mse and vlb, both [B]; arithmetic in float32, or float64. Differentiable once, by the output.

    Raises:
        ValueError: shapes or devices that do not fit, or a picture that needs a gradient.
    """
    batch, channels, *space = x_t.shape
    if output.shape != (batch, 2 * channels, *space):
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)} but x_t {tuple(x_t.shape)} needs "
            f"{(batch, 2 * channels, *space)}"
        )
    for name, picture in (("x_start", x_start), ("noise", noise)):
        if picture.shape != x_t.shape:
            raise ValueError(f"{name} has shape {tuple(picture.shape)} but x_t {tuple(x_t.shape)}")
    if t.shape != (batch,) or t.is_floating_point():
        raise ValueError(f"t is {t.dtype} {tuple(t.shape)}; give int64 [{batch}], one step a picture")
    if table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(f"the table has shape {tuple(table.shape)}; it must be [T, {len(COLUMNS)}]")
    rest = {"x_start": x_start, "x_t": x_t, "noise": noise, "t": t, "the table": table}
    for name, tensor in rest.items():
        if tensor.device != output.device:
            raise ValueError(f"{name} is on {tensor.device} but the output on {output.device}; move one")
    if needs_gradient((x_start, x_t, noise)):
        raise ValueError("only the output gets a gradient; detach x_start, x_t and noise")
    losses: tuple[Tensor, Tensor] = FORWARD(output, x_start, x_t, noise, t, table)
    return losses
