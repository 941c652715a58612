"""Both losses of a learned variance in one op: the formulas one by one, dtypes, strides, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.diffusion import GaussianDiffusion, Schedule, simple_loss, vlb_term
from glide_fast.diffusion import hybrid_loss as loss_of_training
from glide_fast.ops import hybrid_loss, use_reference
from glide_fast.ops.hybrid_loss import BACKWARD, FORWARD
from tests.ops.hybrid_loss_cases import Inputs, draw, one_by_one, weights, wide


def differentiate(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses, and the gradient of their weighted sum."""
    output = inputs[0].detach().requires_grad_()
    losses = hybrid_loss(output, *inputs[1:])
    grads = [each.to(loss.dtype) for each, loss in zip(weights(len(output)), losses, strict=True)]
    (grad,) = torch.autograd.grad(losses, output, grads)
    return losses[0].detach(), losses[1].detach(), grad


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_formulas_one_by_one_bit_for_bit(dtype: torch.dtype, schedule: str) -> None:
    inputs = draw(schedule=schedule)
    inputs = wide(inputs) if dtype is torch.float64 else inputs
    for mine, expected in zip(differentiate(inputs), one_by_one(inputs, schedule), strict=True):
        assert mine.dtype is dtype
        assert torch.equal(mine, expected)
    with use_reference():
        for mine, expected in zip(differentiate(inputs), one_by_one(inputs, schedule), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_output_is_widened_first_and_gets_a_half_gradient(dtype: torch.dtype) -> None:
    output, *rest = draw()
    half: Any = (output.to(dtype), *rest)
    for mine, expected in zip(differentiate(half), one_by_one(half, "cosine"), strict=True):
        assert torch.equal(mine, expected)
    assert differentiate(half)[2].dtype is dtype


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 9), (1, 1, 1, 1), (2, 3, 2, 3, 4)], ids=str)
def test_pictures_of_any_dimensions(shape: tuple[int, ...]) -> None:
    inputs = draw(shape)
    for mine, expected in zip(differentiate(inputs), one_by_one(inputs, "cosine"), strict=True):
        assert torch.equal(mine, expected)


def test_no_picture_has_no_loss() -> None:
    mse, vlb, grad = differentiate(draw((0, 3, 4, 4)))
    assert (mse.shape, vlb.shape, grad.shape) == ((0,), (0,), (0, 6, 4, 4))


def test_the_gradient_is_laid_out_like_the_output() -> None:
    output, *rest = draw()
    expected = BACKWARD(*weights(6), output, *rest)
    transposed = output.transpose(2, 3).contiguous().transpose(2, 3)
    for each in (output.contiguous(memory_format=torch.channels_last), transposed):
        grad = BACKWARD(*weights(6), each, *rest)
        assert torch.equal(grad, expected)
        assert grad.stride() == each.stride()


@pytest.mark.parametrize("level", [None, -1.0, 1.0, 0.5])
@pytest.mark.parametrize("error", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_backward_op_is_the_gradient_that_autograd_finds(
    schedule: str, error: float, level: float | None
) -> None:
    """At last steps, others, in the outer bins, and where a probability is cut off."""
    output, x_start, *rest = wide(draw(schedule=schedule, error=error))
    x_start = x_start if level is None else torch.full_like(x_start, level)
    inputs = (output, x_start, *rest)
    grad = BACKWARD(*(each.double() for each in weights(6)), *inputs)
    torch.testing.assert_close(grad, one_by_one(inputs, schedule)[2], rtol=1e-7, atol=1e-10)


def test_a_loss_that_is_not_used_gives_nothing() -> None:
    output, *rest = draw()
    output.requires_grad_()
    mse, vlb = hybrid_loss(output, *rest)
    (of_mse,) = torch.autograd.grad(mse.sum(), output, retain_graph=True)
    (of_vlb,) = torch.autograd.grad(vlb.sum(), output)
    assert (of_mse[:, :3] != 0).all()
    assert (of_mse[:, 3:] == 0).all()
    assert (of_vlb[:, :3] == 0).all()
    assert (of_vlb[:, 3:] != 0).any()


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_the_op_keeps_the_dispatchers_rules(op: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = draw() if dtype is torch.float32 else wide(draw())
        grads = weights(len(inputs[0])) if op is BACKWARD else ()
        torch.library.opcheck(op, (*grads, *inputs), test_utils=("test_schema", "test_faketensor"))


def test_it_compiles_whole() -> None:
    inputs = draw()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(output: Tensor) -> Tensor:
        mse, vlb = hybrid_loss(output, *inputs[1:])
        return (mse * weights(6)[0] + vlb * weights(6)[1]).sum()

    output = inputs[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(output), output)
    torch.testing.assert_close(grad, one_by_one(inputs, "cosine")[2])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_loss_of_training_is_its_sum(weight: float) -> None:
    output, x_start, x_t, noise, t, _ = draw()
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000))
    found = loss_of_training(
        diffusion, output, x_start, x_t, t, noise, mse_weight=torch.arange(6.0), vlb_weight=weight
    )
    assert torch.equal(found.mse, simple_loss(diffusion, output, x_start, x_t, t, noise) * torch.arange(6.0))
    assert torch.equal(found.vlb, vlb_term(diffusion, output, x_start, x_t, t) * weight)
    assert torch.equal(found.loss, found.mse + found.vlb)


def test_pictures_that_need_a_gradient_still_get_one_in_training() -> None:
    output, x_start, x_t, noise, t, _ = draw()
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000))
    x_t.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of_training(diffusion, output, x_start, x_t, t, noise).loss.sum(), x_t)
    assert (grad != 0).any()


def test_what_does_not_fit_is_refused() -> None:
    output, x_start, x_t, noise, t, table = draw()
    with pytest.raises(ValueError, match=r"output has shape \(6, 3, 5, 7\) but x_t .* needs \(6, 6, 5, 7\)"):
        hybrid_loss(output[:, :3], x_start, x_t, noise, t, table)
    with pytest.raises(ValueError, match=r"noise has shape \(6, 3, 5, 6\) but x_t"):
        hybrid_loss(output, x_start, x_t, noise[..., 1:], t, table)
    for wrong in (t[1:], t.float()):
        with pytest.raises(ValueError, match=r"t is torch.* give int64 \[6\]"):
            hybrid_loss(output, x_start, x_t, noise, wrong, table)
    with pytest.raises(ValueError, match=r"must be \[T, 8\]"):
        hybrid_loss(output, x_start, x_t, noise, t, table[:, 1:])
    with pytest.raises(ValueError, match="x_start is on meta but the output on cpu"):
        hybrid_loss(output, x_start.to("meta"), x_t, noise, t, table)
    with pytest.raises(ValueError, match="only the output gets a gradient"):
        hybrid_loss(output, x_start, x_t, noise.clone().requires_grad_(), t, table)
