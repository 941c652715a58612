"""AdamW's kernel against float64: many tensors in one launch, dtypes, views, strides; how it compiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import adamw as kernel
from glide_fast.ops import StepNumbers, reference_elements
from tests.kernels.interpreter import DEVICE, environment

SHAPES = ((33, 31), (7,), (), (1024,), (2, 3, 17, 17), (1, 1), (0, 4), (1025,))
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True, kw_only=True)
class Weights:
    parameters: list[Tensor]
    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    average: list[Tensor]
    copies: list[Tensor]
    factor: Tensor | None = None

    @property
    def written(self) -> Iterator[list[Tensor]]:
        yield from (self.parameters, self.first, self.second, self.average, self.copies)

    def exact(self) -> Weights:
        """The same in float64."""
        lists = [
            [tensor.double() for tensor in each]
            for each in (self.parameters, self.gradients, self.first, self.second, self.average, self.copies)
        ]
        names = ("parameters", "gradients", "first", "second", "average", "copies")
        factor = None if self.factor is None else self.factor.double()
        return Weights(**dict(zip(names, lists, strict=True)), factor=factor)

    def numbers(self, step: int) -> Tensor:
        """Each tensor's own, as if it had begun to learn at another time; large shares first."""
        rows = [
            StepNumbers.of(
                step + index, rate=2e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.1, share=0.9 / (index + 1) ** 2
            )
            for index in range(len(self.parameters))
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def arguments(self, step: int) -> tuple[object, ...]:
        *lists, copies = self.parameters, self.gradients, self.first, self.second, self.average, self.copies
        return (*lists, copies, self.numbers(step), self.factor)


def draw(
    *, gradients: torch.dtype = torch.float32, average: bool = True, copies: torch.dtype | None = None
) -> Weights:
    generator = torch.Generator().manual_seed(7)

    def normals() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]

    return Weights(
        parameters=normals(),
        gradients=[each.to(gradients) for each in normals()],
        first=[each * 0.1 for each in normals()],
        second=[each.square() for each in normals()],
        average=normals() if average else [],
        copies=[] if copies is None else [each.to(copies) for each in normals()],
    )


def assert_exact(weights: Weights, *, steps: int = 2) -> None:
    """Some steps against the definition in float64, in units of each tensor's largest value."""
    exact = weights.exact()
    for step in range(1, steps + 1):
        kernel.adamw(*weights.arguments(step))  # type: ignore[arg-type]
        reference_elements.adamw(*exact.arguments(step))  # type: ignore[arg-type]
    for mine, expected in zip(weights.written, exact.written, strict=True):
        for tensor, value in zip(mine, expected, strict=True):
            if value.numel():
                error = float((tensor.double() - value).abs().max() / value.abs().max())
                assert error <= TOLERANCES[tensor.dtype], tensor.shape


@pytest.mark.parametrize("average", [False, True])
def test_all_tensors_of_any_size_are_exact_in_one_launch(average: bool) -> None:
    assert_exact(draw(average=average))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_and_copies(dtype: torch.dtype) -> None:
    assert_exact(draw(gradients=dtype, copies=dtype))


def test_a_factor_on_the_device_scales_the_gradients() -> None:
    assert_exact(replace(draw(), factor=torch.tensor([0.3], device=DEVICE)))


def test_gradients_that_are_views_into_a_bucket_are_read_where_they_are() -> None:
    """With addresses that 16 does not divide."""
    weights = draw()
    bucket = torch.cat([torch.zeros(1, device=DEVICE), *(each.flatten() for each in weights.gradients)])
    parts, start = [], 1
    for each in weights.gradients:
        parts.append(bucket[start : start + each.numel()].view(each.shape))
        start += each.numel()
    assert any(part.data_ptr() % 16 for part in parts)
    assert_exact(replace(weights, gradients=parts))


def test_channels_last_weights_and_gradients_of_another_layout() -> None:
    def last(tensors: list[Tensor]) -> list[Tensor]:
        layouts = {4: torch.channels_last}
        return [
            each.contiguous(memory_format=layouts.get(each.ndim, torch.contiguous_format)) for each in tensors
        ]

    weights = draw()
    laid = Weights(
        parameters=last(weights.parameters),
        gradients=weights.gradients,
        first=last(weights.first),
        second=last(weights.second),
        average=last(weights.average),
        copies=[],
    )
    before = [each.stride() for each in laid.parameters]
    assert_exact(laid)
    assert [each.stride() for each in laid.parameters] == before


def test_what_the_kernel_does_not_take_is_computed_all_the_same() -> None:
    """Averages of another layout than their weights', and weights in float64."""
    weights = draw()
    turned = [each.t().contiguous().t() if each.ndim == 2 else each for each in weights.average]
    assert_exact(replace(weights, average=turned))
    double, expected = draw().exact(), draw().exact()
    kernel.adamw(*double.arguments(1))  # type: ignore[arg-type]
    reference_elements.adamw(*expected.arguments(1))  # type: ignore[arg-type]
    assert all(torch.equal(*pair) for pair in zip(double.parameters, expected.parameters, strict=True))


def test_it_compiles_without_spills_to_wide_loads_and_stores() -> None:
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", "adamw", "sm_90"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(kernel.CASES)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= 80, row
        assert row["occupancy"] >= 0.37, row
        assert min(row["wide_loads"], row["wide_stores"]) >= 8, row
