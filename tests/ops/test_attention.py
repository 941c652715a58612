"""Attention on this device: values and gradients against float64, for every layout and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glide_fast.ops import attention
from tests.ops.attention_cases import (
    LAYOUTS,
    NAMES,
    Case,
    Layout,
    assert_exact,
    differentiate,
    leaves,
    ours,
    plain,
)

# The levels of glide-base that attend, with fewer heads, and its text encoder.
PRESETS = (
    Case(batch=1, queries=1024, heads=2, dim=64, text=128),
    Case(queries=256, heads=3, dim=64, text=128),
    Case(queries=64, heads=12, dim=64, text=128),
    Case(queries=128, heads=8, dim=64),
)
ODD = (
    Case(queries=1, heads=1, dim=1),
    Case(queries=1, heads=2, dim=5, text=1),
    Case(queries=37, heads=3, dim=33, text=5),
    Case(batch=1, queries=197, heads=1, dim=7, text=300),
    Case(batch=3, queries=35, heads=2, dim=16),
)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", [*ODD, PRESETS[2]], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_instruction_set_is_exact(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("case", PRESETS, ids=str)
def test_preset_shapes_are_exact_in_value_and_every_gradient(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes_are_exact_in_value_and_every_gradient(case: Case, layout: Layout) -> None:
    assert_exact(replace(case, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [ODD[2], ODD[4], PRESETS[2]], ids=str)
def test_half_precision_is_float32_arithmetic_rounded_once(
    case: Case, dtype: torch.dtype, layout: Layout
) -> None:
    assert_exact(replace(case, dtype=dtype, layout=layout))


@pytest.mark.parametrize("case", ODD, ids=str)
def test_float64_is_computed_in_float64(case: Case) -> None:
    case = replace(case, dtype=torch.float64)
    actual, exact = differentiate(ours, case.inputs()), differentiate(plain, case.inputs())
    for name, value in exact.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spread", [5.0, 30.0])
def test_scores_in_the_hundreds_cost_no_more_than_their_own_rounding(spread: float) -> None:
    inputs = Case(queries=37, heads=2, dim=32, text=5, spread=spread).inputs()
    wide = leaves(inputs, torch.float64)
    actual, exact = differentiate(ours, inputs), differentiate(plain, wide)
    query, key, _, text_key, _ = (value.detach() for value in wide if value is not None)
    scores = torch.einsum("btnd,bsnd->bnts", query, torch.cat([text_key, key], dim=1)) / 32**0.5
    # The backward pass computes scores again: their rounding is a relative error of the probabilities.
    relative = 4 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    for name, value in exact.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=0, atol=relative * float(value.abs().max())
        )


def test_text_of_no_positions_is_the_same_as_no_text() -> None:
    case = Case(queries=9, heads=2, dim=8, text=0)
    with_text, without = (
        differentiate(ours, case.inputs()),
        differentiate(ours, [*case.inputs()[:3], None, None]),
    )
    assert all(torch.equal(with_text[name], without[name]) for name in ("output", "query", "key", "value"))
    assert with_text["text_key"].shape == with_text["text_value"].shape == (2, 0, 2, 8)


def test_text_comes_first_and_every_query_sees_all_of_it() -> None:
    query, key, value, text_key, text_value = leaves(Case(queries=9, heads=2, dim=8, text=4).inputs())
    joined = attention(
        torch.cat([torch.zeros_like(text_key), query], dim=1),
        torch.cat([text_key, key], dim=1),
        torch.cat([text_value, value], dim=1),
    )
    split = attention(query, key, value, text_key=text_key, text_value=text_value)
    torch.testing.assert_close(split, joined[:, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [None, 5])
def test_an_empty_batch_gives_empty_results(text: int | None) -> None:
    case = Case(batch=0, queries=9, heads=2, dim=8, text=text)
    results = differentiate(ours, case.inputs())
    for name, value in zip(("output", *NAMES), (case.inputs()[0], *case.inputs()), strict=True):
        if value is not None:
            assert results[name].shape == value.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_contiguous(layout: Layout, dtype: torch.dtype) -> None:
    case = Case(queries=9, heads=2, dim=8, text=3, layout=layout, dtype=dtype)
    inputs = case.inputs()
    output = ours(inputs)
    assert output.is_contiguous()
    gradients = torch.ops.glide_fast.attention_backward(
        output.detach(), *leaves(inputs), *torch.ops.glide_fast.attention(*leaves(inputs))
    )
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("case", [PRESETS[0], ODD[2], replace(ODD[3], heads=2)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(differentiate(ours, case.inputs()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("wanted", NAMES)
def test_a_gradient_can_be_asked_for_alone(wanted: str) -> None:
    case = Case(queries=9, heads=2, dim=8, text=3)
    everything = differentiate(ours, case.inputs())
    inputs = {
        name: value.detach().requires_grad_(name == wanted)
        for name, value in zip(NAMES, case.inputs(), strict=True)
        if value is not None
    }
    output = ours(list(inputs.values()))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(7)))
    gradient = inputs[wanted].grad
    assert torch.equal(gradient, everything[wanted])
    assert all(value.grad is None for name, value in inputs.items() if name != wanted)


def test_an_expanded_gradient_is_read_as_what_it_stands_for() -> None:
    case = Case(queries=9, heads=2, dim=8, text=3)
    summed, dense = case.inputs(), case.inputs()
    ours(summed).sum().backward()
    output = ours(dense)
    output.backward(torch.ones_like(output))
    for left, right in zip(summed, dense, strict=True):
        assert torch.equal(left.grad, right.grad)


def test_the_logarithm_of_the_sum_is_saved_in_float32() -> None:
    inputs = leaves(Case(queries=9, heads=2, dim=8, text=3, dtype=torch.bfloat16).inputs())
    _, log_sum = torch.ops.glide_fast.attention(*inputs)
    query, key, _, text_key, _ = (value.double() for value in inputs if value is not None)
    scores = torch.einsum("btnd,bsnd->bnts", query, torch.cat([text_key, key], dim=1)) / 8**0.5
    assert log_sum.dtype is torch.float32
    torch.testing.assert_close(log_sum.double(), scores.logsumexp(3), rtol=1e-6, atol=1e-6)
