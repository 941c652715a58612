"""Who serves an op, and the switch to the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from glide_fast.ops import (
    StepNumbers,
    StepRule,
    adamw,
    causal_attention,
    dispatch,
    gradient_norm,
    group_norm,
    hybrid_loss,
    implementations,
    layer_norm,
    linear,
    norm_apply,
    norm_convolution,
    reference,
    sampler_step,
    use_reference,
)
from tests.ops import attention_cases, group_norm_cases, hybrid_loss_cases

OPS = (
    "activation",
    "activation_backward",
    "adamw",
    "attention",
    "attention_backward",
    "causal_attention",
    "dropped_group_norm",
    "dropped_group_norm_backward",
    "gradient_norm",
    "group_norm",
    "group_norm_backward",
    "hybrid_loss",
    "hybrid_loss_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "norm_apply",
    "norm_convolution",
    "norm_convolution_backward",
    "projected_attention_backward",
    "sampler_step",
)
LIBRARY = dispatch.cpp_library()
needs_cpp = pytest.mark.skipif(LIBRARY is None, reason="the C++ library is not built")
NORM = group_norm_cases.Case(shape=(2, 33, 7, 5), groups=3, film=True, activation="silu", resample="down")
ATTENTION = attention_cases.Case(queries=9, heads=2, dim=8, text=3)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often use_reference called each op's reference."""
    counter: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counter[name] += 1
            return function(*args)

        return call

    counted = {
        overload: counting(overload.name().removeprefix("glide_fast::"), function)
        for overload, function in dispatch._references.items()
    }
    monkeypatch.setattr(dispatch, "_references", counted)
    return counter


def test_use_reference_serves_forward_and_backward_of_every_op(calls: Counter[str]) -> None:
    with use_reference():
        group_norm_cases.differentiate(NORM.ours, NORM.inputs())
        attention_cases.differentiate(attention_cases.ours, ATTENTION.inputs())
        x, weight = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(3, 4, 3, 3, requires_grad=True)
        norm_convolution(x, weight).sum().backward()
        linear(x, torch.randn(2, 5), activation="gelu").sum().backward()
        layer_norm(x, torch.ones(5), torch.zeros(5)).sum().backward()
        gradient_norm([x.detach()], 1.0)
        losses = hybrid_loss(*hybrid_loss_cases.draw((1, 3, 4, 4)))
        torch.ops.glide_fast.hybrid_loss_backward(*losses, *hybrid_loss_cases.draw((1, 3, 4, 4)))
        causal_attention(*torch.randn(3, 1, 4, 2, 8))
        parameters = torch.ones(4), torch.zeros(4), None, None
        torch.ops.glide_fast.dropped_group_norm(x, *parameters, 2, 1e-5, 0.5, 7)[0].sum().backward()
        adamw([x.detach()], [x.detach()], [x.detach()], [x.detach()], [StepNumbers(*[0.5] * 8)])
        y, log_sum = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
        torch.ops.glide_fast.projected_attention_backward(y, torch.zeros(1, 4, 48), None, y, log_sum, 2, True)
        norm_apply.APPLY(x.detach(), *[torch.ones(1, 2)] * 2, *[torch.ones(4)] * 2, None, None, True)
        rule = StepRule(table=torch.ones(1, 8), deviation="table", direction="x", clip=True)
        sampler_step(x.detach(), x.detach(), torch.tensor([0]), rule)
    assert calls == dict.fromkeys(OPS, 1)


def test_use_reference_ends_with_its_context(calls: Counter[str]) -> None:
    with pytest.raises(RuntimeError, match="inside"), use_reference():
        raise RuntimeError("inside")
    group_norm_cases.differentiate(NORM.ours, NORM.inputs())
    assert not calls


def test_group_norm_under_use_reference_is_the_reference_bit_for_bit() -> None:
    with use_reference():
        actual = group_norm_cases.differentiate(NORM.ours, NORM.inputs())
    inputs = [None if value is None else value.detach() for value in NORM.inputs()]
    output, mean, rstd = reference.group_norm(*inputs, 3, 1e-5, True, reference.RESAMPLE_DOWN)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    gradients = reference.group_norm_backward(grad, *inputs, mean, rstd, True, reference.RESAMPLE_DOWN)[:5]
    for name, value in zip(("output", *group_norm_cases.NAMES), (output, *gradients), strict=True):
        assert torch.equal(actual[name], value), name


def test_attention_under_use_reference_is_the_reference_bit_for_bit() -> None:
    with use_reference():
        actual = attention_cases.differentiate(attention_cases.ours, ATTENTION.inputs())
    inputs = [None if value is None else value.detach() for value in ATTENTION.inputs()]
    output, log_sum = reference.attention(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    gradients = reference.attention_backward(grad, *inputs, output, log_sum)
    for name, value in zip(("output", *attention_cases.NAMES), (output, *gradients), strict=True):
        assert torch.equal(actual[name], value), name


def test_the_reference_itself_is_exact() -> None:
    with use_reference():
        group_norm_cases.assert_exact(NORM)
        attention_cases.assert_exact(ATTENTION)


def test_there_is_one_row_for_each_op_and_device() -> None:
    rows = [(row.op, row.device) for row in implementations()]
    assert sorted(rows) == [(op, device) for op in OPS for device in ("CPU", "CUDA")]


def test_the_rows_say_who_serves_attention_on_cpu() -> None:
    names = {row.op: row.name for row in implementations() if row.device == "CPU"}
    assert names["attention"] == ("C++" if LIBRARY else "ATen flash attention")
    assert names["attention_backward"] == names["attention"]


def test_a_device_without_an_implementation_is_served_by_the_reference_and_says_why() -> None:
    rows = [row for row in implementations() if row.device == "CUDA" and row.name == "reference"]
    assert all("Triton" in row.reason or "glide_fast.kernels" in row.reason for row in rows)


@needs_cpp
@pytest.mark.parametrize(
    ("isa", "name"), [("generic", "C++"), ("avx2", "C++ AVX2+FMA"), ("avx512", "C++ AVX-512")]
)
def test_the_row_of_group_norm_names_the_instruction_set_in_use(isa: str, name: str) -> None:
    if isa not in LIBRARY.capabilities():
        pytest.skip(f"this CPU cannot run {isa}")
    before = LIBRARY.capability()
    LIBRARY.select(isa)
    try:
        rows = [row for row in implementations() if row.device == "CPU" and row.op.startswith("group_norm")]
    finally:
        LIBRARY.select(before)
    assert [row.name for row in rows] == [name, name]
    assert all(LIBRARY.compiler() in row.reason and isa in row.reason for row in rows)


@needs_cpp
def test_the_best_instruction_set_is_chosen_by_default() -> None:
    program = (
        "from glide_fast.ops.dispatch import cpp_library as c; print(c().capability(), *c().capabilities())"
    )
    chosen, *runnable = run(program).stdout.split()
    assert chosen == runnable[-1]
    assert runnable[0] == "generic"


@needs_cpp
def test_selecting_an_unknown_instruction_set_lists_those_that_run() -> None:
    with pytest.raises(
        ValueError, match=r"'sse9' is unknown or not supported by this CPU; use one of generic"
    ):
        LIBRARY.select("sse9")
    with pytest.raises(TypeError):
        LIBRARY.select(3)


@needs_cpp
def test_the_environment_chooses_the_instruction_set() -> None:
    program = "from glide_fast.ops import implementations; print({row.name for row in implementations()})"
    names = run(program, GLIDE_FAST_ISA="generic").stdout
    assert "'C++'" in names


@needs_cpp
def test_an_unknown_instruction_set_in_the_environment_is_an_error_that_names_the_variable() -> None:
    done = run("import glide_fast.ops", check=False, GLIDE_FAST_ISA="bogus")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: GLIDE_FAST_ISA: instruction set 'bogus' is unknown or not supported")
    assert "use one of generic" in last


def test_without_gradients_nothing_is_recorded_and_the_bits_are_the_same() -> None:
    inputs = NORM.inputs()
    recorded = NORM.ours(inputs)
    with torch.no_grad():
        plain = NORM.ours(inputs)
    with torch.inference_mode():
        inference = NORM.ours(inputs)
    assert plain.grad_fn is None
    assert torch.equal(recorded, plain)
    assert torch.equal(recorded, inference)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = torch.randn(2, 4, 5, requires_grad=True)
    y = group_norm(x, torch.ones(4), torch.zeros(4), groups=2)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def run(program: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program],
        check=check,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
