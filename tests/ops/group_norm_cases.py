"""GroupNorm cases: inputs, the formula in PyTorch's own functions, comparison of values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parity import FACTOR, excess
from glide_fast.ops import Activation, Resample, group_norm

Layout = Literal["contiguous", "channels_last", "sliced", "channels_last_sliced"]
NAMES = ("x", "weight", "bias", "scale", "shift")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last", "sliced", "channels_last_sliced")
HALF_FACTOR = 1.5  # a result that is rounded once, as ours, is hardly worse than another that is


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of group_norm: shape [B, C, *space] and settings."""

    shape: tuple[int, ...]
    groups: int = 32
    film: bool = False
    activation: Activation = "none"
    resample: Resample = "none"
    layout: Layout = "contiguous"
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    offset: float = 0.5

    def __str__(self) -> str:
        """The case's name in pytest's output."""
        shape = "x".join(map(str, self.shape))
        parts = [shape, f"g{self.groups}", self.layout, self.activation, self.resample]
        return "-".join([*parts, "film" if self.film else "plain", str(self.dtype).removeprefix("torch.")])

    def inputs(self) -> list[Tensor | None]:
        """x, weight, bias, scale, shift: leaves; FiLM is two halves of one projection."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        batch, channels = self.shape[:2]

        def draw(*shape: int, dtype: torch.dtype | None) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype or self.dtype)

        x = laid_out(2 * draw(*self.shape, dtype=torch.float32) + self.offset, self.layout).to(self.dtype)
        weight = 1 + 0.3 * draw(channels, dtype=self.parameter_dtype)
        bias = 0.2 * draw(channels, dtype=self.parameter_dtype)
        film = 0.3 * draw(batch, 2 * channels, dtype=self.dtype)
        scale, shift = film.chunk(2, dim=1) if self.film else (None, None)
        values = (x, weight, bias, scale, shift)
        return [None if value is None else value.detach().requires_grad_() for value in values]

    def plain(self, inputs: list[Tensor | None]) -> Tensor:
        """The formula in PyTorch's own functions, in the dtype of the inputs.

        x is made contiguous, since PyTorch's own channels-last kernel takes the variance as E[x^2] - E[x]^2.
        """
        x, weight, bias, scale, shift = inputs
        y = torch.group_norm(x.contiguous(), self.groups, weight, bias, 1e-5)
        if scale is not None and shift is not None:
            spread = (..., *[None] * (x.ndim - 2))
            y = y * (1 + scale[spread]) + shift[spread]
        if self.activation == "silu":
            y = F.silu(y)
        if self.resample == "up":
            y = F.interpolate(y, scale_factor=2, mode="nearest")
        if self.resample == "down":
            y = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim](y, 2)
        return y

    def ours(self, inputs: list[Tensor | None]) -> Tensor:
        """The op under test."""
        x, weight, bias, scale, shift = inputs
        return group_norm(
            x,
            weight,
            bias,
            groups=self.groups,
            scale=scale,
            shift=shift,
            activation=self.activation,
            resample=self.resample,
        )


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """The values of x in memory as `layout` says; a slice leaves gaps in every dimension."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = x.new_full([2 * size for size in x.shape], float("nan"))
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "channels_last_sliced":
        return (
            torch.cat([x, x.new_full(x.shape, float("nan"))], dim=1)
            .movedim(1, -1)
            .contiguous()[..., : x.shape[1]]
            .movedim(-1, 1)
        )
    return x.contiguous()


def differentiate(
    function: Callable[[list[Tensor | None]], Tensor], inputs: list[Tensor | None]
) -> dict[str, Tensor]:
    """The output and the gradient of every input, for a fixed gradient that arrives at the output."""
    output = function(inputs)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    output.backward(grad)
    gradients = {name: value.grad for name, value in zip(NAMES, inputs, strict=True) if value is not None}
    results = {"output": output.detach()}
    for name, gradient in gradients.items():
        assert gradient is not None, f"no gradient of {name}"
        results[name] = gradient
    return results


def converted(inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Leaves of another dtype with the same values."""
    return [None if value is None else value.detach().to(dtype).requires_grad_() for value in inputs]


def assert_exact(case: Case) -> None:
    """Compare output and gradients with float64; allowed is a small multiple of plain PyTorch's own error.

    For bfloat16 and float16, plain is float32 arithmetic on the same values whose results are rounded once.
    """
    inputs = case.inputs()
    actual = differentiate(case.ours, inputs)
    plain = differentiate(
        lambda narrow: case.plain([None if value is None else value.float() for value in narrow]).to(
            case.dtype
        ),
        [None if value is None else value.detach().requires_grad_() for value in inputs],
    )
    exact = differentiate(case.plain, converted(inputs, torch.float64))
    factor = FACTOR if case.dtype is torch.float32 else HALF_FACTOR
    for name, value in exact.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == plain[name].dtype, name
        ratio = excess(actual[name], plain[name], value, factor=factor)
        assert ratio <= 1, f"{case}: the error of {name} is {ratio:.2f} times what is allowed"
