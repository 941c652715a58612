"""GroupNorm, alone or at the head of a sequence in front of its SiLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glide_fast import ops
from glide_fast.accelerate.plan import (
    Noise,
    Plan,
    group_norm,
    is_function,
    is_group_norm,
    is_image,
    parts,
    types_of,
)


@dataclass(frozen=True, kw_only=True)
class NormPlan(Plan):
    """A GroupNorm, with the SiLU inside where its class computes one."""

    activation: ops.Activation

    @property
    def title(self) -> str:
        return "GroupNorm" if self.activation == "none" else "GroupNorm and SiLU in one pass"

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        channels = len(module.weight)
        return [(noise(2, channels, 5),), (noise(2, channels, 3, 4),)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return is_image(inputs[0])

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        return group_norm(module, inputs[0], activation=self.activation)


@dataclass(frozen=True, kw_only=True)
class HeadPlan(Plan):
    """``nn.Sequential`` that begins with a GroupNorm and its SiLU, as a model's output layers do."""

    @property
    def title(self) -> str:
        return "sequence: GroupNorm and SiLU in one pass"

    def inner(self, module: Any) -> tuple[nn.Module, ...]:
        return tuple(parts(module)[:2])

    def subject(self, module: nn.Module) -> nn.Module:
        return nn.Sequential(*parts(module)[:2])

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        channels = len(parts(module)[0].weight)  # type: ignore[arg-type]
        return [(noise(2, channels, 5),), (noise(2, channels, 3, 4),)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return is_image(inputs[0])

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        norm, _, *rest = parts(module)
        h = group_norm(norm, inputs[0])
        for layer in rest:
            h = layer(h)
        return h


def propose_norm(module: nn.Module) -> list[Plan]:
    """Plans for a module with a GroupNorm's attributes."""
    if not is_group_norm(module) or module._modules:
        return []
    return [NormPlan(activation="none"), NormPlan(activation="silu")]


def propose_head(module: nn.Module) -> list[Plan]:
    """Plans for a plain sequence whose first two parts are a GroupNorm and a function."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return []
    layers = parts(module)
    if len(layers) < 2 or not is_group_norm(layers[0]) or not is_function(layers[1]):
        return []
    return [HeadPlan(inner_types=types_of(layers[:2]))]
