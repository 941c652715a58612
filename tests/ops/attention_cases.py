"""Attention cases: inputs, the formula in PyTorch's own functions, comparison of values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.parity import FACTOR, excess
from glide_fast.ops import attention

Layout = Literal["qkv_views", "contiguous", "channels_first"]
NAMES = ("query", "key", "value", "text_key", "text_value")
LAYOUTS: tuple[Layout, ...] = ("qkv_views", "contiguous", "channels_first")
HALF_FACTOR = 1.5  # a result that is rounded once, as ours, is hardly worse than another that is
Inputs = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of attention: T queries, N heads of D channels, S text positions (None: no text)."""

    batch: int = 2
    queries: int
    heads: int
    dim: int
    text: int | None = None
    layout: Layout = "qkv_views"
    dtype: torch.dtype = torch.float32
    spread: float = 1.0

    def __str__(self) -> str:
        """The case's name in pytest's output."""
        shape = f"{self.batch}x{self.queries}x{self.heads}x{self.dim}"
        return f"{shape}-text{self.text}-{self.layout}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> Inputs:
        """query, key, value, text_key, text_value: leaves, with strides as `layout` says."""
        generator = torch.Generator().manual_seed(self.queries + self.dim)

        def projection(length: int, parts: int) -> list[Tensor]:
            shape = (self.batch, length, self.heads, parts, self.dim)
            values = self.spread * torch.randn(shape, generator=generator).to(self.dtype)
            views = values.unbind(3)
            if self.layout == "contiguous":
                views = tuple(view.contiguous() for view in views)
            if self.layout == "channels_first":
                views = tuple(view.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for view in views)
            return [view.detach().requires_grad_() for view in views]

        text = [None, None] if self.text is None else projection(self.text, 2)
        return [*projection(self.queries, 3), *text]


def plain(inputs: Inputs) -> Tensor:
    """The formula in PyTorch's own functions, in the dtype of the inputs."""
    query, key, value, text_key, text_value = inputs
    keys = torch.cat([tensor for tensor in (text_key, key) if tensor is not None], dim=1)
    values = torch.cat([tensor for tensor in (text_value, value) if tensor is not None], dim=1)
    scores = torch.einsum("btnd,bsnd->bnts", query, keys) / query.shape[3] ** 0.5
    return torch.einsum("bnts,bsnd->btnd", scores.softmax(dim=3), values)


def ours(inputs: Inputs) -> Tensor:
    """The op under test."""
    query, key, value, text_key, text_value = inputs
    return attention(query, key, value, text_key=text_key, text_value=text_value)


def differentiate(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The output and the gradient of every input, for a fixed gradient that arrives at the output."""
    output = function(inputs)
    generator = torch.Generator().manual_seed(7)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    results = {"output": output.detach()}
    for name, value in zip(NAMES, inputs, strict=True):
        if value is not None:
            assert value.grad is not None, f"no gradient of {name}"
            results[name] = value.grad
    return results


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """New leaves with the same values, in `dtype` if given."""
    return [
        None if value is None else value.detach().to(dtype or value.dtype).requires_grad_()
        for value in inputs
    ]


def assert_exact(case: Case) -> None:
    """Compare output and gradients with float64; allowed is a small multiple of plain PyTorch's own error.

    For bfloat16 and float16, plain is float32 arithmetic on the same values whose results are rounded once.
    """
    inputs = case.inputs()
    actual = differentiate(ours, inputs)
    rounded = differentiate(
        lambda narrow: plain([None if value is None else value.float() for value in narrow]).to(case.dtype),
        leaves(inputs),
    )
    exact = differentiate(plain, leaves(inputs, torch.float64))
    factor = FACTOR if case.dtype is torch.float32 else HALF_FACTOR
    for name, value in exact.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == case.dtype, name
        ratio = excess(actual[name], rounded[name], value, factor=factor)
        assert ratio <= 1, f"{case}: the error of {name} is {ratio:.2f} times what is allowed"
