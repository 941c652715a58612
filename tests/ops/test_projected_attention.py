"""Attention over projections is that of their parts; gradients are those of the parts, put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast import ops
from glide_fast.ops.projected_attention import AttentionOrder, views_of

ORDERS: tuple[AttentionOrder, ...] = ("by_head", "by_role")
HEADS = 3


def projections(text: int | None, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Any]:
    """[B, 7, 3·N·8], and [B, S, 2·N·8] or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 7, 3 * HEADS * 8), None if text is None else (batch, text, 2 * HEADS * 8)]
    return [
        None if shape is None else torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def differentiated(attended: Tensor, inputs: list[Any]) -> list[Tensor]:
    """The output and the gradients of the inputs there are."""
    grad = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1)).to(attended)
    return [attended, *torch.autograd.grad(attended, [each for each in inputs if each is not None], grad)]


def by_parts(inputs: list[Any], order: AttentionOrder) -> list[Tensor]:
    query, key, value, text_key, text_value = views_of(*inputs, HEADS, order == "by_head")
    return differentiated(ops.attention(query, key, value, text_key=text_key, text_value=text_value), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("text", [None, 5, 0])
@pytest.mark.parametrize("order", ORDERS)
def test_it_is_the_attention_of_the_parts(
    order: AttentionOrder, text: int | None, dtype: torch.dtype
) -> None:
    inputs = projections(text, dtype=dtype)
    found = differentiated(ops.projected_attention(inputs[0], HEADS, text=inputs[1], order=order), inputs)
    for mine, right in zip(found, by_parts(inputs, order), strict=True):
        assert torch.equal(mine, right)
    with torch.no_grad():
        alone = ops.projected_attention(inputs[0], HEADS, text=inputs[1], order=order)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("order", ORDERS)
def test_the_reference_serves_both_passes(order: AttentionOrder) -> None:
    inputs = projections(5)
    with ops.use_reference():
        found = differentiated(ops.projected_attention(inputs[0], HEADS, text=inputs[1], order=order), inputs)
        expected = by_parts(inputs, order)
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)


def test_one_of_both_may_need_a_gradient_and_a_batch_may_be_empty() -> None:
    projection, text = projections(5)
    ops.projected_attention(projection, HEADS, text=text.detach()).sum().backward()
    assert projection.grad is not None
    ops.projected_attention(projection.detach(), HEADS, text=text).sum().backward()
    assert text.grad is not None
    empty = projections(5, batch=0)
    for each in differentiated(ops.projected_attention(empty[0], HEADS, text=empty[1]), empty):
        assert each.shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [None, 5])
def test_the_sums_of_the_gradients_rows(text: int | None, dtype: torch.dtype) -> None:
    projection, words = (None if each is None else each.detach().to(dtype) for each in projections(text))
    output, log_sum = torch.ops.glide_fast.attention(*views_of(projection, words, HEADS, True))
    arguments = output.cos(), projection, words, output, log_sum, HEADS, True
    backward = torch.ops.glide_fast.projected_attention_backward
    plain, found = backward(*arguments), backward(*arguments, 1)
    assert plain[2].shape == (0,)
    assert all(torch.equal(*pair) for pair in zip(plain[:2], found[:2], strict=True))
    assert found[2].dtype is dtype
    torch.testing.assert_close(found[2], plain[0].flatten(0, 1).sum(0, keepdim=True), atol=1e-2, rtol=1e-2)
    with ops.use_reference():
        torch.testing.assert_close(found, backward(*arguments, 1), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("text", [None, 5])
def test_opcheck(text: int | None) -> None:
    projection, words = (None if each is None else each.detach() for each in projections(text))
    views = views_of(projection, words, HEADS, True)
    output, log_sum = torch.ops.glide_fast.attention(*views)
    arguments = output, projection, words, output, log_sum, HEADS, True
    for more in ((), (1,)):
        torch.library.opcheck(torch.ops.glide_fast.projected_attention_backward.default, arguments + more)


def test_errors_name_the_value_the_rule_and_the_fix() -> None:
    projection, text = projections(5)
    with pytest.raises(ValueError, match="unknown order 'by_part'; use by_head or by_role"):
        ops.projected_attention(projection, HEADS, order="by_part")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"projection has shape \(2, 7, 72\); with 7 heads it must be"):
        ops.projected_attention(projection, 7)
    with pytest.raises(ValueError, match=r"text has shape \(2, 5, 72\); with 5 heads it must be"):
        ops.projected_attention(torch.zeros(2, 7, 15), 5, text=torch.zeros(2, 5, 72))
    with pytest.raises(ValueError, match="must both be"):
        ops.projected_attention(projection, HEADS, text=text[:1])
