"""Where a number stopped being finite: which step, which timesteps, which module first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glide_fast.training.distributed import own


class NonFiniteLossError(RuntimeError):
    """Training stopped because the loss is not finite; the message says where it began."""


class Explanation(NamedTuple):
    """The first module with a non-finite output, if any, and what to tell a person."""

    module: str | None
    text: str


def explain_non_finite(
    model: nn.Module, evaluate: Callable[[], Tensor], step: int, timesteps: Tensor
) -> Explanation:
    """Run ``evaluate`` once more with every module watched, and say what went wrong first."""
    first: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, first))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.no_grad():
            evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    broken = [
        name for name, parameter in model.named_parameters() if not torch.isfinite(own(parameter)).all()
    ]
    where = (
        f"the first module with a non-finite output is {first[0]}"
        if first
        else "every module's output is finite"
    )
    if broken:
        where += f"; parameter {broken[0]} is not finite itself"
    seen = f"{int(timesteps.min())} .. {int(timesteps.max())}"
    text = f"the loss or its gradient is not finite at step {step}, timesteps {seen}: {where}"
    return Explanation(first[0] if first else None, text)


def _watch(name: str, first: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not torch.isfinite(output).all():
            first.append(name)

    return hook
