"""The kernel of a sampler's step against float64: rules, outputs, odd sizes; how it compiles."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import sampler_step as kernel
from glide_fast.ops import reference_elements as reference
from tests.kernels.interpreter import DEVICE, environment

TOLERANCE = 1e-6  # of the largest value
DEVIATIONS, DIRECTIONS = (0, 1, 2), (0, 1, 2)
Arguments = tuple[Any, ...]


def draw(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    *,
    deviation: int = 2,
    direction: int = 0,
    guided: bool = True,
    noisy: bool = True,
    clip: bool = True,
) -> Arguments:
    """The op's arguments; the first picture is at its last step."""
    generator = torch.Generator().manual_seed(len(shape) + 10 * deviation + direction)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    rows = shape[0] * (2 if guided else 1)
    return (
        normal(*shape),
        normal(rows, 2 * shape[1], *shape[2:]),
        normal(*shape) if noisy else None,
        normal(6, 8) + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0, -1.0, 1.0], device=DEVICE),
        (torch.arange(shape[0]) * 3 % 6).to(DEVICE),
        torch.tensor([2.5], device=DEVICE) if guided else None,
        deviation,
        direction,
        clip,
    )


def assert_exact(arguments: Arguments) -> None:
    """Both results against the definition in float64, in units of the largest value."""
    wide = [
        each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments
    ]
    for mine, exact in zip(kernel.sampler_step(*arguments), reference.sampler_step(*wide), strict=True):
        assert mine.shape == exact.shape
        assert mine.is_contiguous()
        if exact.numel():
            assert float((mine.double() - exact).abs().max() / exact.abs().max()) <= TOLERANCE


@pytest.mark.parametrize(("deviation", "direction"), list(itertools.product(DEVIATIONS, DIRECTIONS)))
def test_every_rule_is_exact(deviation: int, direction: int) -> None:
    for guided, noisy, clip in itertools.product((False, True), repeat=3):
        assert_exact(draw(deviation=deviation, direction=direction, guided=guided, noisy=noisy, clip=clip))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 32, 32), (3, 1, 1, 1), (2, 4, 33), (5, 7), (2, 1, 3, 4, 5), (0, 3, 4, 4), (2, 3, 0, 4)],
    ids=str,
)
def test_pictures_of_any_size_are_exact(shape: tuple[int, ...]) -> None:
    assert_exact(draw(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_outputs_are_widened_first(dtype: torch.dtype) -> None:
    x, output, *rest = draw()
    assert_exact((x, output.to(dtype), *rest))


def test_outputs_with_any_strides_are_exact() -> None:
    x, output, *rest = draw()
    expected = kernel.sampler_step(x, output, *rest)
    transposed = output.transpose(2, 3).contiguous().transpose(2, 3)
    part = torch.cat([output, output], dim=1)[:, : output.shape[1]]
    for each in (output.contiguous(memory_format=torch.channels_last), transposed, part):
        for mine, value in zip(kernel.sampler_step(x, each, *rest), expected, strict=True):
            assert torch.equal(mine, value)


def test_a_nan_is_not_clipped_away() -> None:
    x, output, *rest = draw(direction=1)
    output[0, 0, 0, 0] = float("nan")
    for found in kernel.sampler_step(x, output, *rest):
        assert found[0, 0, 0, 0].isnan()
        assert found.isnan().sum() == 1


def test_float64_pictures_go_to_the_reference() -> None:
    arguments = draw()
    x, output, noise, *rest = arguments
    wide = x.double(), output.double(), noise.double(), *rest
    for mine, value in zip(kernel.sampler_step(*wide), reference.sampler_step(*wide), strict=True):
        assert torch.equal(mine, value)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_it_compiles_without_spills_to_wide_loads_and_stores(target: str) -> None:
    command = [sys.executable, "-m", "glide_fast.kernels.compilation", "sampler_step", target]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(kernel.CASES)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= 64, row
        assert row["wide_loads"] >= 3, row
        assert row["wide_stores"] >= 2, row
