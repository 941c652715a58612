"""The norm's kernels against float64: many tensors of all dtypes in one launch, views; how they compile."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import gradient_norm as kernel
from glide_fast.ops.reference_elements import clip_factor, gradient_norm
from tests.kernels.interpreter import DEVICE, environment

SHAPES = ((33, 31), (7,), (), (2048,), (2, 3, 17, 17), (0, 4), (2049,), (kernel.RUN + 5,))
TOLERANCE = 1e-6


def draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES]


def assert_exact(gradients: list[Tensor]) -> None:
    expected = torch.cat([each.double().flatten() for each in gradients]).norm()
    for limit, scale in ((1.0, 1.0), (1e9, 1.0), (0.3, 1024.0), (1e9, 8.0)):
        numbers = kernel.gradient_norm(gradients, limit, scale)
        for found, exact in zip(numbers, clip_factor(expected, limit, scale), strict=True):
            assert (found.shape, found.dtype) == ((), torch.float32)
            assert abs(float(found) - float(exact)) <= TOLERANCE * float(exact)


@pytest.mark.parametrize("dtype", kernel.KINDS, ids=str)
def test_tensors_of_any_size_are_exact(dtype: torch.dtype) -> None:
    assert_exact(draw(dtype))


def test_tensors_of_several_dtypes_take_one_launch() -> None:
    assert_exact([*draw(torch.bfloat16), *draw(), *draw(torch.float16)])


def test_more_sums_than_are_added_at_a_time() -> None:
    one = torch.full((3,), 2.0, device=DEVICE)
    assert_exact([one] * (kernel.SUMS.value + 1))


def test_views_and_other_layouts_are_exact() -> None:
    """With addresses that 16 does not divide, channels last, and with gaps, what is between them unread."""
    bucket = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    last = torch.randn(2, 3, 5, 5).to(DEVICE, memory_format=torch.channels_last)
    gaps = torch.full((8, 8), float("nan"), device=DEVICE)
    gaps[:, ::2] = 1.5
    assert_exact([bucket[1:20], bucket[20:], last, gaps[:, ::2], torch.ones(1, device=DEVICE).expand(9)])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_number_that_is_none_is_seen(value: float) -> None:
    gradients = [*draw(), torch.tensor([value], device=DEVICE)]
    norm, factor = kernel.gradient_norm(gradients, 1.0, 1.0)
    assert not norm.isfinite()
    torch.testing.assert_close(factor, gradient_norm(gradients, 1.0, 1.0)[1], equal_nan=True)


def test_the_same_gradients_have_the_same_norm() -> None:
    first, second = (kernel.gradient_norm(draw(), 1.0, 1.0) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_gradients_of_zeros_are_not_clipped() -> None:
    norm, factor = kernel.gradient_norm([torch.zeros(9, device=DEVICE)], 1.0, 1.0)
    assert (float(norm), float(factor)) == (0, 1)


def test_what_the_kernels_do_not_take_is_computed_all_the_same() -> None:
    assert kernel.gradient_norm([torch.zeros(0, 3, device=DEVICE)], 1.0, 1.0)[0] == 0
    mixed = [torch.full((4,), 3.0, dtype=torch.float64, device=DEVICE), torch.full((4,), 4.0, device=DEVICE)]
    assert [float(each) for each in kernel.gradient_norm(mixed, 8.0, 2.0)] == [5.0, 0.5]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_they_compile_without_spills_to_wide_loads(target: str) -> None:
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", "gradient_norm", target]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    squares, root = (json.loads(line) for line in done.stdout.splitlines())
    assert squares["spills"] == root["spills"] == 0
    assert squares["registers"] <= 64
    assert squares["wide_loads"] >= 1
