"""Where a number stopped being finite: which step, which timesteps, which module or gradient first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glide_fast.training.distributed import own


class NonFiniteLossError(RuntimeError):
    """Training stopped because the loss or its gradient is not finite; the message says where it began."""


class Finding(NamedTuple):
    """The module where the first number that is not finite was met, if any, and what to tell a person."""

    module: str | None
    text: str
    is_cause: bool


Losses = Sequence[Callable[[], Tensor]]  # of a step's parts, each the number [] that is differentiated


def look_at_outputs(model: nn.Module, losses: Losses) -> Finding:
    """Compute the losses once more with the output of every module watched; look at the parameters too."""
    first: list[str] = []

    def look(name: str, output: Tensor) -> None:
        if not first and not torch.isfinite(output).all():
            first.append(name)

    with _watched(model, look), torch.no_grad():
        for loss in losses:
            loss()
    broken = _first_bad(model, (own(parameter) for parameter in model.parameters()))
    text = (
        f"the first module with a non-finite output is {first[0]}"
        if first
        else "every module's output is finite"
    )
    if broken is not None:
        text += f"; parameter {broken} is not finite itself"
    return Finding(first[0] if first else None, text, bool(first) or broken is not None)


def look_at_gradients(model: nn.Module, losses: Losses) -> Finding:
    """Differentiate the losses once more; of several processes, all must. No gradients are left.

    The module found is the one nearest to the loss whose output's gradient is not finite.
    """
    first: list[str] = []

    def look(name: str, output: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            if not first and not torch.isfinite(gradient).all():
                first.append(name)

        if output.requires_grad:
            output.register_hook(note)  # type: ignore[no-untyped-call]

    model.zero_grad(set_to_none=True)
    with _watched(model, look), torch.enable_grad():
        for loss in losses:
            torch.autograd.backward(loss())
    gradients = (torch.zeros(()) if each.grad is None else own(each.grad) for each in model.parameters())
    broken = _first_bad(model, gradients)
    model.zero_grad(set_to_none=True)
    text = "every module's output is finite"
    if first:
        text += f"; coming from the loss, the first module with a non-finite gradient is {first[0]}"
    if broken is not None:
        text += f"; the first parameter with a non-finite gradient is {broken}"
    return Finding(first[0] if first else None, text, bool(first) or broken is not None)


def _first_bad(model: nn.Module, tensors: Iterator[Tensor]) -> str | None:
    """The name of the first parameter whose tensor of ``tensors`` is not finite."""
    for (name, _), tensor in zip(model.named_parameters(), tensors, strict=True):
        if not torch.isfinite(tensor).all():
            return name
    return None


@contextmanager
def _watched(model: nn.Module, look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """``look`` is told of the output of every module without parts, by name."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                look(name, output)

        return hook

    hooks = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
