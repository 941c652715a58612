"""The ops inside PyTorch: opcheck, gradcheck, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.ops import (
    LinearActivation,
    attention,
    causal_attention,
    group_norm,
    layer_norm,
    linear,
    norm_convolution,
    reference,
)
from tests.ops import attention_cases, group_norm_cases, norm_convolution_cases

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
CONVOLUTION = norm_convolution_cases.Case
CONVOLUTIONS = [
    CONVOLUTION(shape=(2, 6, 5, 4), skip=2, out=3, film=True, residual=True, resample="up"),
    CONVOLUTION(shape=(2, 4, 16, 16), out=3, groups=None, layout="contiguous"),
    CONVOLUTION(shape=(2, 4, 6), out=3, groups=2, bias="each"),
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
    summand = torch.randn_like(arguments[1])
    for sums in (0, 1, 2):
        torch.library.opcheck(torch.ops.glide_fast.group_norm_backward.default, (*arguments, summand, sums))


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


def convolution_arguments(case: CONVOLUTION, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the op glide_fast::norm_convolution."""
    given = case.inputs(dtype)
    first = [given.get(name) for name in ("x", "skip", "norm_weight", "norm_bias", "scale", "shift")]
    settings = (case.groups or 1, 1e-5, MODES[case.resample])
    return (*first, *settings, given["weight"], given.get("bias"), given.get("residual"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_opcheck_of_norm_convolution(case: CONVOLUTION, dtype: torch.dtype) -> None:
    arguments = convolution_arguments(case, dtype)
    torch.library.opcheck(torch.ops.glide_fast.norm_convolution.default, arguments)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_opcheck_of_norm_convolution_backward(
    case: CONVOLUTION, dtype: torch.dtype, needs: tuple[bool, bool]
) -> None:
    batch, channels, *space = case.shape
    joined = replace(case, shape=(batch, channels + case.skip, *space), skip=0)
    x, *arguments = detached(convolution_arguments(joined, dtype))
    output, mean, rstd = torch.ops.glide_fast.norm_convolution(x, *arguments)
    _skip, *film, groups, eps, mode, weight, bias, _residual = arguments
    grad = torch.randn_like(output)
    given = grad, x, None, *film, mean, rstd, groups, eps, mode, weight, bias, *needs
    torch.library.opcheck(torch.ops.glide_fast.norm_convolution_backward.default, given)
    if needs == (True, False):  # with what comes back for two paths beside
        beside = torch.randn_like(x), torch.randn_like(x)
        torch.library.opcheck(
            torch.ops.glide_fast.norm_convolution_backward.default,
            (*given, *beside, 2),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_the_gradients_of_two_inputs(dtype: torch.dtype) -> None:
    x, skip, *others = detached(convolution_arguments(CONVOLUTIONS[0], dtype))
    assert skip is not None
    output, mean, rstd = torch.ops.glide_fast.norm_convolution(x, skip, *others)
    *film, groups, eps, mode, weight, bias, _residual = others
    given = torch.randn_like(output), x, skip, *film, mean, rstd, groups, eps, mode, weight, bias
    beside = [torch.randn(len(x), weight.shape[1], *x.shape[2:]).to(dtype) for _ in range(2)]
    for more in ((True, True), (False, True), (True, True, *beside, 2)):
        torch.library.opcheck(torch.ops.glide_fast.norm_convolution_backward.default, (*given, *more))


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_opcheck_of_float32_weights_and_narrow_maps(case: CONVOLUTION) -> None:
    batch, channels, *space = case.shape
    joined = replace(case, shape=(batch, channels + case.skip, *space), skip=0)
    x, *others = detached(convolution_arguments(joined, torch.float32))
    given = x.bfloat16(), *others
    torch.library.opcheck(
        torch.ops.glide_fast.norm_convolution.default, given, test_utils=("test_schema", "test_faketensor")
    )
    x, _skip, *film, groups, eps, mode, weight, bias, _residual = given
    output, mean, rstd = torch.ops.glide_fast.norm_convolution(*given)
    backward = (
        torch.randn_like(output),
        x,
        None,
        *film,
        mean,
        rstd,
        groups,
        eps,
        mode,
        weight,
        bias,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.glide_fast.norm_convolution_backward.default, backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 40])
def test_opcheck_of_linear(rows: int, dtype: torch.dtype) -> None:
    x, second = torch.randn(2, rows, 6, dtype=dtype), torch.randn(2, rows, 2, dtype=dtype)
    weight, bias = torch.randn(5, 8, dtype=dtype), torch.randn(5, dtype=dtype)
    grad = torch.randn(2, rows, 5, dtype=dtype)
    leaves = [each.requires_grad_() for each in (x, second, weight, bias)]
    for kind in (reference.ACTIVATION_NONE, reference.ACTIVATION_GELU, reference.ACTIVATION_QUICK_GELU):
        torch.library.opcheck(torch.ops.glide_fast.linear.default, (*leaves, None, kind))
    x, weight = x.detach(), weight.detach()[:, :6]
    torch.library.opcheck(torch.ops.glide_fast.linear_backward.default, (grad, x, None, weight, True, True))
    torch.library.opcheck(torch.ops.glide_fast.linear_backward.default, (grad, x, None, weight, False, True))
    weight, second = leaves[2].detach(), second.detach()
    for needs in ((True, True), (False, True), (True, False)):
        arguments = grad, x, second, weight, *needs
        torch.library.opcheck(torch.ops.glide_fast.linear_backward.default, arguments)


@pytest.mark.parametrize("kind", [reference.ACTIVATION_GELU, reference.ACTIVATION_QUICK_GELU])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_the_activations(dtype: torch.dtype, kind: int) -> None:
    x = torch.randn(2, 3, 5, dtype=dtype).transpose(0, 1)
    torch.library.opcheck(torch.ops.glide_fast.activation.default, (x, kind))
    for more in ((), (1,)):
        arguments = torch.randn_like(x), x, kind, *more
        torch.library.opcheck(torch.ops.glide_fast.activation_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_layer_norm(dtype: torch.dtype) -> None:
    x, parameters = torch.randn(2, 5, 6, dtype=dtype), [torch.randn(6) for _ in range(2)]
    leaves = [each.clone().requires_grad_() for each in (x, *parameters)]
    torch.library.opcheck(torch.ops.glide_fast.layer_norm.default, (*leaves, 1e-5))
    output, *statistics = torch.ops.glide_fast.layer_norm(x, *parameters, 1e-5)
    for needs in ((True, True), (False, True), (True, False)):
        arguments = (torch.randn_like(output), x, parameters[0], *statistics, *needs)
        torch.library.opcheck(torch.ops.glide_fast.layer_norm_backward.default, arguments)
        for more in ((torch.randn_like(x),), (None, 2)):
            torch.library.opcheck(torch.ops.glide_fast.layer_norm_backward.default, (*arguments, *more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_causal_attention(dtype: torch.dtype) -> None:
    projection = torch.randn(2, 5, 2, 3, 4, dtype=dtype)
    torch.library.opcheck(torch.ops.glide_fast.causal_attention.default, projection.unbind(3))


@pytest.mark.parametrize("case", [CONVOLUTIONS[0], CONVOLUTIONS[2]], ids=str)
def test_gradcheck_of_norm_convolution(case: CONVOLUTION) -> None:
    inputs = case.inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *values: case.ours(dict(zip(inputs, values, strict=True))), tuple(inputs.values())
    )


def test_gradcheck_of_linear_with_two_inputs() -> None:
    shapes = (2, 3, 4), (5, 7), (5,), (2, 3, 3)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *values: linear(*values[:3], second=values[3]), inputs)


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


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_norm_convolution_compiles_into_one_graph(case: CONVOLUTION) -> None:
    names = list(case.inputs())
    same_compiled(
        lambda *values: case.ours(dict(zip(names, values, strict=True))),  # type: ignore[arg-type]
        lambda: list(case.inputs().values()),
        "aot_eager",
    )


def test_the_ops_of_a_transformer_compile_into_one_graph() -> None:
    def make() -> list[Tensor | None]:
        torch.manual_seed(0)
        shapes = ((2, 20, 6), (6,), (6,), (18, 6), (18,))
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    def block(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
        normal = layer_norm(x, weight, bias)
        hidden = linear(normal, projection, offset, activation="gelu").unflatten(2, (2, 3, 3))
        attended = causal_attention(*hidden.unbind(3)).flatten(2)
        return linear(attended, projection, offset, activation="quick_gelu")

    same_compiled(block, make, "aot_eager")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
def test_gradcheck_of_linear(activation: LinearActivation) -> None:
    shapes = ((2, 5, 4), (3, 6), (3,), (2, 5, 2), (2, 5, 3))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def function(*values: Tensor) -> Tensor:
        x, weight, bias, second, residual = values
        return linear(x, weight, bias, second=second, residual=residual, activation=activation)

    assert torch.autograd.gradcheck(function, inputs)


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
    weight = torch.empty(8, 64, 3, 3, device="meta")
    assert norm_convolution(x, weight, resample="up").shape == (2, 8, 1024, 1024)
    assert group_norm(x, parameter, parameter, resample="down").shape == (2, 64, 256, 256)
    qkv = torch.empty(2, 4096, 8, 3, 64, device="meta").unbind(3)
    assert attention(*qkv).shape == (2, 4096, 8, 64)
