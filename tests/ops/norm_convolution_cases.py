"""Convolution cases: inputs, the formula in PyTorch's own functions, comparison of values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.parity import excess
from glide_fast.ops import Resample, norm_convolution
from tests.ops.group_norm_cases import Layout, laid_out

Inputs = dict[str, Tensor]
# Small layers have short sums, in which plain PyTorch makes hardly an error to compare with.
SMALL_FACTOR, SMALL_GRADIENT_FACTOR = 5.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of norm_convolution: x [B, C, *space] with ``skip`` more channels, ``out`` in the output."""

    shape: tuple[int, ...]
    out: int
    skip: int = 0
    groups: int | None = 4
    film: bool = False
    resample: Resample = "none"
    residual: bool = False
    halved: bool = False  # the residual
    bias: str = "shared"
    layout: Layout = "channels_last"
    kernel: int = 3

    def __str__(self) -> str:
        """The case's name in pytest's output."""
        parts = [
            "x".join(map(str, self.shape)),
            f"+{self.skip}",
            f"to{self.out}",
            f"g{self.groups}",
            self.bias,
        ]
        flags = [name for name in ("film", "residual", "halved") if getattr(self, name)]
        return "-".join([*parts, self.resample, self.layout, f"k{self.kernel}", *flags])

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """The op's tensors by name: leaves, the same values in every dtype."""
        generator = torch.Generator().manual_seed(sum(self.shape) + self.out)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, channels, *space = self.shape
        wide = channels + self.skip
        factor = {"none": 1.0, "up": 2.0, "down": 0.5}[self.resample]
        bound = (wide * self.kernel ** len(space)) ** -0.5
        values: Inputs = {
            "x": laid_out(2 * draw(*self.shape) + 0.5, self.layout),
            "weight": bound * draw(self.out, wide, *[self.kernel] * len(space)),
        }
        if self.bias != "none":
            values["bias"] = draw(*([batch] if self.bias == "each" else []), self.out)
        if self.skip:
            values["skip"] = laid_out(draw(batch, self.skip, *space), self.layout)
        if self.groups:
            values |= {"norm_weight": 1 + 0.3 * draw(wide), "norm_bias": 0.2 * draw(wide)}
        if self.film:
            values["scale"], values["shift"] = (0.3 * draw(batch, 2 * wide)).chunk(2, dim=1)
        if self.residual:
            factor = factor / 2 if self.halved else factor
            values["residual"] = draw(batch, self.out, *(int(size * factor) for size in space))
        return {name: value.to(dtype).detach().requires_grad_() for name, value in values.items()}

    def plain(self, inputs: Inputs) -> Tensor:
        """The formula in PyTorch's own functions, in the dtype of the inputs."""
        h = inputs["x"].contiguous()
        if self.skip:
            h = torch.cat([h, inputs["skip"].contiguous()], dim=1)
        spread = (..., *[None] * (h.ndim - 2))
        if self.groups:
            h = F.group_norm(h, self.groups, inputs["norm_weight"], inputs["norm_bias"])
            if self.film:
                h = h * (1 + inputs["scale"][spread]) + inputs["shift"][spread]
            h = F.silu(h)
        if self.resample == "up":
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        if self.resample == "down":
            h = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[h.ndim](h, 2)
        convolution: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[h.ndim]
        h = convolution(h, inputs["weight"], padding=self.kernel // 2)
        if self.bias != "none":
            bias = inputs["bias"]
            h = h + (bias if bias.ndim == 2 else bias[None])[spread]
        if self.halved:
            return h + F.interpolate(inputs["residual"], scale_factor=2, mode="nearest")
        return h + inputs["residual"] if self.residual else h

    def ours(self, inputs: Inputs) -> Tensor:
        """The op under test."""
        return norm_convolution(**inputs, groups=self.groups or 1, resample=self.resample)


def differentiate(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The output and the gradient of every input, for a fixed gradient that arrives at the output."""
    output = function(inputs)
    arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    gradients = torch.autograd.grad(output, list(inputs.values()), arriving)
    return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_exact(
    case: Case, *, factor: float = SMALL_FACTOR, gradient_factor: float = SMALL_GRADIENT_FACTOR
) -> None:
    """Compare output and gradients with float64; allowed is a small multiple of plain PyTorch's own error."""
    actual = differentiate(case.ours, case.inputs())
    with torch.no_grad():
        alone = case.ours(case.inputs())
    plain = differentiate(case.plain, case.inputs())
    exact = differentiate(case.plain, case.inputs(torch.float64))
    for name, value in exact.items():
        assert actual[name].shape == value.shape, name
        allowed = factor if name == "output" else gradient_factor
        ratio = excess(actual[name], plain[name], value, factor=allowed)
        assert ratio <= 1, f"{case}: the error of {name} is {ratio:.2f} times what is allowed"
    ratio = excess(alone, plain["output"], exact["output"], factor=factor)
    assert ratio <= 1, f"{case}: without gradients the error is {ratio:.2f} times what is allowed"
