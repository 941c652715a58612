"""A case of one op: a computation done by us and by a peer, and its parity gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.parity import FACTOR, require, worst_excess
from bench.place import Place

Function = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation, done by us and by a peer.

    `inputs` makes the float32 inputs; with `backward` all of them get gradients. `layout` gives ours the same
    values in other strides. `work` is what one call moves or computes at least, in `unit` without its giga;
    `intensity` its FLOPs a byte.
    """

    name: str
    ours: Function
    peer: Function
    inputs: Callable[[], tuple[Tensor, ...]]
    work: float
    unit: str
    intensity: float
    backward: bool = False
    layout: Callable[[Tensor], Tensor] = torch.clone

    def leaves(self, place: Place, dtype: torch.dtype, layout: Function = torch.clone) -> list[Tensor]:
        """New inputs at the place, in a dtype."""
        tensors = (layout(place.put(tensor).to(dtype)) for tensor in self.inputs())
        return [tensor.detach().requires_grad_(self.backward) for tensor in tensors]

    def call(self, function: Function, inputs: list[Tensor]) -> list[Tensor]:
        """The output; with `backward` also every input's gradient of half the output's squared norm."""
        if not self.backward:
            with torch.no_grad():
                return [function(*inputs)]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, output.detach())]


def gate(case: Case, place: Place) -> float:
    """The largest error of ours against the peer's formula in float64, as a part of what is allowed.

    Raises:
        ParityError: the part is above 1.
    """
    exact = case.call(case.peer, case.leaves(place, torch.float64))
    peer = case.call(case.peer, case.leaves(place, place.dtype))
    ours = case.call(case.ours, case.leaves(place, place.dtype, case.layout))
    return require(case.name, "ours", worst_excess(ours, peer, exact, factor=FACTOR))
