"""What follows GroupNorm's statistics, and GroupNorm made of it: against float64, formats, dtypes, rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.ops import dispatch, reference, reference_elements, use_reference
from glide_fast.ops.norm_apply import APPLY, group_norm

SHAPES = [(2, 12, 5, 7), (3, 6, 9), (1, 4, 2, 3, 4), (0, 4, 3, 3), (2, 4, 1, 1)]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def draw(shape: tuple[int, ...], *, film: bool, groups: int = 2) -> list[Tensor | None]:
    """x, mean, rstd, weight, bias, scale, shift."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    batch, channels = shape[:2]
    values: list[Tensor | None] = [normal(*shape), normal(batch, groups), normal(batch, groups).exp()]
    values += [normal(channels), normal(channels)]
    return values + ([normal(batch, channels), normal(batch, channels)] if film else [None, None])


def wide(values: list[Tensor | None]) -> list[Any]:
    return [None if each is None else each.double() for each in values]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_exact_in_every_memory_format(shape: tuple[int, ...], film: bool, silu: bool) -> None:
    values: list[Any] = draw(shape, film=film)
    exact = reference_elements.norm_apply(*wide(values), silu)
    x = values[0]
    for given in {
        x,
        x.contiguous(memory_format=LAST.get(x.ndim, torch.contiguous_format)),
        x.flip(1).flip(1),
    }:
        y = APPLY(given, *values[1:], silu)
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=2e-6)
        if len(x):
            like = torch.empty(shape).contiguous(memory_format=reference.memory_format(given))
            assert y.stride() == like.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    values: list[Any] = [None if each is None else each.to(dtype) for each in draw((2, 12, 5, 7), film=True)]
    y = APPLY(*values, True)
    with use_reference():
        expected = APPLY(*values, True)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_op_keeps_the_dispatchers_rules() -> None:
    values: list[Any] = draw((2, 12, 5, 7), film=True)
    torch.library.opcheck(APPLY, (*values, True), test_utils=("test_schema", "test_faketensor"))
    last = values[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(APPLY, (last, *values[1:], True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mode", [reference.RESAMPLE_NONE, reference.RESAMPLE_UP, reference.RESAMPLE_DOWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 6, 9), (1, 4, 2, 3, 4)], ids=str)
def test_group_norm_of_two_parts_is_group_norm(shape: tuple[int, ...], dtype: torch.dtype, mode: int) -> None:
    values: list[Any] = [None if each is None else each.to(dtype) for each in draw(shape, film=True)]
    x, _, _, weight, bias, scale, shift = values
    rest = (weight, bias, scale, shift, 2, 1e-5, True, mode)
    for given in (x, x.contiguous(memory_format=LAST.get(x.ndim, torch.contiguous_format))):
        found, expected = group_norm(given, *rest), reference.group_norm(given, *rest)
        for mine, value in zip(found, expected, strict=True):
            spread = 2 * torch.finfo(mine.dtype).eps
            torch.testing.assert_close(mine, value, rtol=spread, atol=4 * spread)
            assert mine.stride() == value.stride()


def test_group_norm_in_float64_is_the_reference() -> None:
    values: list[Any] = wide(draw((2, 12, 5, 7), film=False))
    rest = (values[3], values[4], None, None, 2, 1e-5, False, reference.RESAMPLE_NONE)
    for mine, value in zip(group_norm(values[0], *rest), reference.group_norm(values[0], *rest), strict=True):
        assert torch.equal(mine, value)


def test_the_cpu_runs_what_a_gpu_would() -> None:
    rows = {row.device: row for row in dispatch.implementations() if row.op == "norm_apply"}
    if dispatch.cpp_library() is None:
        pytest.skip("the C++ library is not built")
    assert rows["CPU"].name.startswith("C++")
