"""What is added to a convolution's output, interpreted, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import convolution_sum
from glide_fast.ops import reference
from glide_fast.ops.norm_convolution import convolve as composed
from tests.kernels.compiled import compile_cases
from tests.kernels.interpreter import DEVICE
from tests.ops.group_norm_cases import Layout, laid_out

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sum onto a convolution of x [B, C, *space] to 20 channels."""

    shape: tuple[int, ...] = (2, 8, 6, 10)
    bias: Literal["none", "shared", "own"] = "shared"
    residual: Literal["none", "whole", "half"] = "whole"
    layout: Layout = "channels_last"

    def inputs(self, dtype: torch.dtype) -> list[Any]:
        """x, weight, bias, residual."""
        generator = torch.Generator().manual_seed(sum(self.shape))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        batch, channels, *space = self.shape
        weight = 0.1 * draw(20, channels, *[3] * len(space))
        bias = {"none": None, "shared": draw(20), "own": draw(batch, 40)[:, 20:]}[self.bias]
        sizes = [size // 2 for size in space] if self.residual == "half" else space
        residual = None if self.residual == "none" else laid_out(draw(batch, 20, *sizes), self.layout)
        return [laid_out(draw(*self.shape), "channels_last"), weight, bias, residual]


def exact(inputs: list[Any]) -> Tensor:
    return composed(*(None if value is None else value.double() for value in inputs))


BIASES: tuple[Literal["none", "shared", "own"], ...] = ("none", "shared", "own")
RESIDUALS: tuple[Literal["none", "whole", "half"], ...] = ("none", "whole", "half")
CASES = [
    *(Case(bias=bias, residual=residual) for bias in BIASES for residual in RESIDUALS),
    Case(layout="contiguous"),
    Case(layout="channels_last_sliced", residual="half"),
    Case(shape=(1, 5, 9, 13)),
    Case(shape=(2, 4, 11)),
    Case(shape=(1, 4, 2, 3, 5), bias="own"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_exact(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    y = convolution_sum.convolve(*inputs)
    expected = exact(inputs)
    assert y.is_contiguous(memory_format=reference.channels_last(y))
    assert float((y.double() - expected).norm() / expected.norm()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once_more_than_the_convolution(dtype: torch.dtype) -> None:
    inputs = Case(bias="own").inputs(dtype)
    y = convolution_sum.convolve(*inputs)
    expected = exact(inputs)
    assert y.dtype is dtype
    assert float((y.double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


def test_many_tiles_and_an_empty_batch() -> None:
    inputs = Case(shape=(1, 3, 13, 17)).inputs(torch.float32)
    assert float((convolution_sum.convolve(*inputs).double() - exact(inputs)).abs().max()) < 1e-5
    assert convolution_sum.convolve(*Case(shape=(0, 3, 4, 4)).inputs(torch.float32)).shape == (0, 20, 4, 4)


def test_the_residual_stays_as_it_is() -> None:
    inputs = Case().inputs(torch.float32)
    before = inputs[3].clone()
    convolution_sum.convolve(*inputs)
    assert torch.equal(inputs[3], before)


def test_float64_is_left_to_the_default() -> None:
    inputs = Case().inputs(torch.float64)
    assert torch.equal(convolution_sum.convolve(*inputs), composed(*inputs))


def test_resources_hold_to_the_budget() -> None:
    names = [f"convolution_sum 64²x192 {size} residual" for size in ("whole", "half")]
    for row in compile_cases([("convolution_sum", "sm_90", name) for name in names]):
        assert row["spills"] == 0, row
        assert row["registers"] <= 64, row
        assert row["occupancy"] >= 0.5, row
        assert row["wide_loads"] >= 3, row
        assert row["wide_stores"] >= 1, row
