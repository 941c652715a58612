"""The 3x3 convolution kernel, interpreted: values, gradients and the moments it leaves, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.kernels import convolution, moments, norm_convolution, product
from glide_fast.ops import chosen, dispatch, reference
from glide_fast.ops.column_sums import COPIES
from tests.kernels import interpreter
from tests.kernels.products import PATHS, TOLERANCES, compiled, error, exact_statistics, poisoned, take_path

pytestmark = pytest.mark.usefixtures("poison")
poison = pytest.fixture(poisoned)
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution of x [B, C, H, W] to ``out`` channels."""

    shape: tuple[int, int, int, int]
    out: int
    bias: str = "shared"
    residual: str = "none"

    def draw(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of ``convolve``."""
        generator = torch.Generator().manual_seed(sum(self.shape) + self.out)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        batch, channels, height, width = self.shape
        values: dict[str, Any] = {
            "x": normal(*self.shape) + 0.5,
            "weight": normal(self.out, channels, 3, 3) * (9 * channels) ** -0.5,
        }
        if self.bias != "none":
            values["bias"] = normal(*([batch] if self.bias == "own" else []), self.out)
        if self.residual != "none":
            part = 2 if self.residual == "half" else 1
            values["residual"] = normal(batch, self.out, height // part, width // part)
        return {name: value.to(interpreter.DEVICE, dtype) for name, value in values.items()}


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    y = F.conv2d(x.double(), weight.double(), padding=1)
    if bias is not None:
        y = y + (bias if bias.ndim == 2 else bias[None])[:, :, None, None]
    return y if residual is None else y + reference.matched(residual.double(), y)


CASES = (
    Case(shape=(2, 24, 9, 12), out=40, bias="own", residual="same"),
    Case(shape=(3, 64, 6, 4), out=72, residual="half"),  # several pictures a tile, a sum in splits
    Case(shape=(1, 3, 17, 16), out=64),  # the first layer: rows of six bytes
    Case(shape=(2, 40, 8, 20), out=6, bias="none"),  # the last
    Case(shape=(5, 8, 1, 1), out=8, residual="same"),
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_moments_are_exact(
    case: Case, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    monkeypatch.setattr(moments, "FEWEST_PIXELS", 1)
    arguments = case.draw(dtype)
    y = convolution.convolve(**arguments)
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, exact(**arguments)) <= TOLERANCES[dtype]
    kept = moments.statistics(y, None, 2, EPS)
    assert kept is not None
    for value, right in zip((kept.mean, kept.rstd), exact_statistics(y, 2, EPS), strict=True):
        assert error(value, right) <= 2e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_gradient_is_the_turned_convolution(
    dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_path(path, monkeypatch)
    for shape, out in (((2, 24, 9, 12), 40), ((1, 64, 4, 8), 72)):
        weight = Case(shape=shape, out=out).draw(dtype)["weight"]
        grad = torch.randn(shape[0], out, *shape[2:]).to(weight)
        right = torch.nn.grad.conv2d_input(shape, weight.double(), grad.double(), padding=1)
        assert error(convolution.convolve(grad, weight, turned=True), right) <= TOLERANCES[dtype]


def test_an_empty_batch() -> None:
    weight = Case(shape=(1, 8, 4, 4), out=16).draw(torch.float16)["weight"]
    y = convolution.convolve(weight.new_empty(0, 8, 4, 4), weight)
    assert y.shape == (0, 16, 4, 4)


def test_a_sum_is_split_in_the_same_way_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(shape=(2, 64, 8, 8), out=64, residual="same").draw(torch.float32)
    split = convolution.convolve(**arguments)
    assert torch.equal(split, convolution.convolve(**arguments))
    monkeypatch.setattr(product, "splits", lambda *_: 1)
    whole = convolution.convolve(**arguments)
    assert not torch.equal(split, whole), "the sum was not split"
    assert error(split, whole.double()) <= 1e-6


def test_layouts_that_the_kernel_does_not_read_are_copied() -> None:
    arguments = Case(shape=(2, 16, 8, 8), out=16, bias="own", residual="same").draw(torch.float32)
    right = exact(**arguments)
    arguments["bias"] = torch.stack([arguments["bias"], arguments["bias"]], dim=2)[..., 0]
    arguments["x"] = torch.stack([arguments["x"], arguments["x"]], dim=3)[..., 0, :]
    assert error(convolution.convolve(**arguments), right) <= 1e-6


OP_CASES = (
    {"skip": 8, "film": True, "mode": reference.RESAMPLE_UP, "residual": "half", "dtype": torch.float16},
    {"skip": 0, "film": False, "mode": reference.RESAMPLE_DOWN, "residual": "none", "dtype": torch.float32},
    {"skip": 0, "film": None, "mode": reference.RESAMPLE_NONE, "residual": "same", "dtype": torch.bfloat16},
    {"skip": 8, "film": True, "mode": reference.RESAMPLE_NONE, "residual": "none", "dtype": torch.float32},
    {
        "skip": 8, "film": False, "mode": reference.RESAMPLE_NONE, "residual": "same",
        "dtype": torch.bfloat16, "weight": torch.float32,
    },
    {
        "skip": 0, "film": None, "mode": reference.RESAMPLE_DOWN, "residual": "none", "dtype": torch.float16,
        "weight": torch.float32,
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "case", OP_CASES, ids=lambda case: f"{case['dtype']}-{case['mode']}-{case.get('weight', '')}"
)
@pytest.mark.parametrize("ours", [True, False], ids=["triton", "library"])
def test_the_op_follows_its_reference(case: dict[str, Any], ours: bool) -> None:
    dtype, channels = case["dtype"], 8 + case["skip"]
    wide = case.get("weight", dtype)
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(interpreter.DEVICE, dtype)

    norm = (None, None) if case["film"] is None else (1 + 0.3 * normal(channels), 0.2 * normal(channels))
    film = (0.3 * normal(2, 2 * channels)).chunk(2, dim=1) if case["film"] else (None, None)
    x, skip = normal(2, 8, 8, 8), normal(2, case["skip"], 8, 8) if case["skip"] else None
    weight, bias = 0.1 * normal(16, channels, 3, 3, dtype=wide), normal(16, dtype=wide)
    side = int(8 * {reference.RESAMPLE_UP: 2, reference.RESAMPLE_DOWN: 0.5}.get(case["mode"], 1))
    half = side // 2 if case["residual"] == "half" else side
    residual = None if case["residual"] == "none" else normal(2, 16, half, half, dtype=wide)
    settings = 4, EPS, case["mode"]
    if ours:
        chosen.choose([weight])
    forward = x, skip, *norm, *film, *settings, weight, bias, residual
    actual = norm_convolution.norm_convolution(*forward)
    right = reference.norm_convolution(*[to_double(each) for each in forward])
    for value, exact_value in zip(actual, right, strict=True):
        if exact_value.numel():
            assert error(value, exact_value) <= 2 * TOLERANCES[value.dtype]
    grad = normal(*actual[0].shape, dtype=wide)
    beside = [normal(2, channels, 8, 8) for _ in range(2)]
    saved = *norm, *film, *actual[1:], *settings, weight, bias
    for needs in ((True, True), (True, False), (False, True)):
        backward = grad, x, skip, *saved, *needs, *beside, COPIES
        gradients = norm_convolution.norm_convolution_backward(*backward)
        right = reference.norm_convolution_backward(*[to_double(each) for each in backward])
        assert gradients[0].dtype is dtype
        for value, exact_value in zip(gradients, right, strict=True):
            assert value.shape == exact_value.shape
            if exact_value.numel():
                assert error(value, exact_value) <= 3 * TOLERANCES[value.dtype]
    chosen.forget([weight])


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def test_what_the_kernels_do_not_cover_goes_to_the_default() -> None:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=interpreter.DEVICE, dtype=torch.float64)

    x, weight = draw(1, 4, 6, 6), draw(8, 4, 3, 3)
    chosen.choose([weight])
    norm = draw(4), draw(4)
    arguments = x, None, *norm, None, None, 2, EPS, 0, weight, None, None
    actual = norm_convolution.norm_convolution(*arguments)[0]
    torch.testing.assert_close(actual, dispatch.default("norm_convolution")(*arguments)[0])
    volume, weight = draw(1, 4, 2, 4, 4).float(), draw(8, 4, 3, 3, 3).float()
    chosen.choose([weight])
    actual = norm_convolution.norm_convolution(
        volume, None, None, None, None, None, 2, EPS, 0, weight, None, None
    )[0]
    torch.testing.assert_close(actual, F.conv3d(volume, weight, padding=1))


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_it_compiles_without_spills_to_tensor_cores(target: str) -> None:
    rows = compiled("convolution", target)
    assert any(row["name"].endswith("parts_kernel") for row in rows)
    for row in rows:
        assert row["spills"] == 0, row
        if row["name"].endswith("parts_kernel"):
            continue
        assert row["tensor_core"] > 0, row
        assert row["blocks"] >= (1 if "fp32" in row["name"] else 2), row
        if target == "sm_80":
            assert row["wide_loads"] >= 8, row
        elif "fp32" not in row["name"]:
            assert row["registers"] <= 140, row
            assert row["tma"] >= 2, row
            assert row["shared"] <= 112 * 1024, row
