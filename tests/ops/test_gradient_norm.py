"""The norm of all gradients together: against float64, dtypes, what PyTorch's clipping finds, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glide_fast.ops import gradient_norm, use_reference
from glide_fast.ops.gradient_norm import NORM

SHAPES = ((3, 4), (5,), (), (2, 3, 3, 3), (0, 4))


def draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def exact(gradients: list[Tensor]) -> Tensor:
    return torch.cat([each.double().flatten() for each in gradients]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_norm_of_all_numbers(dtype: torch.dtype) -> None:
    gradients = [*draw(), *draw(dtype)]
    found, factor = gradient_norm(gradients, 1.0)
    assert (factor.shape, factor.dtype) == ((), torch.float32)
    assert (found.shape, found.dtype) == ((), torch.float32)
    torch.testing.assert_close(found.double(), exact(gradients), rtol=1e-6, atol=0)
    with use_reference():
        assert torch.equal(gradient_norm(gradients, 1.0)[0], found)


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e9])
def test_it_is_what_clipping_finds_and_does(limit: float) -> None:
    parameters = [torch.zeros_like(each).requires_grad_() for each in draw()]
    for parameter, gradient in zip(parameters, draw(), strict=True):
        parameter.grad = gradient
    norm, factor = gradient_norm(draw(), limit)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(parameters, limit))
    for parameter, gradient in zip(parameters, draw(), strict=True):
        assert torch.equal(gradient * factor, parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_of_scaled_gradients_it_finds_what_is_meant(limit: float) -> None:
    norm, factor = gradient_norm(draw(), limit)
    scaled, scaled_factor = gradient_norm([64 * each for each in draw()], limit, scale=64.0)
    torch.testing.assert_close(scaled, norm)
    torch.testing.assert_close(scaled_factor, factor / 64)


def test_a_number_that_is_none_is_seen() -> None:
    for value in (torch.inf, torch.nan):
        assert not gradient_norm([*draw(), torch.tensor([1.0, value])], 1.0)[0].isfinite()


def test_the_op_keeps_the_dispatchers_rules() -> None:
    torch.library.opcheck(NORM, (draw(), 1.0, 8.0), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="of one device but these are on: none at all"):
        gradient_norm([], 1.0)
    with pytest.raises(ValueError, match="these are on: cpu, meta"):
        gradient_norm([torch.zeros(2), torch.zeros(2, device="meta")], 1.0)
