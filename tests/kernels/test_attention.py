"""Attention's kernels: values and every gradient against float64, and what they may not read or leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import attention as forward
from glide_fast.kernels import attention_backward as backward
from glide_fast.kernels import column_sums, configurations, launch
from glide_fast.models.blocks import AttentionBlock
from glide_fast.ops import AttentionOrder, dispatch, use_reference
from glide_fast.ops.projected_attention import views_of
from tests.kernels.compiled import compile_cases, rehearse
from tests.kernels.interpreter import DEVICE, use_kernels
from tests.ops.attention_cases import LAYOUTS, NAMES, Case, Layout, differentiate, leaves, ours, plain

# Three products of TF32, of which a GPU makes one of float32, leave out the smallest terms.
TOLERANCE = {
    torch.float32: 1e-6 if DEVICE == "cpu" else 4e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
EVEN = Case(batch=1, queries=128, heads=2, dim=64, text=64)
ODD = (
    Case(queries=37, heads=2, dim=40, text=5),
    Case(batch=1, queries=70, heads=1, dim=33, text=66, dtype=torch.float16),
    Case(batch=1, queries=33, heads=1, dim=128, dtype=torch.bfloat16),
    Case(batch=1, queries=1, heads=3, dim=5, text=1),
)


@pytest.fixture(params=["sm_90", "sm_80"], ids=["descriptors", "pointers"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to read tensors that the interpreter can stand in for; a GPU has its own."""
    if DEVICE == "cuda":
        if request.param == "sm_90":
            pytest.skip("this GPU reads tensors in its own way")
        return launch.architecture(torch.device("cuda"))
    monkeypatch.setattr(launch, "INTERPRETED_AS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(case: Case) -> list[Tensor | None]:
    """The case's inputs on the device that runs the kernels, with the strides of their layout."""
    return [None if value is None else value.detach().to(DEVICE).requires_grad_() for value in case.inputs()]


def error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return float((actual.double() - exact).norm() / exact.norm())


def assert_close(case: Case) -> None:
    inputs = inputs_of(case)
    with use_kernels():
        actual = differentiate(ours, inputs)
    exact = differentiate(plain, leaves(inputs, torch.float64))
    for name, value in exact.items():
        assert actual[name].dtype == case.dtype
        assert error(actual[name], value) <= TOLERANCE[case.dtype], f"{case}: {name}"


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [EVEN, ODD[0]], ids=str)
def test_values_and_gradients_are_exact_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    assert_close(replace(case, dtype=dtype))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", ODD[1:], ids=str)
def test_odd_shapes_are_exact(case: Case) -> None:
    assert_close(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: Layout) -> None:
    assert_close(replace(ODD[0], layout=layout, dtype=torch.bfloat16))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("spread", [5.0, 30.0])
def test_scores_in_the_hundreds_cost_no_more_than_their_own_rounding(spread: float) -> None:
    case = Case(queries=37, heads=1, dim=32, text=5, spread=spread)
    inputs = inputs_of(case)
    with use_kernels():
        actual = differentiate(ours, inputs)
    wide = leaves(inputs, torch.float64)
    exact = differentiate(plain, wide)
    query, key, _, text_key, _ = (value.detach() for value in wide if value is not None)
    scores = torch.einsum("btnd,bsnd->bnts", query, torch.cat([text_key, key], dim=1)) / 32**0.5
    allowed = 8 * torch.finfo(torch.float32).eps * float(scores.abs().max())
    for name, value in exact.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=0, atol=allowed * float(value.abs().max())
        )


@pytest.mark.usefixtures("path")
def test_nothing_outside_the_operands_is_read() -> None:
    workspace = torch.full((2, 20, 1, 3, 32), float("nan"), device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    workspace[:, 2:5], workspace[:, 5:16] = (
        torch.randn(2, length, 1, 3, 32, generator=generator).to(DEVICE) for length in (3, 11)
    )
    text, image = workspace[:, 2:5].unbind(3), workspace[:, 5:16].unbind(3)
    inputs = [tensor.detach().requires_grad_() for tensor in (*image, *text[1:])]
    with use_kernels():
        actual = differentiate(ours, inputs)
    for name, value in differentiate(plain, leaves(inputs, torch.float64)).items():
        assert error(actual[name], value) <= TOLERANCE[torch.float32], name


@pytest.mark.usefixtures("path")
def test_the_logarithm_of_the_sum_is_saved_in_float32() -> None:
    inputs = leaves(inputs_of(replace(ODD[0], dtype=torch.bfloat16)))
    _, log_sum = forward.attention(*(None if value is None else value.detach() for value in inputs))
    query, key, _, text_key, _ = (value.double() for value in inputs if value is not None)
    scores = torch.einsum("btnd,bsnd->bnts", query, torch.cat([text_key, key], dim=1)) / 40**0.5
    assert log_sum.dtype is torch.float32
    torch.testing.assert_close(log_sum.double(), scores.logsumexp(3), rtol=1e-6, atol=1e-6)


def test_text_of_no_positions_is_the_same_as_no_text() -> None:
    inputs = inputs_of(Case(batch=1, queries=9, heads=2, dim=8, text=0))
    with use_kernels():
        with_text = differentiate(ours, inputs)
        without = differentiate(ours, [*leaves(inputs)[:3], None, None])
    assert all(torch.equal(with_text[name], without[name]) for name in ("output", "query", "key", "value"))
    assert with_text["text_key"].shape == with_text["text_value"].shape == (1, 0, 2, 8)


@pytest.mark.parametrize("text", [None, 5])
def test_an_empty_batch_gives_empty_results(text: int | None) -> None:
    inputs = inputs_of(Case(batch=0, queries=9, heads=2, dim=8, text=text))
    with use_kernels():
        results = differentiate(ours, inputs)
    for name, value in zip(("output", *NAMES), (inputs[0], *inputs), strict=True):
        if value is not None:
            assert results[name].shape == value.shape


@pytest.mark.parametrize(
    "case", [Case(batch=1, queries=5, heads=1, dim=136), replace(ODD[3], dtype=torch.float64)]
)
def test_what_the_kernels_do_not_cover_is_left_to_the_default(case: Case) -> None:
    inputs = inputs_of(case)
    with use_kernels():
        actual = differentiate(ours, inputs)
    with use_reference():
        expected = differentiate(ours, leaves(inputs))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_an_expanded_gradient_is_read_as_what_it_stands_for() -> None:
    summed = inputs_of(Case(batch=1, queries=9, heads=2, dim=8, text=3))
    dense = leaves(summed)
    with use_kernels():
        ours(summed).sum().backward()
        output = ours(dense)
        output.backward(torch.ones_like(output))
    for left, right in zip(summed, dense, strict=True):
        assert torch.equal(left.grad, right.grad)


def test_the_bits_are_the_same_every_time_and_each_pass_is_one_launch() -> None:
    launches = []
    kernels = {"forward": forward._forward, "backward": backward._backward}
    for name, kernel in kernels.items():
        kernel.add_pre_run_hook(lambda *_, name=name, **__: launches.append(name))
    try:
        inputs = inputs_of(replace(ODD[0], dtype=torch.float16))
        with use_kernels():
            first, second = (differentiate(ours, leaves(inputs)) for _ in range(2))
    finally:
        for kernel in kernels.values():
            kernel.pre_run_hooks.clear()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert launches == ["forward", "backward"] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_contiguous(layout: Layout) -> None:
    inputs = [value.detach() for value in inputs_of(Case(queries=3, heads=2, dim=8, text=2, layout=layout))]
    output, log_sum = forward.attention(*inputs)
    gradients = backward.attention_backward(output, *inputs, output, log_sum)
    assert all(result.is_contiguous() for result in (output, log_sum, *gradients))


def test_views_of_one_product_are_read_in_place() -> None:
    query, key, value = torch.zeros(2, 9, 4, 3, 32, device=DEVICE).unbind(3)
    operands = forward.Operands.of(query, key, value, None, None)
    assert all(mine is theirs for mine, theirs in zip(operands.image, (query, key, value), strict=True))


def test_an_attention_block_is_served_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(64, 2, 48).to(DEVICE)
    torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    x, text = torch.randn(2, 64, 4, 5, device=DEVICE), torch.randn(2, 7, 48, device=DEVICE)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output = block(leaf, text)
        return [output, *torch.autograd.grad(output.square().sum(), [leaf, *block.parameters()])]

    with use_reference():
        expected = run()
    with use_kernels():
        actual = run()
    for mine, theirs in zip(actual, expected, strict=True):
        assert error(mine.detach(), theirs.detach().double()) <= 1e-5


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("text", "sums"), [(None, 1), (5, 1), (5, 0)])
@pytest.mark.parametrize("order", ["by_head", "by_role"])
def test_gradients_of_projections_are_written_where_they_lie(
    order: AttentionOrder, text: int | None, sums: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, parts: int) -> Tensor:
        return torch.randn(2, length, parts * 3 * 24, generator=generator).to(DEVICE, dtype)

    inputs = [draw(37, 3), None if text is None else draw(text, 2)]
    output, log_sum = forward.attention(*views_of(*inputs, 3, order == "by_head"))
    grad = draw(37, 1).view(output.shape)
    layout = 3, order == "by_head", sums
    found = backward.projected_attention_backward(grad, *inputs, output, log_sum, *layout)
    wide = [value if value is None else value.double() for value in (grad, *inputs, output, log_sum)]
    exact = dispatch.default("projected_attention_backward")(*wide, *layout)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype is dtype
        assert mine.is_contiguous()
        assert mine.shape == right.shape
        assert not mine.numel() or error(mine, right) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("columns", [16, 64])
def test_sums_over_rows_when_tiles_of_queries_are_not_as_many_as_those_of_keys(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = configurations.Configuration(rows, columns, 4, 1)
    monkeypatch.setattr(backward, "run", lambda _name, _device, _bits, _dim, start: start(cut))
    generator = torch.Generator().manual_seed(1)
    for length in (1, 16, 70, 128):
        projection = torch.randn(2, length, 2 * 3 * 20, generator=generator).to(DEVICE)
        output, log_sum = forward.attention(*views_of(projection, None, 2, True))
        grad = torch.randn(output.shape, generator=generator).to(DEVICE)
        arguments = grad, projection, None, output, log_sum
        *_, sums = backward.projected_attention_backward(*arguments, 2, True, 1)
        wide = [value if value is None else value.double() for value in arguments]
        exact = dispatch.default("projected_attention_backward")(*wide, 2, True, 1)[2]
        assert sums.shape == exact.shape == (1, 120)
        # Those of keys are zero but for rounding: what is added to all keys changes no share.
        assert float((sums.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70, 33), (300, 32), (2, 0, 5)], ids=str)
def test_parts_are_added_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for copies in (0, 1, 3):
        sums = column_sums.totals(parts, copies, dtype)
        assert (sums.shape, sums.dtype) == ((copies, shape[-1]) if copies else (0,), dtype)
        exact = parts.double().flatten(0, -2).sum(0)
        for each in sums:
            limit = torch.finfo(dtype).eps * float(parts.abs().sum() + 1) / shape[-1]
            torch.testing.assert_close(each.double(), exact, rtol=torch.finfo(dtype).eps, atol=limit)


def test_projections_that_the_kernels_do_not_cover_and_texts_of_no_positions() -> None:
    for dtype, text in ((torch.float64, 5), (torch.float32, 0)):
        inputs = [
            torch.randn(2, length, width, device=DEVICE, dtype=dtype)
            for length, width in ((9, 48), (text, 32))
        ]
        output, log_sum = dispatch.default("attention")(*views_of(*inputs, 2, True))
        arguments = output, *inputs, output, log_sum, 2, True, 1
        found = backward.projected_attention_backward(*arguments)
        exact = dispatch.default("projected_attention_backward")(*arguments)
        for mine, right in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, right)


def test_all_ops_are_registered() -> None:
    rows = {row.op: row for row in dispatch.implementations() if row.device == "CUDA"}
    for op in ("attention", "attention_backward", "projected_attention_backward"):
        assert rows[op].name == "Triton"
        assert "float16" in rows[op].reason


LAUNCHES = """
from glide_fast.kernels.attention import attention
from glide_fast.kernels.attention_backward import attention_backward
image = torch.zeros(2, 1024, 6, 3, 64, dtype=torch.float16).unbind(3)
text = torch.zeros(2, 128, 6, 2, 64, dtype=torch.float16).unbind(3)
attention_backward(image[0], *image, *text, *attention(*image, *text))
"""
ATTENTION = ("attention", "attention fp16 2x1024x6x64 text 128")
BACKWARD = ("attention_backward", "attention_backward fp16 2x1024x6x64 text 128")


def test_a_launch_compiles_to_what_the_listed_cases_compile_to() -> None:
    launched = rehearse("sm_90", LAUNCHES)
    listed = compile_cases([(module, "sm_90", name) for module, name in (ATTENTION, BACKWARD)])
    for mine, theirs in zip(launched, listed, strict=True):
        assert {**mine, "name": theirs["name"]} == theirs


def test_the_machine_code_keeps_to_its_budget() -> None:
    ahead, back, old, old_back, summed, old_summed = compile_cases(
        [
            *(
                (module, target, name)
                for target in ("sm_90", "sm_80")
                for module, name in (ATTENTION, BACKWARD)
            ),
            *((BACKWARD[0], target, f"{BACKWARD[1]} and sums") for target in ("sm_90", "sm_80")),
        ]
    )
    assert all(row["spills"] == 0 for row in (ahead, back, old, old_back, summed, old_summed))
    assert ahead["registers"] <= 110
    assert ahead["shared"] <= 56 * 1024
    assert ahead["blocks"] >= 3
    assert ahead["occupancy"] >= 0.19
    for row in (back, summed):
        assert row["registers"] <= 192
        assert row["shared"] <= 33 * 1024
        assert row["blocks"] >= 2
    for row in (ahead, back, summed):
        assert row["warpgroup"] > 0
        assert row["tma"] > 0
        assert row["wide_stores"] > 0
    for row in (old, old_back, old_summed):
        assert row["tensor_core"] > 0
        assert row["wide_loads"] > 0
        assert row["blocks"] >= 2
