"""The linear kernel, interpreted: values against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.kernels import linear, moments
from glide_fast.ops import chosen, reference
from tests.kernels import interpreter
from tests.kernels.products import PATHS, TOLERANCES, compiled, error, exact_statistics, poisoned, take_path

pytestmark = pytest.mark.usefixtures("poison")
poison = pytest.fixture(poisoned)
# Shape of x, features of the second input, of the output, activation, residual.
CASES = (
    ((2, 40, 64), 24, 72, reference.ACTIVATION_NONE, True),
    ((3, 77, 40), 0, 96, reference.ACTIVATION_GELU, True),
    ((70, 24), 0, 7, reference.ACTIVATION_QUICK_GELU, False),
    ((2, 5, 33), 5, 8, reference.ACTIVATION_NONE, True),  # rows of 66 bytes
    ((1, 64, 1024), 0, 16, reference.ACTIVATION_GELU, True),  # a sum in splits
)


def draw(
    shape: tuple[int, ...], second: int, out: int, kind: int, residual: bool, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The op's arguments."""
    generator = torch.Generator().manual_seed(sum(shape) + out)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(interpreter.DEVICE, dtype)

    features = shape[-1] + second
    return (
        normal(*shape),
        normal(*shape[:-1], second) if second else None,
        normal(out, features) * features**-0.5,
        normal(out),
        normal(*shape[:-1], out) if residual else None,
        kind,
    )


def exact(*arguments: Any) -> Tensor:
    wide = [each.double() if isinstance(each, Tensor) else each for each in arguments]
    return reference.linear(*wide)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_exact(
    case: tuple[Any, ...], dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    arguments = draw(*case, dtype)
    y = linear.multiply(*arguments)
    assert y.dtype is dtype
    assert error(y, exact(*arguments)) <= TOLERANCES[dtype]


@pytest.mark.parametrize(("pixels", "leaves"), [((8, 16), True), ((8, 17), False)])
def test_large_maps_leave_their_moments(
    pixels: tuple[int, int], leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tiles do not reach from one picture into the next."""
    monkeypatch.setattr(moments, "FEWEST_PIXELS", 1)
    arguments = draw((3, pixels[0] * pixels[1], 16), 8, 24, 0, True, torch.float16)
    with torch.inference_mode():
        y = linear.multiply(*arguments)
        pictures = y.transpose(1, 2).unflatten(2, pixels)
        kept = moments.statistics(pictures, None, 4, 1e-5)
    assert error(y, exact(*arguments)) <= TOLERANCES[torch.float16]
    assert (kept is not None) is leaves
    if kept is not None:
        for value, right in zip((kept.mean, kept.rstd), exact_statistics(pictures, 4, 1e-5), strict=True):
            assert error(value, right) <= 2e-6


def test_strides_are_the_callers_business() -> None:
    x, _, weight, bias, residual, kind = draw((2, 40, 16), 0, 24, 0, True, torch.float32)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    kernel = weight[:, :, None, None]
    y = linear.multiply(strided, None, kernel, bias, residual, kind)
    assert error(y, exact(x, None, weight, bias, residual, kind)) <= 1e-6
    assert linear.multiply(x[:0], None, weight, bias, residual[:0], kind).shape == (0, 40, 24)


@pytest.mark.parametrize(("rows", "wanted", "ours"), [(64, True, True), (64, False, False), (8, True, False)])
def test_the_kernel_serves_where_it_was_chosen_and_pays(
    rows: int, wanted: bool, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = linear.multiply

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(linear, "multiply", counted)
    arguments = draw((rows, 16), 16, 24, reference.ACTIVATION_GELU, True, torch.float32)
    if wanted:
        chosen.choose([arguments[2]])
    y = linear.linear(*arguments)
    assert bool(calls) is ours
    assert error(y, exact(*arguments)) <= 1e-6


def test_it_compiles_without_spills_to_tensor_cores() -> None:
    rows = compiled("linear", "sm_90")
    assert any(row["name"].endswith("parts_kernel") for row in rows)
    for row in rows:
        assert row["spills"] == 0, row
        if row["name"].endswith("parts_kernel"):
            continue
        assert row["tensor_core"] > 0, row
        assert row["blocks"] >= 2, row
        assert row["tma"] >= 2, row
        assert row["shared"] <= 112 * 1024, row
        assert row["registers"] <= 150 or "fp32" in row["name"], row  # GELU takes fifty
