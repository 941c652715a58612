"""Norms whose input has a path beside them: that path's gradient joins theirs in one pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glide_fast import ops
from glide_fast.models.blocks import AttentionBlock, ResBlock

CHANNELS, OUT, GROUPS = 24, 16, 4
Paths = Callable[..., tuple[Tensor, ...]]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def inputs(dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    """x, the norm's weight and bias, the convolution's weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, CHANNELS, 6, 10), (CHANNELS,), (CHANNELS,), (OUT, CHANNELS, 3, 3), (OUT,))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    values[0] = values[0].contiguous(memory_format=layout)
    return [each.requires_grad_() for each in values]


def normalised(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return ops.group_norm_beside(x, weight, bias, groups=GROUPS)


def normalised_apart(x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return ops.group_norm(x, weight, bias, groups=GROUPS), x


def convolved(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    return ops.norm_convolution_beside(
        x, kernel, more, norm_weight=weight, norm_bias=bias, groups=GROUPS, resample="up"
    )


def convolved_apart(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, more: Tensor
) -> tuple[Tensor, ...]:
    y = ops.norm_convolution(
        x, kernel, more, norm_weight=weight, norm_bias=bias, groups=GROUPS, resample="up"
    )
    return y, x, x


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder's two inputs of one: more channels in the second."""
    return x[:, :7], x[:, 7:].contiguous(memory_format=torch.channels_last)


def decoded(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    own, skip = halves(x)
    return ops.norm_convolution_beside(
        own, kernel, more, skip=skip, norm_weight=weight, norm_bias=bias, groups=GROUPS
    )


def decoded_apart(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, more: Tensor
) -> tuple[Tensor, ...]:
    y = ops.norm_convolution(x, kernel, more, norm_weight=weight, norm_bias=bias, groups=GROUPS)
    return y, *halves(x)


NORM, CONVOLUTION = (normalised, normalised_apart), (convolved, convolved_apart)
DECODER = (decoded, decoded_apart)
# With the places of those results whose gradients come back.
USES = [
    *((NORM, used) for used in ("0", "1", "01")),
    *((CONVOLUTION, used) for used in ("0", "1", "2", "01", "02", "12", "012")),
    *((DECODER, used) for used in ("0", "1", "2", "01", "02", "12", "012")),
]


def gradients(function: Paths, values: list[Tensor], used: str) -> list[Tensor | None]:
    """Of every input, from those results whose places are in ``used``."""
    results = function(*values)
    loss = torch.zeros((), dtype=values[0].dtype)
    for place, each in enumerate(results):
        if str(place) in used:
            weights = torch.linspace(-1, 2 + place, each.numel(), dtype=each.dtype).view(each.shape)
            loss = loss + (each * weights).sum()
    return list(torch.autograd.grad(loss, values, allow_unused=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("pair", "used"), USES, ids=[f"{pair[0].__name__}-{used}" for pair, used in USES])
def test_the_gradients_are_those_of_two_paths(
    pair: tuple[Paths, Paths], dtype: torch.dtype, layout: torch.memory_format, used: str
) -> None:
    values = inputs(dtype, layout)
    results = [each(*values) for each in pair]
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    fused, apart = (gradients(each, values, used) for each in pair)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for actual, right in zip(fused, apart, strict=True):
        assert (actual is None) == (right is None)
        if actual is not None and right is not None:
            assert (actual - right).norm() <= tolerance * right.norm()


def test_the_sum_is_rounded_once() -> None:
    values = inputs(torch.bfloat16, torch.channels_last)
    exact = [each.detach().double().requires_grad_() for each in values]
    right = gradients(normalised, exact, "01")[0]
    fused, apart = (gradients(each, values, "01")[0] for each in (normalised, normalised_apart))
    assert right is not None
    assert fused is not None
    assert apart is not None
    assert (fused.double() - right).norm() < (apart.double() - right).norm()


def test_without_gradients_x_itself_comes_back() -> None:
    values = inputs(torch.float32, torch.channels_last)
    with torch.no_grad():
        assert normalised(*values)[1] is values[0]
        assert all(each is values[0] for each in convolved(*values)[1:])
    fixed = [values[0].detach(), *values[1:]]
    y, *same = convolved(*fixed)
    assert all(each is fixed[0] for each in same)
    assert y.requires_grad


def test_bad_inputs_are_refused() -> None:
    x, weight, bias, kernel, more = inputs(torch.float32, torch.channels_last)
    with pytest.raises(ValueError, match="not divisible into 5 groups"):
        ops.group_norm_beside(x, weight, bias, groups=5)
    with pytest.raises(ValueError, match="unknown resample 'sideways'"):
        ops.norm_convolution_beside(
            x, kernel, more, norm_weight=weight, norm_bias=bias, groups=GROUPS,
            resample="sideways",  # type: ignore[arg-type]
        )  # fmt: skip


def sums_of_maps(block: torch.nn.Module, *given: Tensor) -> int:
    """The sums of two maps as large as the first input that autograd makes in a backward pass."""
    given[0].grad = None
    y = block(*given)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    map_shape = list(given[0].shape)
    return sum(
        event.count
        for event in profile.key_averages(group_by_input_shape=True)
        if event.key in ("aten::add", "aten::add_") and event.input_shapes[:2] == [map_shape, map_shape]
    )


def test_blocks_leave_autograd_no_map_to_add() -> None:
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert sums_of_maps(AttentionBlock(32, 2), x) == 0
    assert sums_of_maps(ResBlock(32, 32, 16), x, torch.randn(2, 16)) == 0


def test_a_hook_on_the_norm_is_called() -> None:
    block, seen = AttentionBlock(32, 2), []
    block.norm.register_forward_hook(lambda *_: seen.append(1))
    block(torch.randn(2, 32, 4, 4))
    assert seen == [1]
