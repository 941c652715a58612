"""Sums kept beside gradients: who gets them, how often, and when they no longer count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glide_fast.ops import column_sums
from glide_fast.ops.column_sums import bias_gradient, remember, wanted

BATCH, CHANNELS, SIDE = 2, 6, 3
MARKS = 100.0 * torch.arange(1, 3)[:, None] + torch.arange(CHANNELS)  # copies no sum would equal


def gradient(layout: torch.memory_format = torch.channels_last) -> Tensor:
    """A map [B, C, H, W] whose sums are kept, but are MARKS."""
    values = torch.randn(BATCH, CHANNELS, SIDE, SIDE).contiguous(memory_format=layout)
    remember(values, 1, MARKS)
    return values


def tokens(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2)


def test_each_copy_is_handed_out_once_and_then_the_gradient_is_read() -> None:
    values = gradient()
    first, second, third = (bias_gradient(values, 1) for _ in range(3))
    assert torch.equal(first, MARKS[0])
    assert torch.equal(second, MARKS[1])
    assert torch.equal(third, values.sum((0, 2, 3)))
    first += 1
    assert torch.equal(second, MARKS[1])


@pytest.mark.parametrize(
    ("view", "dim"),
    [
        (tokens, -1),
        (lambda values: tokens(values).reshape(-1, CHANNELS), -1),
        (lambda values: values.permute(0, 2, 3, 1), 3),
        (lambda values: tokens(values).transpose(1, 2).view_as(values), 1),
    ],
)
def test_views_of_all_rows_find_the_sums(view: Callable[[Tensor], Tensor], dim: int) -> None:
    assert torch.equal(bias_gradient(view(gradient()), dim), MARKS[0])


def test_neighbours_share_a_copy_and_overlaps_do_not() -> None:
    values = gradient()
    parts = values.narrow(1, 0, 4), values.narrow(1, 4, 2), values.narrow(1, 2, 3)
    found = [bias_gradient(part, 1) for part in parts]
    assert torch.equal(found[0], MARKS[0, :4])
    assert torch.equal(found[1], MARKS[0, 4:])
    assert torch.equal(found[2], MARKS[1, 2:5])
    assert torch.equal(bias_gradient(tokens(values.narrow(1, 0, 2)), -1), MARKS[1, :2])
    assert torch.equal(bias_gradient(values, 1), values.sum((0, 2, 3)))


@pytest.mark.parametrize(
    ("view", "dim"),
    [
        (lambda values: values[1:], 1),
        (lambda values: values[:, :, 1:], 1),
        (lambda values: values[:, ::2], 1),
        (lambda values: values.transpose(2, 3), 1),
        (lambda values: values.transpose(1, 2), 1),
        (lambda values: values[:1].expand(2, -1, -1, -1), 1),
        (lambda values: values.clone(), 1),
    ],
)
def test_what_is_not_all_rows_in_order_is_read(view: Callable[[Tensor], Tensor], dim: int) -> None:
    part = view(gradient())
    others = [each for each in range(part.ndim) if each != dim]
    assert torch.equal(bias_gradient(part, dim), part.sum(others))


def test_a_gradient_whose_pixels_are_adjacent_is_found_as_itself_alone() -> None:
    values = gradient(torch.contiguous_format)
    torch.testing.assert_close(bias_gradient(tokens(values), -1), values.sum((0, 2, 3)))
    assert torch.equal(bias_gradient(values, 1), MARKS[0])


def test_pixels_are_not_taken_for_channels() -> None:
    square = torch.randn(BATCH, CHANNELS, CHANNELS)  # as many pixels as channels
    remember(square, 1, MARKS)
    assert torch.equal(bias_gradient(square.view(-1, CHANNELS), -1), square.sum((0, 1)))


def test_changed_gradients_are_read() -> None:
    values = gradient()
    view = tokens(values)
    values.mul_(2)
    assert torch.equal(bias_gradient(values, 1), values.sum((0, 2, 3)))
    assert torch.equal(bias_gradient(view, -1), view.reshape(-1, CHANNELS).sum(0))


def test_sums_die_with_their_gradient() -> None:
    values = gradient()
    before = len(column_sums._remembered)
    del values
    assert len(column_sums._remembered) == before - 1


def test_nothing_is_kept_without_copies_nor_of_an_empty_batch() -> None:
    values = torch.randn(BATCH, CHANNELS, SIDE)
    remember(values, 1, values.new_empty(0))
    assert torch.equal(bias_gradient(values, 1), values.sum((0, 2)))
    empty = torch.zeros(0, CHANNELS, SIDE)
    remember(empty, 1, MARKS)
    assert torch.equal(bias_gradient(empty, 1), torch.zeros(CHANNELS))


def test_on_cpu_nobody_asks_for_sums() -> None:
    assert wanted("group_norm_backward", torch.randn(2), learning=True) == 0
