"""AdamW with its average in one op: torch.optim's weights bit for bit, averages, copies, factors, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.ops import StepNumbers, adamw, use_reference
from glide_fast.ops.adamw import STEP

SHAPES = ((3, 5), (7,), (), (2, 3, 4, 4), (1, 1))
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 5


def numbers_of(step: int, share: float = 0.0) -> StepNumbers:
    return StepNumbers.of(
        step,
        rate=OPTIONS["lr"],
        betas=OPTIONS["betas"],
        eps=OPTIONS["eps"],
        decay=OPTIONS["weight_decay"],
        share=share,
    )


def normals(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def zeros(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_weights_are_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    theirs = [weight.requires_grad_() for weight in normals(0, dtype)]
    optimizer = torch.optim.AdamW(theirs, foreach=True, **OPTIONS)
    weights, first, second = normals(0, dtype), zeros(dtype), zeros(dtype)
    for step in range(1, STEPS + 1):
        gradients = normals(step, dtype)
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        adamw(weights, gradients, first, second, [numbers_of(step)] * len(SHAPES))
    for mine, weight, m, v in zip(weights, theirs, first, second, strict=True):
        assert torch.equal(mine, weight.detach())
        assert torch.equal(m, optimizer.state[weight]["exp_avg"])
        assert torch.equal(v, optimizer.state[weight]["exp_avg_sq"])


@pytest.mark.parametrize("share", [0.001, 0.9])
def test_the_average_follows_the_new_weights_and_the_copy_is_them(share: float) -> None:
    weights, average = normals(0), normals(1)
    copies = zeros(torch.bfloat16)
    before = [each.clone() for each in average]
    numbers = [numbers_of(1, share)] * len(SHAPES)
    adamw(weights, normals(2), zeros(), zeros(), numbers, average=average, copies=copies)
    for mine, old, weight, copy in zip(average, before, weights, copies, strict=True):
        assert torch.equal(mine, old.lerp(weight, share))
        assert torch.equal(copy, weight.bfloat16())


def test_every_tensor_has_its_own_numbers() -> None:
    together, alone = normals(0), normals(0)
    gradients, numbers = normals(1), [numbers_of(step) for step in range(1, len(SHAPES) + 1)]
    adamw(together, gradients, zeros(), zeros(), numbers)
    for index, number in enumerate(numbers):
        adamw([alone[index]], [gradients[index]], [zeros()[index]], [zeros()[index]], [number])
        assert torch.equal(together[index], alone[index])


def test_a_factor_multiplies_the_gradients_and_leaves_them_alone() -> None:
    scaled, plain, gradients = normals(0), normals(0), normals(1)
    before = [each.clone() for each in gradients]
    numbers = [numbers_of(1)] * len(SHAPES)
    adamw(scaled, gradients, zeros(), zeros(), numbers, factor=torch.tensor(0.25))
    adamw(plain, [each * 0.25 for each in gradients], zeros(), zeros(), numbers)
    for mine, value, gradient, old in zip(scaled, plain, gradients, before, strict=True):
        assert torch.equal(mine, value)
        assert torch.equal(gradient, old)


def test_16_bit_gradients_are_widened_first() -> None:
    mine, expected, gradients = normals(0), normals(0), normals(1, torch.bfloat16)
    numbers = [numbers_of(1)] * len(SHAPES)
    adamw(mine, gradients, zeros(), zeros(), numbers)
    adamw(expected, [each.float() for each in gradients], zeros(), zeros(), numbers)
    assert all(torch.equal(*pair) for pair in zip(mine, expected, strict=True))


def test_what_was_computed_from_the_old_weights_is_known_to_be_old() -> None:
    weight = torch.ones(3, requires_grad=True)
    product = weight * weight
    version = weight._version
    adamw([weight], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [numbers_of(1)])
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_no_tensors_are_nothing_to_do() -> None:
    adamw([], [], [], [], [])


def test_the_op_keeps_the_dispatchers_rules() -> None:
    numbers = torch.tensor([numbers_of(1, 0.1)] * len(SHAPES), dtype=torch.float64)
    arguments = (normals(0), normals(1), zeros(), zeros(), normals(2), [], numbers, None)
    torch.library.opcheck(STEP, arguments, test_utils=("test_schema", "test_faketensor"))
    with use_reference():
        STEP(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    numbers = [numbers_of(1)] * len(SHAPES)
    with pytest.raises(ValueError, match="4 gradients for 5 parameters"):
        adamw(normals(0), normals(1)[:4], zeros(), zeros(), numbers)
    with pytest.raises(ValueError, match="1 numbers for 5 parameters"):
        adamw(normals(0), normals(1), zeros(), zeros(), numbers[:1])
    with pytest.raises(ValueError, match="2 average for 5 parameters"):
        adamw(normals(0), normals(1), zeros(), zeros(), numbers, average=zeros()[:2])
    with pytest.raises(ValueError, match=r"second\[0\] has shape \(7,\) but its parameter \(3, 5\)"):
        adamw(normals(0), normals(1), zeros(), zeros()[1:] + zeros()[:1], numbers)
