"""What is added to a convolution's output, interpreted, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import configurations, convolution_sum, moments
from glide_fast.ops import norm_convolution, reference
from glide_fast.ops.composed_convolution import convolve as composed
from tests.kernels.compiled import compile_cases
from tests.kernels.interpreter import DEVICE, use_kernels
from tests.kernels.products import error, exact_statistics
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


MOMENT_CASES = [
    Case(shape=(2, 8, 14, 15)),
    Case(shape=(2, 8, 14, 16), bias="own", residual="half"),
    Case(shape=(3, 4, 12, 12), residual="none"),
    Case(shape=(1, 4, 17, 19), bias="none", layout="contiguous"),
    Case(shape=(1, 4, 5, 6, 7)),
]


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of all maps are left, in few runs, which are of several tiles then."""
    monkeypatch.setattr(moments, "FEWEST_PIXELS", 1)
    monkeypatch.setattr(convolution_sum, "MOST_RUNS", 2)


@pytest.mark.usefixtures("small_maps")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", MOMENT_CASES, ids=str)
@pytest.mark.parametrize("offset", [0, 100])
def test_moments_are_those_of_what_was_stored(case: Case, dtype: torch.dtype, offset: int) -> None:
    x, weight, bias, residual = case.inputs(dtype)
    bias = bias if bias is None else bias + offset
    y = convolution_sum.convolve(x, weight, bias, residual)
    kept = moments.recall(y)
    assert kept is not None
    pixels = y.flatten(2).double()
    runs = pixels.split(kept.tiles.columns, dim=2)
    assert len(runs) == kept.values.shape[2] == 2
    means = torch.stack([run.mean(2) for run in runs], dim=1)
    squares = torch.stack([run.var(2, unbiased=False) * run.shape[2] for run in runs], dim=1)
    assert error(kept.values[0], means) <= 1e-6
    assert error(kept.values[1], squares) <= (1e-6 if offset == 0 else 1e-5)
    found = moments.statistics(y, None, 5, 1e-5)
    assert found is not None
    for one, right in zip((found.mean, found.rstd), exact_statistics(y, 5, 1e-5), strict=True):
        assert error(one, right) <= 2e-6


@pytest.mark.usefixtures("small_maps")
def test_moments_are_found_through_the_op_until_the_map_changes() -> None:
    """With gradients and without; also in inference mode, whose tensors count no versions by themselves."""
    x, weight, bias, _ = Case(shape=(2, 8, 9, 10)).inputs(torch.float32)
    for requires_grad, mode in (
        (True, nullcontext()),
        (False, nullcontext()),
        (False, torch.inference_mode()),
    ):
        with mode, use_kernels():
            y = norm_convolution(x, weight.requires_grad_(requires_grad), bias)
            assert y.requires_grad == requires_grad
            assert moments.recall(y) is not None
            y.detach()[:, :1].zero_()
            assert moments.recall(y) is None


@pytest.mark.usefixtures("small_maps")
def test_nothing_is_left_of_an_empty_batch_of_a_sequence_nor_where_nothing_is_added() -> None:
    for case in (Case(shape=(0, 3, 4, 4)), Case(shape=(2, 3, 12)), Case(bias="none", residual="none")):
        assert moments.recall(convolution_sum.convolve(*case.inputs(torch.float32))) is None


def test_runs_are_few_and_a_batch_has_longer_ones() -> None:
    """What moments move is a sixteenth of a map of 16 bits at most."""
    configuration = configurations.choose("convolution_sum", "sm_90", 16)

    def length(batch: int, side: int) -> int:
        y = torch.empty(batch, 192, side, side, device="meta", dtype=torch.float16)
        y = y.contiguous(memory_format=torch.channels_last)
        left = convolution_sum._plan(y, None, y, configuration).moments
        return 0 if left is None else left.tiles.columns

    assert [length(2, side) for side in (32, 64, 128, 256)] == [0, 64, 128, 512]
    assert length(64, 64) >= 512


def test_resources_hold_to_the_budget() -> None:
    names = [f"convolution_sum 64²x192 {size} residual" for size in ("whole", "half")]
    for row in compile_cases([("convolution_sum", "sm_90", name) for name in names]):
        assert row["spills"] == 0, row
        assert row["registers"] <= 64, row
        assert row["occupancy"] >= 0.5, row
        assert row["wide_loads"] >= 3, row
        assert row["wide_stores"] >= 1, row
