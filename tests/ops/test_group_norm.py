"""GroupNorm: values and gradients against float64, for every layout, dtype and instruction set."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from glide_fast.ops import Resample, group_norm
from tests.ops.group_norm_cases import LAYOUTS, Case, Layout, assert_exact, converted, differentiate

# Rests in every loop: channels and groups that fill no vector, runs longer than a chunk, odd rows.
ODD = (
    Case(shape=(2, 33, 7, 5), groups=3),
    Case(shape=(2, 33, 7, 5), groups=11),
    Case(shape=(1, 8, 37, 41), groups=2),
    Case(shape=(3, 12, 9), groups=4),
    Case(shape=(2, 20, 3, 5, 4), groups=5),
)
SETTINGS = tuple(itertools.product(("none", "silu"), ("none", "up", "down"), (False, True)))
ODD_CASES = [
    replace(case, layout=layout, activation=activation, resample=resample, film=film)
    for case in ODD
    for layout in LAYOUTS
    for activation, resample, film in SETTINGS
]
# The maps of glide-base, and what its U-Net does with them.
PRESET_SHAPES = ((1, 192, 64, 64), (2, 384, 32, 32), (1, 576, 16, 16), (2, 768, 8, 8), (1, 1536, 8, 8))
PRESET_CASES = [
    Case(shape=shape, layout=layout, activation=activation, resample=resample, film=film)
    for shape in PRESET_SHAPES
    for layout in LAYOUTS[:2]
    for activation, resample, film in SETTINGS
    if activation == "silu" and not (film and resample != "none")
]


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.usefixtures("isa")
def test_odd_shapes_are_exact_in_value_and_every_gradient(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("case", PRESET_CASES, ids=str)
def test_preset_shapes_are_exact_in_value_and_every_gradient(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["same", "float32_parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [case for case in ODD_CASES if case.activation == "silu" and case.layout in LAYOUTS[:2]], ids=str
)
def test_half_precision_is_float32_arithmetic_rounded_once(
    case: Case, dtype: torch.dtype, parameters: torch.dtype | None
) -> None:
    assert_exact(replace(case, dtype=dtype, parameter_dtype=parameters))


@pytest.mark.parametrize("case", ODD_CASES[::3], ids=str)
def test_float64_is_computed_in_float64(case: Case) -> None:
    case = replace(case, dtype=torch.float64)
    actual = differentiate(case.ours, case.inputs())
    exact = differentiate(case.plain, case.inputs())
    for name, value in exact.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_of_one_pixel_is_normalised_over_channels_alone(layout: Layout) -> None:
    assert_exact(Case(shape=(2, 64, 1, 1), groups=4, film=True, activation="silu", layout=layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_group_of_one_element_gives_the_bias_and_no_gradient_of_x(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 1, dtype=dtype, requires_grad=True)
    weight, bias = torch.ones(4, dtype=dtype), torch.arange(4, dtype=dtype)
    y = group_norm(x, weight, bias, groups=4)
    y.sum().backward()
    assert torch.equal(y.detach(), bias.expand(2, 4).unsqueeze(2))
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.usefixtures("isa")
def test_a_large_mean_does_not_cost_the_variance(layout: Layout, offset: float) -> None:
    case = Case(shape=(2, 64, 17, 19), groups=8, offset=offset, layout=layout)
    assert_exact(case)
    inputs = case.inputs()
    exact = case.plain(converted(inputs, torch.float64))
    torch.testing.assert_close(case.ours(inputs).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", [(2, 64, 17, 19), (3, 12, 9)], ids=str)
def test_saved_statistics_are_those_of_float64(shape: tuple[int, ...], layout: Layout) -> None:
    x, weight, bias, *_ = (
        value.detach() for value in Case(shape=shape, layout=layout).inputs() if value is not None
    )
    _, mean, rstd = torch.ops.glide_fast.group_norm(x, weight, bias, None, None, 4, 1e-3, False, 0)
    grouped = x.double().reshape(shape[0], 4, -1)
    expected = 1 / (grouped.var(2, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(mean, grouped.mean(2).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rstd, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1e-6, 1e-3, 10.0])
def test_eps_is_added_to_the_variance(eps: float) -> None:
    x = torch.randn(2, 8, 3, 3)
    expected = torch.group_norm(x, 2, None, None, eps)
    torch.testing.assert_close(group_norm(x, torch.ones(8), torch.zeros(8), groups=2, eps=eps), expected)


@pytest.mark.parametrize("value", [-200.0, -88.0, -20.0, 20.0, 88.0, 200.0])
@pytest.mark.usefixtures("isa")
def test_silu_stays_finite_and_right_far_from_zero(value: float) -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    bias = torch.full((4,), value, requires_grad=True)
    y = group_norm(x, torch.full((4,), 0.1), bias, groups=2, activation="silu")
    y.sum().backward()
    wide = bias.detach().double().requires_grad_()
    exact = torch.nn.functional.silu(
        torch.group_norm(x.detach().double(), 2, torch.full((4,), 0.1).double(), wide, 1e-5)
    )
    exact.sum().backward()
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(bias.grad.double(), wide.grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.usefixtures("isa")
def test_nan_reaches_its_own_group_and_no_other(layout: Layout) -> None:
    case = Case(shape=(2, 33, 7, 5), groups=11, activation="silu", layout=layout)
    x, weight, bias, *_ = case.inputs()
    with torch.no_grad():
        x[1, 4, 2, 3] = float("nan")
    y = case.ours([x, weight, bias, None, None]).detach()
    poisoned = y.isnan().flatten(2).all(2)
    assert poisoned[1, 3:6].all()
    assert y.isnan().flatten(2).any(2).sum() == 3


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
def test_results_do_not_depend_on_the_number_of_threads(layout: Layout, resample: Resample) -> None:
    case = Case(shape=(2, 384, 32, 32), film=True, activation="silu", resample=resample, layout=layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(differentiate(case.ours, case.inputs()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_picture_gives_the_same_bits_alone_and_in_a_batch(layout: Layout) -> None:
    case = Case(shape=(3, 64, 9, 9), film=True, activation="silu", layout=layout)
    inputs = case.inputs()
    x, weight, bias, scale, shift = inputs
    alone = case.ours([x[1:2], weight, bias, scale[1:2], shift[1:2]])
    assert torch.equal(alone, case.ours(inputs)[1:2])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_output_and_gradient_keep_the_memory_format(
    layout: Layout, resample: Resample, dtype: torch.dtype
) -> None:
    case = Case(shape=(2, 64, 6, 4), film=True, resample=resample, layout=layout, dtype=dtype)
    results = differentiate(case.ours, case.inputs())
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert results["output"].is_contiguous(memory_format=memory_format)
    assert results["x"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("resample", ["none", "up", "down"])
def test_an_empty_batch_gives_empty_output_and_zero_parameter_gradients(
    resample: Resample, dtype: torch.dtype
) -> None:
    case = Case(shape=(0, 64, 6, 4), film=True, activation="silu", resample=resample, dtype=dtype)
    results = differentiate(case.ours, case.inputs())
    size = {"none": (6, 4), "up": (12, 8), "down": (3, 2)}[resample]
    assert results["output"].shape == (0, 64, *size)
    assert results["x"].shape == (0, 64, 6, 4)
    assert results["scale"].shape == results["shift"].shape == (0, 64)
    assert not results["weight"].any()
    assert not results["bias"].any()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "scale", "shift"])
def test_a_gradient_can_be_asked_for_alone(wanted: str) -> None:
    case = Case(shape=(2, 33, 7, 5), groups=3, film=True, activation="silu")
    everything = differentiate(case.ours, case.inputs())
    inputs = dict(zip(("x", "weight", "bias", "scale", "shift"), case.inputs(), strict=True))
    leaves = {name: value.detach().requires_grad_(name == wanted) for name, value in inputs.items()}
    output = case.ours(list(leaves.values()))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    output.backward(grad)
    assert torch.equal(leaves[wanted].grad, everything[wanted])
    assert all(value.grad is None for name, value in leaves.items() if name != wanted)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_an_expanded_gradient_is_read_as_what_it_stands_for(layout: Layout) -> None:
    case = Case(shape=(2, 33, 7, 5), groups=3, activation="silu", layout=layout)
    leaf, other = case.inputs(), case.inputs()
    case.ours(leaf).sum().backward()
    output = case.ours(other)
    output.backward(torch.ones_like(output))
    assert torch.equal(leaf[0].grad, other[0].grad)
