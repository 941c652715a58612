"""Moments of a convolution's output, combined for the next norm: exactness, and when they do not count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import convolution, convolution_sum, group_norm, moments, norm_convolution
from glide_fast.ops import chosen, reference
from glide_fast.ops.eager import eagerly, is_eager
from glide_fast.ops.norm_convolution import FORWARD
from tests.kernels import interpreter
from tests.kernels.products import error, exact_statistics

EPS = 1e-5
FEWEST_PIXELS = moments.FEWEST_PIXELS


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "FEWEST_PIXELS", 1)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(interpreter.DEVICE)


def convolved(out: int, *, batch: int = 2, side: int = 12, offset: float = 0.0) -> Tensor:
    """A map that left its moments."""
    weight = normal(out, 8, 3, 3, seed=out) / 8
    return convolution.convolve(normal(batch, 8, side, side, seed=1), weight, normal(out) + offset)


def test_they_pay_where_a_norm_takes_two_launches() -> None:
    assert FEWEST_PIXELS == group_norm.ONE_PASS_PIXELS + 1


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_two_maps_side_by_side(groups: int, offset: float) -> None:
    """A group may lie in both. A difference of squares would lose the variance beside a large offset."""
    x, skip = convolved(16, offset=offset), convolved(8, offset=offset)
    kept = moments.statistics(x, skip, groups, EPS)
    assert kept is not None
    right = exact_statistics(torch.cat([x, skip], dim=1), groups, EPS)
    assert error(kept.mean, right[0]) <= 2e-6
    assert error(kept.rstd, right[1]) <= (2e-6 if offset == 0 else 1e-5)


def assert_taken(
    monkeypatch: pytest.MonkeyPatch,
    op: Callable[..., tuple[Tensor, ...]],
    exact: Callable[..., tuple[Tensor, ...]],
    arguments: tuple[object, ...],
) -> None:
    """The op is right with moments and without, and its statistics are not the same."""
    with_moments = op(*arguments)
    monkeypatch.setattr(moments, "recall", lambda _: None)
    without = op(*arguments)
    wide = [each.double() if isinstance(each, Tensor) else each for each in arguments]
    for one, other, right in zip(with_moments, without, exact(*wide), strict=True):
        assert error(one, right) <= 2e-6
        assert error(other, right) <= 2e-6
    assert not torch.equal(with_moments[1], without[1]), "the norm computed the same as without moments"


def test_the_norm_behind_a_convolution_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = convolved(16), normal(8, 16, 3, 3) / 12
    forward = x, None, 1 + normal(16) / 4, normal(16), None, None, 4, EPS, 0, weight, None, None
    chosen.choose([weight])
    assert_taken(monkeypatch, norm_convolution.norm_convolution, reference.norm_convolution, forward)


def test_a_norm_alone_takes_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = convolved(16, offset=30)
    arguments = x, 1 + normal(16) / 4, normal(16), None, None, 4, EPS, True, 0
    assert_taken(monkeypatch, group_norm.group_norm, reference.group_norm, arguments)


def test_inference_mode_gives_outputs_that_count_their_versions() -> None:
    with torch.inference_mode():
        x = convolved(16)
        assert moments.recall(x) is not None
        x.mul_(2)
        assert moments.recall(x) is None


def test_a_view_of_the_whole_map_has_its_moments() -> None:
    x = convolved(16)
    assert moments.recall(x.flatten(2).unflatten(2, (12, 12))) is not None


def _cleared(x: Tensor) -> Tensor:
    x[:, :1].zero_()
    return x


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.add_(1),
    "in place, a part": _cleared,
    "another tensor": lambda x: x + 1,
    "a slice": lambda x: x[:, :8],
    "another order": lambda x: x.transpose(2, 3),
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_map_that_is_not_as_it_was_has_none(change: str) -> None:
    changed = CHANGES[change](convolved(16))
    assert moments.recall(changed) is None
    assert moments.statistics(changed, None, 4, EPS) is None


def test_one_map_without_moments_is_enough_to_read_both() -> None:
    x = convolved(16)
    assert moments.statistics(x, x + 1, 4, EPS) is None
    assert moments.statistics(x, convolved(8, side=12, batch=2), 4, EPS) is not None


@pytest.mark.parametrize("side", [9, 12])
def test_two_maps_may_be_cut_differently(side: int) -> None:
    """By our convolution into tiles, by the sum behind cuDNN's into runs."""
    x = convolved(16, side=side, offset=30)
    weight, bias = normal(8, 8, 3, 3, seed=3) / 8, normal(8)
    skip = convolution_sum.convolve(normal(2, 8, side, side, seed=4), weight, bias, None)
    cuts = [moments.recall(each) for each in (x, skip)]
    assert cuts[0] is not None
    assert cuts[1] is not None
    assert cuts[0].tiles != cuts[1].tiles
    for first, second in ((x, skip), (skip, x)):
        kept = moments.statistics(first, second, 3, EPS)
        assert kept is not None
        right = exact_statistics(torch.cat([first, second], dim=1), 3, EPS)
        assert error(kept.mean, right[0]) <= 2e-6
        assert error(kept.rstd, right[1]) <= 2e-6


def test_compiled_code_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "is_eager", is_eager)
    x, weight = normal(2, 8, 12, 12), normal(16, 8, 3, 3, seed=1) / 8
    given = x, None, *[None] * 4, 1, EPS, 0, weight, normal(16), None
    with interpreter.use_kernels():
        eager, compiled = eagerly(FORWARD, *given)[0], FORWARD(*given)[0]
    assert torch.equal(eager, compiled)
    assert moments.recall(eager) is not None
    assert moments.recall(compiled) is None


def test_moments_end_with_their_map() -> None:
    before = len(moments._remembered)
    x = convolved(16)
    assert len(moments._remembered) == before + 1
    del x
    assert len(moments._remembered) == before
