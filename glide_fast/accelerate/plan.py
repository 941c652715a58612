"""What is replaced in a foreign module: one method, proposed by structure and proven before it is used."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from glide_fast import ops

ORIGINAL = "_glide_fast_original"  # where a served class keeps the class it was made from
Noise = Callable[..., Tensor]  # (*shape) -> normal values of that shape


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """How one kind of module is served.

    ``method`` is what is replaced, ``inner_types`` are the classes of the submodules that are passed over
    then: where one of them is exchanged or watched by a hook later, the module's own method runs again. Plans
    are compared by value; they hold nothing of the module they were made for.
    """

    method: str = "forward"
    inner_types: tuple[type[nn.Module], ...] = ()

    @property
    @abstractmethod
    def title(self) -> str:
        """What is served, for the report."""

    @property
    def arity(self) -> int:
        """How many inputs the method has to take."""
        return 1

    def inner(self, module: Any) -> tuple[nn.Module, ...]:  # noqa: ARG002 (most plans pass nothing over)
        """The submodules whose own ``forward`` is not called."""
        return ()

    def products(self, module: Any) -> list[Tensor]:  # noqa: ARG002 (most plans have no such weights)
        """The weights that our ops multiply by."""
        return []

    def subject(self, module: nn.Module) -> nn.Module:
        """What the proof is made on: the module, or the part of it that the plan concerns."""
        return module

    def watching(self, inner_types: tuple[type[nn.Module], ...]) -> Plan:
        """The same plan for a module whose skipped parts are of these classes."""
        return replace(self, inner_types=inner_types)

    @abstractmethod
    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        """Small random inputs for the proof, each a call of ``forward``."""

    @abstractmethod
    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether this call is one that was proven; others go to the module's own method."""

    @abstractmethod
    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        """What the method returns."""


def types_of(modules: Sequence[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of some modules in order, without what serving adds to them."""
    return tuple(getattr(type(module), ORIGINAL, type(module)) for module in modules)


def parts(container: Any) -> list[nn.Module]:
    """The direct submodules in order, repeated ones too."""
    return list(container._modules.values())


def is_function(module: nn.Module) -> bool:
    """Whether the module has no state and no parts: an activation, say."""
    return not (module._parameters or module._buffers or module._modules)


def is_group_norm(module: Any) -> bool:
    """Whether the module has what a GroupNorm has: groups, epsilon, weight and bias."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        isinstance(getattr(module, "num_groups", None), int)
        and isinstance(getattr(module, "eps", None), float)
        and isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.ndim == 1
        and weight.shape == bias.shape
    )


def is_image(x: Any) -> bool:
    """Whether x is a tensor that the op ``group_norm`` reads: [B, C, *space], space of 1-3 dimensions."""
    return isinstance(x, Tensor) and x.ndim in (3, 4, 5) and x.is_floating_point()


def group_norm(
    norm: Any,
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: ops.Activation = "silu",
    resample: ops.Resample = "none",
) -> Tensor:
    """The op on the parameters that ``norm`` has now."""
    return ops.group_norm(
        x,
        norm.weight,
        norm.bias,
        groups=norm.num_groups,
        eps=norm.eps,
        scale=scale,
        shift=shift,
        activation=activation,
        resample=resample,
    )


def takes(method: Any) -> int | None:
    """How many inputs a method takes beside ``self``; None where that is not a fixed number."""
    try:
        parameters = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    named = all(each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for each in parameters)
    return len(parameters) if named else None
