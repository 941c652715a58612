"""The cases of the ops: shapes of the published models, and gates that are red for what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import blocks, ops
from bench.parity import ParityError, excess
from bench.place import CPU
from bench.suite import Case, gate

SMALLEST = ops.norm_case(32, 4)


def wrong(*inputs: Tensor) -> Tensor:
    """Off by a ten-thousandth."""
    return SMALLEST.peer(*inputs) * 1.0001


def test_every_case_names_itself_once_and_comes_with_its_backward() -> None:
    names = [case.name for case in ops.cases()]
    assert len(set(names)) == len(names)
    assert names[1::2] == [f"{name} + backward" for name in names[::2]]


def test_the_cases_are_the_maps_of_glide_base() -> None:
    names = " ".join(case.name for case in ops.cases())
    assert all(shape in names for shape in ("192x64x64", "384x32x32", "576x16x16", "768x8x8"))
    assert "attention 6 heads 32x32 + 128" in names
    names = " ".join(case.name for case in blocks.cases(quick=False))
    assert "residual block 384->192, 64x64" in names
    assert "attention block 768, 8x8 + text" in names


@pytest.mark.parametrize(
    "case",
    [
        SMALLEST,
        ops.with_backward(SMALLEST),
        ops.with_backward(ops.norm_case(32, 4, resample="down")),
        ops.with_backward(ops.norm_case(32, 4, resample="up")),
        ops.with_backward(ops.attention_case(32, 4, heads=2, text=5)),
    ],
    ids=lambda case: case.name,
)
def test_the_gate_is_green_for_what_is_right(case: Case) -> None:
    assert 0 < gate(case, CPU) <= 1


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_implementation_makes_the_gate_red(backward: bool) -> None:
    case = replace(SMALLEST, ours=wrong, backward=backward)
    with pytest.raises(
        ParityError, match=r"GroupNorm FiLM SiLU 32x4x4: the error of ours is .* nothing is timed"
    ):
        gate(case, CPU)


def test_a_wrong_gradient_makes_the_gate_red_though_the_output_is_right() -> None:
    def detached(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor) -> Tensor:
        return SMALLEST.peer(x, weight, bias.detach() + 0 * bias, film)

    gate(replace(SMALLEST, ours=detached), CPU)
    with pytest.raises(ParityError):
        gate(replace(SMALLEST, ours=detached, backward=True), CPU)


def test_nan_makes_the_gate_red() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    assert excess(torch.full((3,), float("nan")), exact.float(), exact) == float("inf")


def test_the_work_of_an_op_is_what_must_be_moved_or_computed() -> None:
    norm = ops.norm_case(32, 4, resample="up")
    assert norm.work == 4 * 32 * 16 * (1 + 4)  # float32 read once, four times as much written
    attention = ops.attention_case(32, 4, heads=2, text=5)
    assert attention.work == 2 * (2 * 32 * 16 * (16 + 5))  # two products, two FLOPs each
    assert ops.with_backward(attention).work == 3.5 * attention.work
