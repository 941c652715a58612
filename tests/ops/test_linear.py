"""Linear layers and their activations: values and gradients against float64, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parity import excess
from glide_fast.ops import LinearActivation, linear, use_reference

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


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[LinearActivation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}


def plain(inputs: Inputs, activation: LinearActivation = "none") -> Tensor:
    parts = [inputs[name] for name in ("x", "second") if name in inputs]
    y = F.linear(torch.cat(parts, dim=-1), inputs["weight"], inputs["bias"])
    return ACTIVATIONS[activation](y) + inputs["residual"]


def differentiate(function: Any, inputs: Inputs) -> list[Tensor]:
    output = function(inputs)
    arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, list(inputs.values()), arriving)]


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "out", "second"), CASES, ids=str)
@pytest.mark.usefixtures("isa")
def test_values_and_gradients_are_exact(
    shape: tuple[int, ...], out: int, second: int, activation: LinearActivation
) -> None:
    inputs = draw(shape, out, second)
    exact = differentiate(lambda given: plain(given, activation), converted(inputs, torch.float64))
    usual = differentiate(lambda given: plain(given, activation), inputs)
    for actual, simple, value in zip(
        differentiate(lambda given: linear(**given, activation=activation), inputs), usual, exact, strict=True
    ):
        assert excess(actual, simple, value) <= 1
    with torch.no_grad():
        assert excess(linear(**inputs, activation=activation), usual[0], exact[0]) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_follow_the_reference(dtype: torch.dtype, activation: LinearActivation) -> None:
    inputs = converted(draw(*CASES[0]), dtype)
    actual = differentiate(lambda given: linear(**given, activation=activation), inputs)
    with use_reference():
        defined = differentiate(lambda given: linear(**given, activation=activation), inputs)
    for mine, value in zip(actual, defined, strict=True):
        spread = 4 * torch.finfo(dtype).eps * float(value.abs().max())
        torch.testing.assert_close(mine, value, rtol=0, atol=spread)


def test_two_inputs_gradients_lie_in_one() -> None:
    inputs = draw(*CASES[0])
    _, grad_x, _, _, grad_second, _ = differentiate(lambda given: linear(**given), inputs)
    assert grad_x._base is not None
    assert grad_x._base is grad_second._base
    assert grad_x._base.shape[-1] == grad_x.shape[-1] + grad_second.shape[-1]
    for wanted in inputs:
        leaves = {name: value.detach().requires_grad_(name == wanted) for name, value in inputs.items()}
        linear(**leaves).sum().backward()
        assert all((value.grad is not None) == (name == wanted) for name, value in leaves.items())


def ulps_off(actual: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of the exact float32 values, zeros and denormals apart."""
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    place = torch.finfo(torch.float32).eps * 2 ** exact.abs().log2().floor()
    return float(((actual.double() - exact).abs() / place)[normal].max())


def activated(x: Tensor, activation: LinearActivation) -> Tensor:
    """x [rows, columns] through the fused activation: the weight is the identity."""
    return linear(x, torch.eye(x.shape[1]), activation=activation)


@pytest.mark.parametrize(("activation", "ulps"), [("gelu", 8), ("quick_gelu", 24)])
@pytest.mark.usefixtures("isa")
def test_activations_are_right_to_the_last_places_far_into_their_tails(
    activation: LinearActivation, ulps: float
) -> None:
    x = torch.cat([torch.linspace(-13, 13, 2**17), torch.logspace(-30, 0, 2**16), torch.tensor([0.0, -0.0])])
    x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(-1, 64)
    wide = x.double()
    exact = 0.5 * wide * torch.special.erfc(wide * -(0.5**0.5)) if activation == "gelu" else quick_gelu(wide)
    assert ulps_off(activated(x, activation), exact) <= ulps  # QuickGELU rounds 1.702 x, of up to 22


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.usefixtures("isa")
def test_slopes_of_activations_are_exact(activation: LinearActivation) -> None:
    def slopes(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        x = torch.linspace(-13, 13, 2**16, dtype=torch.float32).to(dtype).view(-1, 64).requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    plain_function = ACTIVATIONS[activation]
    actual = slopes(lambda x: activated(x, activation), torch.float32)
    usual, exact = slopes(plain_function, torch.float32), slopes(plain_function, torch.float64)
    assert excess(actual, usual, exact) <= 1


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.usefixtures("isa")
def test_activations_of_the_largest_and_of_no_numbers(activation: LinearActivation) -> None:
    x = torch.tensor([3e38, -3e38, 1e4, -1e4, -90.0, float("nan"), float("inf"), 0.0]).repeat(8, 1)
    y = torch.ops.glide_fast.activation(x, {"gelu": 1, "quick_gelu": 2}[activation])
    expected = torch.tensor([3e38, 0, 1e4, 0, 0, float("nan"), float("inf"), 0]).repeat(8, 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-30, equal_nan=True)


def test_a_1x1_convolutions_weight_keeps_its_shape() -> None:
    inputs = draw((2, 40, 64), 96, 0)
    weight = inputs["weight"].detach()[..., None, None].requires_grad_()
    expected = differentiate(lambda given: linear(**given), inputs)
    actual = differentiate(lambda given: linear(**given), inputs | {"weight": weight})
    for mine, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.reshape(value.shape), value)
    assert actual[2].shape == (96, 64, 1, 1)


def test_patches_by_a_convolutions_weight() -> None:
    image, weight = torch.randn(3, 4, 12, 20), torch.randn(24, 4, 4, 4)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
    expected = F.conv2d(image, weight, stride=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(linear(patches, weight), expected, rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match="unknown activation 'relu'; use one of none, gelu, quick_gelu"):
        linear(torch.zeros(2, 6), torch.zeros(4, 6), activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is torch"):
        linear(torch.zeros(2, 6), torch.zeros(4, 6, dtype=torch.float64))
