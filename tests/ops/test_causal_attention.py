"""Causal attention: values and gradients against float64, layouts, dtypes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.parity import excess
from glide_fast.ops import causal_attention, use_reference

SHAPES = [(2, 77, 8, 64), (1, 1, 1, 1), (3, 33, 2, 5), (1, 130, 1, 40), (1, 600, 2, 16), (0, 6, 2, 4)]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as views of one projection, by head."""
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    projection = torch.randn(batch, tokens, heads, 3, dim, generator=generator)
    return list(projection.to(dtype).requires_grad_().unbind(3))


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bnts,bsnd->btnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_values_are_exact(shape: tuple[int, ...]) -> None:
    inputs = [each.detach() for each in draw(shape)]
    output = causal_attention(*inputs)
    assert output.is_contiguous()
    assert excess(output, plain(*inputs), plain(*(each.double() for each in inputs))) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_exact(shape: tuple[int, ...]) -> None:
    def differentiate(function: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        output = function(*inputs)
        arriving = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
        return torch.autograd.grad(output, inputs, arriving)

    usual, exact = differentiate(plain, draw(shape)), differentiate(plain, draw(shape, torch.float64))
    for actual, simple, value in zip(differentiate(causal_attention, draw(shape)), usual, exact, strict=True):
        assert excess(actual, simple, value) <= 1


@pytest.mark.usefixtures("isa")
def test_no_token_sees_what_is_behind_it() -> None:
    query, key, value = (each.detach().clone() for each in draw((2, 70, 2, 8)))
    before = causal_attention(query, key, value)
    key[:, 50:] *= 2
    value[:, 50:] = 1e30
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :50], after[:, :50])
    assert bool((before != after)[:, 50:].any(dim=-1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_follow_the_reference(dtype: torch.dtype) -> None:
    inputs = [each.detach() for each in draw((2, 33, 2, 16), dtype)]
    actual = causal_attention(*inputs)
    with use_reference():
        defined = causal_attention(*inputs)
    torch.testing.assert_close(actual, defined, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert actual.dtype is dtype


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(2, 3, 4), "give floating-point"),
        ("key", torch.zeros(2, 4, 2, 4), r"key is torch.float32 of shape \(2, 4, 2, 4\)"),
        ("value", torch.zeros(2, 3, 2, 4, dtype=torch.float64), "value is torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Tensor, message: str) -> None:
    inputs = {each: torch.zeros(2, 3, 2, 4) for each in ("query", "key", "value")} | {name: value}
    with pytest.raises(ValueError, match=message):
        causal_attention(**inputs)
