"""What the suites compare: a network's answer, by us and as the original code computes it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.parity import NETWORK_FACTOR, require, worst_excess

Outputs: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A network that computes as the original code does, and its inputs.

    With ``gradient`` the answer is the gradient of the sum of its outputs by the first input.
    """

    module: nn.Module
    inputs: Outputs
    gradient: bool = False

    def call(self) -> Outputs:
        """The answer, by eager PyTorch."""
        return answer(self.module, self.inputs, gradient=self.gradient)

    def exact(self) -> Outputs:
        """The answer in float64."""
        inputs = tuple(each.double() if each.is_floating_point() else each for each in self.inputs)
        return answer(copy.deepcopy(self.module).double(), inputs, gradient=self.gradient)

    def flops(self) -> float:
        """FLOPs of its matrix products and convolutions, counted on tensors without memory."""
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
            inputs = tuple(mode.from_tensor(each) for each in self.inputs)
            answer(self.module, inputs, gradient=self.gradient, guard=torch.no_grad)
        return float(counter.get_total_flops())


def answer(
    module: Callable[..., Tensor | Outputs],
    inputs: Outputs,
    *,
    gradient: bool,
    guard: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
) -> Outputs:
    """Outputs of a network; or with ``gradient`` that of their sum by the first input (parameters frozen)."""
    if gradient:
        x = inputs[0].detach().clone().requires_grad_()
        output = module(x, *inputs[1:])
        outputs = (output,) if isinstance(output, Tensor) else output
        torch.stack([each.sum() for each in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        if x.grad is None:
            raise ValueError("the outputs do not depend on the first input; there is no gradient to compare")
        return (x.grad,)
    with guard():
        output = module(*inputs)
    return (output,) if isinstance(output, Tensor) else tuple(output)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One computation.

    ``plain`` is the original's own way; ``once`` the same without what does not change over the steps of a
    sampler (the text is encoded beforehand), which is what we and the exported peers compute, and whose work
    counts.
    """

    ours: Callable[[], Outputs]
    plain: Plain
    once: Plain | None = None
    factor: float = NETWORK_FACTOR

    @property
    def needed(self) -> Plain:
        """What has to be computed each time."""
        return self.once or self.plain

    @functools.cached_property
    def truth(self) -> tuple[Outputs, Outputs]:
        """The answers of plain PyTorch in float32, and in float64."""
        return self.needed.call(), self.needed.exact()

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs that have to be computed each time."""
        return self.needed.flops()

    @functools.cached_property
    def intensity(self) -> float:
        """FLOPs a byte of weights, inputs and outputs."""
        tensors = (*self.needed.module.parameters(), *self.needed.inputs, *self.truth[0])
        return self.flops / sum(each.numel() * each.element_size() for each in tensors)

    def gate(self, case: str, who: str, outputs: Outputs, *, factor: float | None = None) -> float:
        """The error of the outputs as a part of what is allowed, by the subject's factor unless given.

        Raises:
            ParityError: it is more than that.
        """
        return require(case, who, worst_excess(outputs, *self.truth, factor=factor or self.factor))
