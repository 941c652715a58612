"""The perceptron of a transformer block: two linear layers around GELU or QuickGELU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.accelerate.plan import Noise, Plan, is_function, parts, types_of
from glide_fast.models.branch import quick_gelu

_ACTIVATIONS: dict[ops.LinearActivation, Callable[[Tensor], Tensor]] = {
    "none": nn.Identity(),
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}


def affine(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,
    activation: ops.LinearActivation = "none",
) -> Tensor:
    """A linear layer and its activation [..., out], in one pass where no dtype has to change."""
    same = all(each is None or each.dtype is x.dtype for each in (weight, bias))
    if same and not torch.is_autocast_enabled(x.device.type):
        return ops.linear(x, weight, bias, activation=activation)
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


@dataclass(frozen=True, kw_only=True)
class PerceptronPlan(Plan):
    """A module whose only layers with weights are two linear ones."""

    activation: ops.LinearActivation

    @property
    def title(self) -> str:
        name = "GELU" if self.activation == "gelu" else "QuickGELU"
        return f"two linear layers, {name} in the first one's pass"

    def inner(self, module: Any) -> tuple[nn.Module, ...]:
        return tuple(parts(module))

    def products(self, module: Any) -> list[Tensor]:
        return [layer.weight for layer in _layers(module)]

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        return [(noise(3, 2, _layers(module)[0].in_features),)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return isinstance(inputs[0], Tensor) and inputs[0].is_floating_point() and inputs[0].ndim > 0

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        first, last = _layers(module)
        hidden = affine(inputs[0], first.weight, first.bias, self.activation)
        return affine(hidden, last.weight, last.bias)


def propose_perceptron(module: nn.Module) -> list[Plan]:
    """Plans for a module of two linear layers with a GELU between them, or called an MLP."""
    inside = parts(module)
    functions = [part for part in inside if not isinstance(part, nn.Linear)]
    if len(_layers(module)) != 2 or len(functions) > 1 or not all(is_function(part) for part in functions):
        return []
    name = type(functions[0] if functions else module).__name__.lower()
    if not any(hint in name for hint in ("gelu", "mlp")):
        return []
    activations: tuple[ops.LinearActivation, ...] = ("gelu", "quick_gelu")
    return [PerceptronPlan(activation=each, inner_types=types_of(inside)) for each in activations]


def _layers(module: nn.Module) -> list[Any]:
    return [part for part in parts(module) if type(part) is nn.Linear]
