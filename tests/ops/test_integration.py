"""The ops inside PyTorch: opcheck, gradcheck, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.ops import attention, group_norm, reference
from tests.ops import attention_cases, group_norm_cases

NORM = group_norm_cases.Case
ATTENTION = attention_cases.Case
NORMS = [
    NORM(shape=(2, 12, 5, 4), groups=3),
    NORM(shape=(2, 12, 5, 4), groups=3, film=True, activation="silu", layout="channels_last"),
    NORM(shape=(2, 12, 1, 1), groups=3, resample="up"),  # contiguous and channels-last at once
    NORM(shape=(2, 12, 6), groups=4, activation="silu", resample="up"),
    NORM(shape=(1, 6, 2, 3, 4), groups=2, film=True, resample="down", layout="channels_last"),
]
ATTENTIONS = [
    ATTENTION(queries=6, heads=2, dim=4),
    ATTENTION(queries=5, heads=2, dim=3, text=2, layout="channels_first"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
MODES = {"none": reference.RESAMPLE_NONE, "up": reference.RESAMPLE_UP, "down": reference.RESAMPLE_DOWN}


def norm_arguments(case: NORM) -> tuple[Any, ...]:
    """Arguments of the op glide_fast::group_norm."""
    return (*case.inputs(), case.groups, 1e-5, case.activation == "silu", MODES[case.resample])


def detached(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments without gradients."""
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_opcheck_of_group_norm(case: NORM, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.glide_fast.group_norm.default, norm_arguments(replace(case, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_opcheck_of_group_norm_backward(case: NORM, dtype: torch.dtype) -> None:
    arguments = detached(norm_arguments(replace(case, dtype=dtype)))
    output, mean, rstd = torch.ops.glide_fast.group_norm(*arguments)
    arguments = (torch.randn_like(output), *arguments[:5], mean, rstd, *arguments[7:])
    torch.library.opcheck(torch.ops.glide_fast.group_norm_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_opcheck_of_attention(case: ATTENTION, dtype: torch.dtype) -> None:
    inputs = tuple(replace(case, dtype=dtype).inputs())
    torch.library.opcheck(torch.ops.glide_fast.attention.default, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_opcheck_of_attention_backward(case: ATTENTION, dtype: torch.dtype) -> None:
    inputs = detached(tuple(replace(case, dtype=dtype).inputs()))
    output, log_sum = torch.ops.glide_fast.attention(*inputs)
    arguments = (torch.randn_like(output), *inputs, output, log_sum)
    torch.library.opcheck(torch.ops.glide_fast.attention_backward.default, arguments)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_gradcheck_of_group_norm(case: NORM) -> None:
    inputs = tuple(replace(case, dtype=torch.float64).inputs())
    assert torch.autograd.gradcheck(lambda *values: case.ours(list(values)), inputs)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_gradcheck_of_attention(case: ATTENTION) -> None:
    inputs = tuple(replace(case, dtype=torch.float64).inputs())
    assert torch.autograd.gradcheck(lambda *values: attention_cases.ours(list(values)), inputs)


def same_compiled(
    function: Callable[..., Tensor], make: Callable[[], list[Tensor | None]], backend: str
) -> None:
    """Compare output and every gradient, eager and compiled into one graph."""
    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend)):
        inputs = make()
        output = run(*inputs)
        output.backward(torch.ones_like(output))
        results.append([output.detach(), *(value.grad for value in inputs if value is not None)])
    for eager, compiled in zip(*results, strict=True):
        assert compiled.stride() == eager.stride()
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_group_norm_compiles_into_one_graph(case: NORM) -> None:
    same_compiled(lambda *values: case.ours(list(values)), case.inputs, "aot_eager")


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_compiles_into_one_graph(case: ATTENTION) -> None:
    same_compiled(lambda *values: attention_cases.ours(list(values)), case.inputs, "aot_eager")


def test_both_ops_compile_with_inductor_between_other_operations() -> None:
    def block(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor) -> Tensor:
        y = group_norm(x * 2, weight, bias, groups=4, activation="silu")
        tokens = y.flatten(2).transpose(1, 2) @ projection
        query, key, value = tokens.unflatten(2, (2, 3, 4)).unbind(3)
        return attention(query, key, value).flatten(2) + 1

    def make() -> list[Tensor | None]:
        torch.manual_seed(0)
        shapes = ((2, 8, 3, 4), (8,), (8,), (8, 24))
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    same_compiled(block, make, "inductor")


def test_a_compiled_function_serves_another_batch_size() -> None:
    case = NORM(shape=(2, 12, 5, 4), groups=3, activation="silu")
    compiled = torch.compile(
        lambda *values: case.ours(list(values)), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (2, 3, 5):
        inputs = replace(case, shape=(batch, *case.shape[1:])).inputs()
        torch.testing.assert_close(compiled(*inputs), case.ours(inputs))


def test_meta_tensors_give_the_shape_without_any_work() -> None:
    x, parameter = torch.empty(2, 64, 512, 512, device="meta"), torch.empty(64, device="meta")
    assert group_norm(x, parameter, parameter, resample="down").shape == (2, 64, 256, 256)
    qkv = torch.empty(2, 4096, 8, 3, 64, device="meta").unbind(3)
    assert attention(*qkv).shape == (2, 4096, 8, 64)
