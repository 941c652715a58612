"""The mended interpreter: bfloat16 in dot products and casts is right, arithmetic on it is refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreter import DEVICE

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernels; nothing is interpreted")


@triton.jit
def _product(x, y, wide, narrow, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(x + at), tl.load(y + at))
    tl.store(wide + at, product)
    tl.store(narrow + at, product.to(narrow.dtype.element_ty))


@triton.jit
def _sum(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def _widened(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_product_is_summed_in_float32_and_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 16, generator=generator).to(DEVICE, dtype) for _ in range(2))
    wide, narrow = torch.empty(16, 16, device=DEVICE), torch.empty(16, 16, dtype=dtype, device=DEVICE)
    _product[(1,)](x, y, wide, narrow, 16)
    if dtype is not torch.float32:  # whose products a GPU may compute in TF32
        torch.testing.assert_close(wide.double(), x.double() @ y.double(), rtol=0, atol=1e-5)
    assert torch.equal(narrow, wide.to(dtype))


@interpreted
def test_arithmetic_on_bfloat16_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert to float32 first"):
        _sum[(1,)](x, torch.empty_like(x))


@interpreted
def test_widening_keeps_every_value() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.5, 1e-40, 3e38, float("inf"), float("-inf")] * 2).bfloat16()
    y = torch.empty(16)
    _widened[(1,)](x, y)
    assert torch.equal(y, x.float())
