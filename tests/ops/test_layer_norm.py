"""Layer normalisation: values and gradients against float64, dtypes, layouts, statistics, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parity import excess
from glide_fast.ops import layer_norm, layer_norm_beside, use_reference

SHAPES = [(2, 77, 512), (400, 768), (3, 5, 7), (65, 33), (4, 2), (1,), (130, 100), (0, 6), (2, 0, 6)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, far from mean 0, and weight and bias, far from 1 and 0."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape[-1:]))
    return tuple(each.to(dtype).requires_grad_() for each in (2 * x + 3, weight + 1, bias))  # type: ignore[return-value]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def differentiate(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    output = function(*inputs)
    arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, arriving)]


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.detach().double().requires_grad_() for each in inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_values_and_gradients_are_exact(shape: tuple[int, ...]) -> None:
    inputs = draw(shape)
    exact, usual = differentiate(plain, doubled(inputs)), differentiate(plain, inputs)
    for actual, simple, value in zip(differentiate(layer_norm, inputs), usual, exact, strict=True):
        assert actual.shape == value.shape
        assert excess(actual, simple, value) <= 1


@pytest.mark.usefixtures("isa")
def test_a_mean_far_from_zero_does_not_cancel() -> None:
    x = (torch.randn(9, 200, generator=torch.Generator().manual_seed(0)) + 1e4).requires_grad_()
    inputs = x, torch.ones(200, requires_grad=True), torch.zeros(200, requires_grad=True)
    exact, usual = differentiate(plain, doubled(inputs)), differentiate(plain, inputs)
    for actual, simple, value in zip(differentiate(layer_norm, inputs), usual, exact, strict=True):
        assert excess(actual, simple, value) <= 1


def test_rows_of_any_stride() -> None:
    x, weight, bias = (each.detach() for each in draw((6, 5, 24)))
    for view in (x[:, 0], x.transpose(0, 1), x.mT.contiguous().mT, x[:, ::2], x.expand(2, 6, 5, 24)):
        torch.testing.assert_close(layer_norm(view, weight, bias), plain(view, weight, bias))
        assert layer_norm(view, weight, bias).is_contiguous()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_is_float32_arithmetic_rounded_once(parameters: torch.dtype) -> None:
    x = draw((3, 40, 96), torch.bfloat16)[0]
    _, weight, bias = draw((96,), parameters)
    expected = plain(x.float(), weight.float(), bias.float())
    actual = layer_norm(x, weight, bias)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-6)
    gradients = differentiate(layer_norm, (x, weight, bias))[1:]
    assert [each.dtype for each in gradients] == [torch.bfloat16, parameters, parameters]
    with use_reference():
        defined = differentiate(layer_norm, (x, weight, bias))[1:]
    for mine, value in zip(gradients, defined, strict=True):
        torch.testing.assert_close(mine, value, rtol=2e-2, atol=1e-4)


def test_float64_parameters_widen_the_arithmetic() -> None:
    x = draw((20, 30))[0].detach()
    _, weight, bias = (each.detach() for each in draw((30,), torch.float64))
    assert torch.equal(layer_norm(x, weight, bias), plain(x.double(), weight, bias).float())
    inputs = draw((4, 6), torch.float64)
    assert torch.autograd.gradcheck(layer_norm, inputs)


def test_frozen_parameters_cost_no_gradients() -> None:
    x, weight, bias = draw((40, 12))
    expected = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x)[0]
    frozen = layer_norm(x, weight.detach(), bias.detach())
    torch.testing.assert_close(torch.autograd.grad(frozen.square().sum(), x)[0], expected)
    output = layer_norm(x.detach(), weight, bias.detach())
    assert torch.autograd.grad(output.sum(), weight)[0].shape == (12,)


USES = {
    "both": lambda y, x: y.square() * x.sin(),
    "the norm": lambda y, _x: y.square(),
    "the other path": lambda _y, x: x.sin(),
}


@pytest.mark.parametrize("use", USES)
def test_x_beside_its_norm_in_float64(use: str) -> None:
    def function(*inputs: Tensor) -> Tensor:
        y, same = layer_norm_beside(*inputs)
        return USES[use](y, same)

    inputs = draw((4, 6), torch.float64)
    if use == "the other path":  # parameters have no gradients there
        inputs = inputs[0], *(each.detach() for each in inputs[1:])  # type: ignore[assignment]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_x_beside_its_norm_learns_exactly(shape: tuple[int, ...]) -> None:
    inputs = draw(shape)

    def ours(*inputs: Tensor) -> Tensor:
        y, same = layer_norm_beside(*inputs)
        return torch.stack([y, same])

    def usual(*inputs: Tensor) -> Tensor:
        return torch.stack([plain(*inputs), inputs[0]])

    exact, simple = differentiate(usual, doubled(inputs)), differentiate(usual, inputs)
    for actual, near, value in zip(differentiate(ours, inputs), simple, exact, strict=True):
        assert actual.shape == value.shape
        assert excess(actual, near, value) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_summand_is_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    x, weight, _ = (each.detach() for each in draw((3, 40, 96)))
    x, grad = x.to(dtype), x.sin().to(dtype)
    _, mean, rstd = torch.ops.glide_fast.layer_norm(x, weight, weight, 1e-5)
    backward = torch.ops.glide_fast.layer_norm_backward
    given = x, weight, mean, rstd, True, True
    for summand in (x.cos(), x.cos().transpose(0, 1).contiguous().transpose(0, 1), x[:, :1].expand_as(x)):
        found = backward(grad, *given, summand)
        wide = backward(grad.float(), x.float(), *given[1:])
        torch.testing.assert_close(found[0], (wide[0] + summand.float()).to(dtype), rtol=0, atol=0)
        assert all(torch.equal(*pair) for pair in zip(found[1:], wide[1:], strict=True))
        with use_reference():
            torch.testing.assert_close(found, backward(grad, *given, summand), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 96), (7, 5), (0, 6)], ids=str)
@pytest.mark.usefixtures("isa")
def test_the_sums_of_the_gradients_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = (each.detach() for each in draw(shape))
    x, grad = x.to(dtype), x.sin().to(dtype)
    _, mean, rstd = torch.ops.glide_fast.layer_norm(x, weight, weight, 1e-5)
    backward = torch.ops.glide_fast.layer_norm_backward
    for summand in (None, x.cos()):
        plain = backward(grad, x, weight, mean, rstd, True, True, summand)
        assert plain[3].shape == (0,)
        given = x.double(), weight.double(), mean.double(), rstd.double(), True, True
        wide = backward(grad.double(), *given, summand if summand is None else summand.double())[0]
        exact = wide.flatten(0, -2).sum(0)
        for _ in range(2):
            *gradients, sums = backward(grad, x, weight, mean, rstd, True, True, summand, 2)
            assert (sums.shape, sums.dtype) == ((2, shape[-1]), dtype)
            assert torch.equal(sums[0], sums[1])
            eps = torch.finfo(dtype).eps
            rounding = 10 * eps * float(wide.abs().sum(0).max()) if wide.numel() else 0
            torch.testing.assert_close(sums[0].double(), exact, rtol=eps, atol=rounding)
            assert all(torch.equal(*pair) for pair in zip(gradients, plain[:3], strict=True))
    assert backward(grad, x, weight, mean, rstd, False, True, None, 2)[3].shape == (0,)


def test_x_beside_its_norm_without_gradients_is_x_itself() -> None:
    x, weight, bias = draw((4, 6))
    for given in (x.detach(), x):
        with torch.set_grad_enabled(given is not x):
            y, same = layer_norm_beside(given, weight, bias, eps=0.5)
            assert same is given
            assert torch.equal(y, layer_norm(given, weight, bias, eps=0.5))
    with pytest.raises(ValueError, match="weight has shape"):
        layer_norm_beside(x, weight[:5], bias)


def test_the_saved_statistics_are_what_they_say() -> None:
    x = draw((2, 5, 64))[0].detach()
    _, mean, rstd = torch.ops.glide_fast.layer_norm(x, torch.ones(64), torch.zeros(64), 1e-5)
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(rstd, (x.var(-1, unbiased=False) + 1e-5).rsqrt())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(()), r"give floating-point \[..., C\]"),
        ("x", torch.zeros(2, 6, dtype=torch.long), "x is torch.int64"),
        ("weight", torch.zeros(5), r"weight has shape \(5,\); x needs \[6\]"),
        ("bias", torch.zeros(6, 1), "bias has shape"),
        ("bias", torch.zeros(6, dtype=torch.float64), "one floating-point dtype"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor, message: str) -> None:
    inputs = {"x": torch.zeros(2, 6), "weight": torch.zeros(6), "bias": torch.zeros(6), name: value}
    with pytest.raises(ValueError, match=message):
        layer_norm(**inputs)
