"""Linear layers: values and gradients against float64, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parity import excess
from glide_fast.ops import linear, use_reference

CASES = [((2, 40, 64), 96, 32), ((3, 33), 70, 0), ((65, 5), 7, 4), ((2, 8, 7), 3, 0), ((0, 6), 4, 0)]
Inputs = dict[str, Tensor]


def draw(shape: tuple[int, ...], out: int, second: int) -> Inputs:
    """Leaves by name, of a call with everything there is."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    inputs = {"x": normal(*shape), "weight": normal(out, shape[-1] + second), "bias": normal(out)}
    if second:
        inputs["second"] = normal(*shape[:-1], second)
    return inputs | {"residual": normal(*shape[:-1], out)}


def plain(inputs: Inputs) -> Tensor:
    parts = [inputs[name] for name in ("x", "second") if name in inputs]
    return F.linear(torch.cat(parts, dim=-1), inputs["weight"], inputs["bias"]) + inputs["residual"]


def differentiate(function: Any, inputs: Inputs) -> list[Tensor]:
    output = function(inputs)
    arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, list(inputs.values()), arriving)]


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}


@pytest.mark.parametrize(("shape", "out", "second"), CASES, ids=str)
def test_values_and_gradients_are_exact(shape: tuple[int, ...], out: int, second: int) -> None:
    inputs = draw(shape, out, second)
    exact = differentiate(plain, converted(inputs, torch.float64))
    usual = differentiate(plain, inputs)
    for actual, simple, value in zip(
        differentiate(lambda given: linear(**given), inputs), usual, exact, strict=True
    ):
        assert excess(actual, simple, value) <= 1
    with torch.no_grad():
        assert excess(linear(**inputs), usual[0], exact[0]) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_follow_the_reference(dtype: torch.dtype) -> None:
    inputs = converted(draw(*CASES[0]), dtype)
    actual = differentiate(lambda given: linear(**given), inputs)
    with use_reference():
        defined = differentiate(lambda given: linear(**given), inputs)
    for mine, value in zip(actual, defined, strict=True):
        spread = 4 * torch.finfo(dtype).eps * float(value.abs().max())
        torch.testing.assert_close(mine, value, rtol=0, atol=spread)


def test_a_1x1_convolutions_weight_keeps_its_shape() -> None:
    inputs = draw((2, 40, 64), 96, 0)
    weight = inputs["weight"].detach()[..., None, None].requires_grad_()
    expected = differentiate(lambda given: linear(**given), inputs)
    actual = differentiate(lambda given: linear(**given), inputs | {"weight": weight})
    for mine, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.reshape(value.shape), value)
    assert actual[2].shape == (96, 64, 1, 1)


def test_rows_of_any_stride() -> None:
    x = torch.randn(2, 24, 50).transpose(1, 2)
    weight = torch.randn(32, 24)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (4, 5), "weight has shape"),
        ("weight", (4, 6, 3), "weight has shape"),
        ("bias", (5,), "bias has shape"),
        ("residual", (2, 5), "residual has shape"),
        ("second", (3, 1), "must match x"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    inputs = {"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        linear(**inputs)
    with pytest.raises(ValueError, match="weight is torch"):
        linear(torch.zeros(2, 6), torch.zeros(4, 6, dtype=torch.float64))
