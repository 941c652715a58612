"""The losses' kernels against the formulas in float64: values, gradients, outer bins; how they compile."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.diffusion import hybrid_loss
from glide_fast.kernels import hybrid_loss as kernel
from tests.kernels.interpreter import DEVICE, environment, use_kernels
from tests.ops.hybrid_loss_cases import Inputs, diffusion_of, draw, one_by_one, weights, wide

TOLERANCE = 1e-6  # of the largest value
# Of the formulas' own error in float32 where that is larger, for losses and gradients; and the most.
FACTORS, MOST = (2, 2, 3, 3), 3e-5
HALVES = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def computed(inputs: Inputs) -> list[Tensor]:
    """Both losses and both halves of the gradient, by the kernels."""
    grads = [each.to(DEVICE) for each in weights(len(inputs[0]))]
    return [*kernel.hybrid_loss(*inputs), *kernel.hybrid_loss_backward(*grads, *inputs).chunk(2, dim=1)]


def expected(inputs: Inputs, schedule: str) -> list[Tensor]:
    """The same by the formulas one by one."""
    mse, vlb, grad = one_by_one(inputs, schedule)
    return [mse, vlb, *grad.chunk(2, dim=1)]


def error(found: Tensor, exact: Tensor) -> float:
    """The largest, in units of the largest value; of what is to be zero, as it is."""
    largest = float(exact.abs().max())
    return float((found.cpu().double() - exact).abs().max()) / (largest or 1.0)


def assert_exact(inputs: Inputs, *, schedule: str = "cosine") -> None:
    """Within the tolerance, or about as near as the formulas are in float32."""
    exact, plain = expected(wide(inputs), schedule), expected(inputs, schedule)
    for mine, value, other, factor in zip(computed(inputs), exact, plain, FACTORS, strict=True):
        assert mine.shape == value.shape
        assert error(mine, value) <= min(max(TOLERANCE, factor * error(other, value)), MOST)


@pytest.mark.parametrize("miss", [1.0, 0.01])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_losses_and_gradients_are_exact(schedule: str, miss: float) -> None:
    assert_exact(draw(schedule=schedule, error=miss), schedule=schedule)


@pytest.mark.parametrize("step", [0, 1, 50, 400, 999])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_each_step_is_exact_by_itself(schedule: str, step: int) -> None:
    """Also the last ones, where both variances are nearly one."""
    output, x_start, _, noise, t, table = draw((2, 3, 4, 4), schedule=schedule, device=DEVICE)
    t = torch.full_like(t, step)
    x_t = diffusion_of(schedule).q_sample(x_start, t, noise)
    assert_exact((output, x_start, x_t, noise, t, table), schedule=schedule)


@pytest.mark.parametrize("level", [-1.0, 1.0, -0.9985, 0.9985])
@pytest.mark.parametrize("miss", [0.0, 0.3, 30.0])
def test_pictures_in_the_outer_bins_and_beside_them(level: float, miss: float) -> None:
    """At step 0, from the middle of the distribution to where its probability is cut off."""
    output, x_start, _, noise, t, table = draw((2, 3, 4, 4), error=miss, device=DEVICE)
    x_start, t = torch.full_like(x_start, level), torch.zeros_like(t)
    x_t = diffusion_of("cosine").q_sample(x_start, t, noise)
    inputs = (output, x_start, x_t, noise, t, table)
    assert_exact(inputs)
    if miss == 30.0:
        assert (computed(inputs)[3] == 0).any()


@pytest.mark.parametrize(
    "shape", [(1, 3, 20, 20), (3, 1, 1, 1), (2, 4, 33), (2, 5), (2, 1, 3, 4, 5), (2, 3, 74, 75)], ids=str
)
def test_pictures_of_any_size_are_exact(shape: tuple[int, ...]) -> None:
    """The last has more elements than one program sums."""
    assert_exact(draw(shape, device=DEVICE))


@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
def test_16_bit_outputs(dtype: torch.dtype) -> None:
    output, *rest = draw(device=DEVICE)
    half: Any = (output.to(dtype), *rest)
    found, exact = computed(half), expected(wide(half), "cosine")
    for mine, value in zip(found[:2], exact[:2], strict=True):
        assert error(mine, value) <= TOLERANCE
    for mine, value in zip(found[2:], exact[2:], strict=True):
        assert mine.dtype is dtype
        assert error(mine, value) <= HALVES[dtype]


def test_outputs_with_any_strides_give_gradients_like_them() -> None:
    output, *rest = draw((2, 3, 5, 7), device=DEVICE)
    plain = computed((output, *rest))  # type: ignore[arg-type]
    transposed = output.transpose(2, 3).contiguous().transpose(2, 3)
    part = torch.cat([output, output], dim=1)[:, : output.shape[1]]
    for each in (output.contiguous(memory_format=torch.channels_last), transposed, part):
        inputs: Any = (each, *rest)
        for mine, value in zip(computed(inputs), plain, strict=True):
            assert torch.equal(mine, value)
        grad = kernel.hybrid_loss_backward(*(each.to(DEVICE) for each in weights(2)), *inputs)
        assert grad.stride() == torch.empty_like(each).stride()


def test_gradients_that_are_one_number_for_all_are_read_where_they_are() -> None:
    inputs = draw((2, 3, 5, 7), device=DEVICE)
    one = torch.full((1,), 0.5, device=DEVICE)
    same = kernel.hybrid_loss_backward(one.expand(2), one.expand(2), *inputs)
    assert torch.equal(same, kernel.hybrid_loss_backward(one.repeat(2), one.repeat(2), *inputs))


def test_a_nan_reaches_the_losses_of_its_picture_alone() -> None:
    for place in (0, 1):
        inputs = draw((2, 3, 4, 4), device=DEVICE)  # the first is at its last step
        inputs[0][place, :, 0, 0] = float("nan")
        for loss in kernel.hybrid_loss(*inputs):
            assert loss.isnan().tolist() == [place == 0, place == 1]


def test_what_the_kernels_do_not_take_is_computed_all_the_same() -> None:
    for inputs in (wide(draw(device=DEVICE)), draw((0, 3, 4, 4), device=DEVICE)):
        for mine, value in zip(computed(inputs), expected(inputs, "cosine"), strict=True):
            torch.testing.assert_close(mine.cpu(), value)


def test_training_calls_both(monkeypatch: pytest.MonkeyPatch) -> None:
    output, x_start, x_t, noise, t, _ = draw(device=DEVICE)
    calls: list[str] = []

    def gradient(served: bool) -> tuple[Tensor, Tensor]:
        leaf = output.clone().requires_grad_()
        with use_kernels() if served else nullcontext():
            loss = hybrid_loss(diffusion_of("cosine"), leaf, x_start, x_t, t, noise).loss
            (grad,) = torch.autograd.grad(loss.mean(), leaf)
        return loss.detach(), grad

    def called(name: str) -> Callable[..., object]:
        function = getattr(kernel, name)
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    expected_loss, expected_grad = gradient(served=False)
    for name in ("hybrid_loss", "hybrid_loss_backward"):
        monkeypatch.setattr(kernel, name, called(name))
    op = importlib.import_module("glide_fast.ops.hybrid_loss")
    monkeypatch.setattr(op, "is_implemented", lambda *_: True)  # on the CPU too, for the interpreter
    loss, grad = gradient(served=True)
    assert calls == ["hybrid_loss", "hybrid_loss_backward"]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_they_compile_without_spills_to_wide_loads(target: str) -> None:
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", "hybrid_loss", target]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(kernel.CASES)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= 96, row
        assert row["wide_loads"] >= 3, row
