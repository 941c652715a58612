"""GroupNorm with dropout, interpreted: the mask, values and gradients are those of the reference."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import dropped_group_norm as ours
from glide_fast.kernels import group_norm as forward
from glide_fast.ops.column_sums import COPIES
from glide_fast.ops.dropped_group_norm import draw_seed, dropped_group_norm, kept
from tests.kernels.compiled import compile_cases, rehearse
from tests.kernels.interpreter import DEVICE, use_kernels
from tests.kernels.test_group_norm import EPS, TOLERANCE, Case, error, wide

SEED = 0x1234_5678_9ABC_DEF1
CASES = (
    Case(shape=(2, 33, 7, 5), groups=3),
    Case(shape=(2, 33, 7, 5), groups=3, layout="contiguous", film=False),
    Case(shape=(1, 150, 3, 11), groups=1),
    Case(shape=(2, 20, 23), groups=4, layout="contiguous"),
    Case(shape=(1, 20, 3, 5, 4), groups=5),
    Case(shape=(3, 2, 3, 3), groups=1),
    Case(shape=(1, 1, 5, 7), groups=1, film=False),
    Case(shape=(2, 144, 6, 6), groups=8),
    Case(shape=(2, 48, 6, 5), groups=4, dtype=torch.bfloat16),
    Case(shape=(2, 48, 6, 5), groups=4, dtype=torch.float16, layout="contiguous"),
)


@pytest.fixture(params=[True, False], ids=["one_pass", "split"])
def one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two ways that a forward pass can take."""
    if not request.param:
        monkeypatch.setattr(forward, "ONE_PASS_PIXELS", 0)


def exact(case: Case, dropout: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x, _, *parameters = (wide(value) for value in case.inputs())
    settings = (case.groups, EPS, dropout, seed)
    return torch.ops.glide_fast.dropped_group_norm_reference(x, *parameters, *settings)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("dropout", [0.1, 0.7])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_mask_are_exact(case: Case, dropout: float) -> None:
    x, _, *parameters = case.inputs()
    y, *statistics = ours.dropped_group_norm(x, *parameters, case.groups, EPS, dropout, SEED)
    expected, *others = exact(case, dropout, SEED)
    assert torch.equal(y != 0, kept(x, dropout, SEED))
    assert y.dtype is case.dtype
    assert y.stride() == forward.group_norm(x, *parameters, case.groups, EPS, True, 0)[0].stride()
    assert error(y, expected) <= TOLERANCE[case.dtype]
    assert all(error(*pair) <= 1e-6 for pair in zip(statistics, others, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_exact(case: Case) -> None:
    x, _, *parameters = case.inputs()
    statistics = exact(case, 0.3, SEED)[1:]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, case.dtype)
    saved = [value.float() for value in statistics]
    actual = ours.dropped_group_norm_backward(grad, x, *parameters, *saved, 0.3, SEED, COPIES)
    expected = torch.ops.glide_fast.dropped_group_norm_backward_reference(
        grad.double(), x.double(), *map(wide, parameters), *statistics, 0.3, SEED, COPIES
    )
    total = expected[0].abs().sum((0, *range(2, x.ndim))).norm()  # what a sum's terms come to
    assert actual[5].shape == expected[5].shape
    assert float((actual[5].double() - expected[5]).norm() / total) <= TOLERANCE[case.dtype]
    for value, right, like in zip(actual[:5], expected[:5], (x, *parameters), strict=True):
        assert value.shape == right.shape
        if like is not None and right.norm() > 0:
            assert value.dtype is like.dtype
            assert error(value, right) <= TOLERANCE[like.dtype]


@pytest.mark.parametrize("seed", [0, 1, 16, -1, 2**31, 2**63 - 1, -(2**63)])
def test_seeds_of_every_width_are_one_key(seed: int) -> None:
    x, _, *parameters = Case(shape=(1, 20, 7, 5)).inputs()
    y = ours.dropped_group_norm(x, *parameters, 4, EPS, 0.5, seed)[0]
    assert torch.equal(y != 0, kept(x, 0.5, seed))


def test_all_can_be_dropped() -> None:
    x, _, *parameters = Case(shape=(1, 20, 7, 5)).inputs()
    y, *saved = ours.dropped_group_norm(x, *parameters, 4, EPS, 1.0, SEED)
    assert not y.any()
    gradients = ours.dropped_group_norm_backward(y + 1, x, *parameters, *saved, 1.0, SEED)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 64, 6, 4), (1, 8, 6, 5)], ids=str)
def test_an_empty_batch_and_float64_are_served(shape: tuple[int, ...]) -> None:
    dtype = torch.float32 if shape[0] == 0 else torch.float64
    x, _, *parameters = Case(shape=shape, dtype=dtype).inputs()
    y, *saved = ours.dropped_group_norm(x, *parameters, 4, EPS, 0.5, SEED)
    expected = torch.ops.glide_fast.dropped_group_norm_reference(x, *parameters, 4, EPS, 0.5, SEED)
    assert torch.equal(y, expected[0])
    gradients = ours.dropped_group_norm_backward(y, x, *parameters, *saved, 0.5, SEED, COPIES)
    shapes = [value.shape for value in (x, *parameters)]
    assert [value.shape for value in gradients] == [*shapes, (COPIES, shape[1])]
    assert bool(gradients[1].any()) is (shape[0] > 0)


def test_a_map_on_a_gpu_takes_one_operation_whose_mask_follows_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[dropped_group_norm.__module__], "_is_fused", lambda _x: True)
    x, _, weight, bias, scale, shift = Case(shape=(2, 20, 7, 5)).inputs()

    def run(seed: int) -> list[Any]:
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias, scale, shift)]
        torch.manual_seed(seed)
        with use_kernels():
            y = dropped_group_norm(*leaves[:3], groups=4, scale=leaves[3], shift=leaves[4], dropout=0.5)
            y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0] != 0, other[0] != 0)
    torch.manual_seed(1)
    assert torch.equal(first[0] != 0, kept(x, 0.5, draw_seed()))


def test_resources_hold_to_the_budget() -> None:
    wanted = [
        ("dropped_group_norm", "sm_90", "group_norm one_pass 8²x768+0 film True mode 0 dropout"),
        ("dropped_group_norm", "sm_90", "group_norm apply 64²x192+0 film True mode 0 dropout"),
        ("dropped_group_norm", "sm_80", "group_norm apply 64²x192+0 film True mode 0 dropout"),
        ("dropped_group_norm", "sm_90", "group_norm_backward sums 64²x192 film True mode 0 dropout"),
        ("dropped_group_norm", "sm_90", "group_norm_backward dx 64²x192 film True mode 0 dropout"),
    ]
    for row in compile_cases(wanted):
        split = " apply " in row["name"]
        assert row["spills"] == 0, row
        assert row["registers"] <= (64 if split else 80), row
        assert row["occupancy"] >= (0.5 if split else 0.37), row
        assert row["shared"] <= (4096 if " dx " in row["name"] else 2048), row
        assert row["wide_loads"] >= 2, row


def test_one_compiled_kernel_serves_every_seed() -> None:
    program = """
from glide_fast.kernels.dropped_group_norm import dropped_group_norm
from glide_fast.kernels.group_norm import one_pass_kernel
x, weight = torch.ones(1, 32, 4, 4), torch.ones(32)
for seed in (2**40, 2**40 + 1, 2**62 + 5):
    dropped_group_norm(x, weight, weight, None, None, 4, 1e-5, 0.1, seed)
(cache,) = one_pass_kernel.device_caches.values()
assert len(cache[0]) == 1, len(cache[0])
"""
    launches = rehearse("sm_90", program)
    assert [row["name"] for row in launches] == 3 * ["one_pass_kernel"]
    assert all(row["spills"] == 0 for row in launches)
