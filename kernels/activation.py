"""GELU and QuickGELU behind a linear layer, and their gradients, one launch each.

    GELU: x times the normal distribution function      QuickGELU: x sigmoid(1.702 x)

cuBLAS adds the bias as it writes its product; the activation then reads and writes it once. All arithmetic is
float32. Bytes in 16 bits: 4 an element forward, 6 backward; memory is what limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glide_fast.kernels import configurations
from glide_fast.kernels.compilation import Case
from glide_fast.kernels.configurations import Configuration
from glide_fast.kernels.plan import Launch
from glide_fast.ops import dispatch, reference

GELU: Any = tl.constexpr(reference.ACTIVATION_GELU)
SLOPE: Any = tl.constexpr(reference.QUICK_GELU_SLOPE)
HALF_ROOT: Any = tl.constexpr(math.sqrt(0.5))
DENSITY: Any = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def activation_kernel(x, y, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    if KIND == GELU:
        values *= 0.5 * (1.0 + tl.erf(values * HALF_ROOT))
    else:
        values *= tl.sigmoid(values * SLOPE)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=at < elements)


@triton.jit
def activation_backward_kernel(grad, x, dx, elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """dx = grad times the activation's slope at x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    arriving = tl.load(grad + at, mask=at < elements, other=0.0).to(tl.float32)
    if KIND == GELU:
        density = tl.exp(-0.5 * values * values) * DENSITY
        slope = 0.5 * (1.0 + tl.erf(values * HALF_ROOT)) + values * density
    else:
        sigmoid = tl.sigmoid(values * SLOPE)
        slope = sigmoid * (1.0 + values * SLOPE * (1.0 - sigmoid))
    tl.store(dx + at, (arriving * slope).to(dx.dtype.element_ty), mask=at < elements)


def activation(x: Tensor, kind: int) -> Tensor:
    """The op `activation`; float64 goes to the default."""
    if x.dtype is torch.float64:
        result: Tensor = dispatch.default("activation")(x, kind)
        return result
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        tensors = {"x": x.contiguous(), "y": y}
        configurations.run(
            "activation",
            x.device,
            8 * x.element_size(),
            0,
            lambda each: _launch(activation_kernel, tensors, kind, each).start(),
        )
    return y


def activation_backward(grad: Tensor, x: Tensor, kind: int) -> Tensor:
    """The op `activation_backward`; float64 goes to the default."""
    if x.dtype is torch.float64:
        result: Tensor = dispatch.default("activation_backward")(grad, x, kind)
        return result
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        tensors = {"grad": grad.contiguous(), "x": x.contiguous(), "dx": dx}
        configurations.run(
            "activation",
            x.device,
            8 * x.element_size(),
            0,
            lambda each: _launch(activation_backward_kernel, tensors, kind, each).start(),
        )
    return dx


def _launch(kernel: Any, tensors: dict[str, Tensor], kind: int, configuration: Configuration) -> Launch:
    elements, block = tensors["x"].numel(), configuration.rows * configuration.columns
    arguments = {**tensors, "elements": elements, "KIND": kind, "BLOCK": block}
    return Launch(kernel, triton.cdiv(elements, block), arguments, configuration)


def cases(target: str) -> Iterator[Case]:
    """What is compiled to be measured: CLIP's hidden layer, in 16 bits."""
    x = torch.empty(154, 3072, dtype=torch.float16, device="meta")
    configuration = configurations.choose("activation", target, 16)
    for kind, name in ((reference.ACTIVATION_GELU, "gelu"), (reference.ACTIVATION_QUICK_GELU, "quick_gelu")):
        forward = _launch(activation_kernel, {"x": x, "y": x}, kind, configuration)
        yield forward.case(f"activation {name}")
        tensors = {"grad": x, "x": x, "dx": x}
        yield _launch(activation_backward_kernel, tensors, kind, configuration).case(
            f"activation {name} backward"
        )
