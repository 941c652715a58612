"""Packed weights: made once, noticed when the weight changes, gone with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glide_fast.ops import dispatch, linear, norm_convolution, packed

pytestmark = pytest.mark.skipif(dispatch.cpp_library() is None, reason="the C++ library is not built")


def convolution() -> nn.Parameter:
    return nn.Parameter(torch.randn(32, 16, 3, 3))


def apply(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return norm_convolution(torch.ones(2, weight.shape[1], 16, 16), weight)


def swap(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda weight: weight.detach().mul_(2),
    "through .data": lambda weight: weight.data.mul_(2),
    "another memory": swap,
}


def test_the_form_is_made_once_and_counted() -> None:
    weight, before = nn.Parameter(torch.randn(32, 32, 3, 3)), packed.kept_bytes()
    apply(weight)
    assert packed.kept_bytes() == before
    packed.keep([weight])
    expected = apply(weight)
    size = packed.kept_bytes() - before
    assert size == 4 * 36 * 32 * 32
    assert torch.equal(apply(weight), expected)
    packed.forget([weight])
    assert packed.kept_bytes() == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_noticed(change: str) -> None:
    weight = convolution()
    packed.keep([weight])
    before = apply(weight)
    with torch.no_grad():
        CHANGES[change](weight)
    after = apply(weight)
    assert not torch.equal(after, before)
    packed.forget([weight])
    assert torch.equal(apply(weight), after)


def test_a_form_ends_with_its_weight_and_does_not_travel_with_it() -> None:
    weight, before = nn.Parameter(torch.randn(64, 48)), packed.kept_bytes()
    packed.keep([weight])
    with torch.no_grad():
        linear(torch.ones(40, 48), weight)
    assert packed.kept_bytes() > before
    size = packed.kept_bytes()
    other = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
    with torch.no_grad():
        for each in other:
            linear(torch.ones(40, 48), each)
    assert packed.kept_bytes() == size
    del weight
    assert packed.kept_bytes() == before


def test_what_cannot_be_watched_is_not_kept() -> None:
    with torch.inference_mode():
        inference = torch.randn(32, 16, 3, 3)
    expanded = torch.randn(32, 1, 3, 3).expand(32, 16, 3, 3)
    before = packed.kept_bytes()
    packed.keep([inference, expanded])
    apply(inference)
    apply(expanded)
    assert packed.kept_bytes() == before
