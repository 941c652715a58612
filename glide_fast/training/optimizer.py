"""The optimiser: torch's AdamW, and one that takes its whole step, average included, in one launch on a GPU.

Both have the same state, so that a run begun with one goes on with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.ops import StepNumbers
from glide_fast.training.config import OptimizerConfig
from glide_fast.training.distributed import own, whole
from glide_fast.training.ema import ExponentialMovingAverage

_NEVER_ZERO = 1e-6  # added to a norm that is divided by, as torch.nn.utils.clip_grad_norm_ does


class OneLaunchAdamW(torch.optim.AdamW):
    """AdamW by :func:`glide_fast.ops.adamw`; its state is that of ``torch.optim.AdamW(fused=True)``.

    Numbers of steps are kept on the CPU, where the bias corrections are computed from them.
    """

    def __init__(self, model: nn.Module, settings: OptimizerConfig) -> None:
        super().__init__(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; what ``closure`` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_and_average(None, 0.0)
        return loss

    @torch.no_grad()
    def step_and_average(
        self, ema: ExponentialMovingAverage | None, share: float, factor: Tensor | None = None
    ) -> None:
        """One step, after which the average of every parameter moves by ``share`` towards it.

        ``factor``, one number on the weights' device, multiplies the gradients; None for 1.
        """
        groups = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        averages = [None] * len(groups) if ema is None else list(ema.average.values())
        moved = [
            (group, parameter, average)
            for (group, parameter), average in zip(groups, averages, strict=True)
            if parameter.grad is not None
        ]
        still = [
            (average, parameter)
            for (_, parameter), average in zip(groups, averages, strict=True)
            if parameter.grad is None and average is not None
        ]
        states = [self._counted(parameter) for _, parameter, _ in moved]
        ops.adamw(
            [own(parameter) for _, parameter, _ in moved],
            [own(parameter.grad) for _, parameter, _ in moved],
            [own(state["exp_avg"]) for state in states],
            [own(state["exp_avg_sq"]) for state in states],
            [
                _numbers(group, float(state["step"]), share)
                for (group, *_), state in zip(moved, states, strict=True)
            ],
            average=[own(average) for *_, average in moved if average is not None],
            factor=None if factor is None else own(factor),
        )
        for average, parameter in still:
            average.lerp_(parameter, share)

    def _counted(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state, laid out like it, with this step counted."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = state["step"].cpu() + 1
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
        return state


def _numbers(group: dict[str, Any], step: float, share: float) -> StepNumbers:
    return StepNumbers.of(
        step,
        rate=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        decay=group["weight_decay"],
        share=share,
    )


def new_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW for a model where it is: in one launch on a GPU with such a kernel, else torch's fused one."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    rows = [row for row in ops.implementations() if (row.op, row.device) == ("adamw", "CUDA")]
    if on_gpu and rows[0].name == "Triton":
        return OneLaunchAdamW(model, settings)
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def clip_gradients(
    optimizer: torch.optim.Optimizer, model: nn.Module, limit: float, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The norm of all gradients, and the factor that :func:`update` has to clip it to ``limit`` with.

    The gradients are ``scale`` times as large as they are meant. The factor is None where they were
    multiplied by it themselves.
    """
    if not isinstance(optimizer, OneLaunchAdamW):
        if scale != 1:
            scaled = [own(each.grad) for each in model.parameters() if each.grad is not None]
            torch._foreach_mul_(scaled, 1 / scale)
        return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)), None
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / scale
    return norm, (limit / (norm + _NEVER_ZERO)).clamp(max=1) / scale


def update(
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage,
    model: nn.Module,
    step: int,
    factor: Tensor | None = None,
) -> None:
    """Optimiser step number ``step`` (from 0), and the average after it."""
    if isinstance(optimizer, OneLaunchAdamW):
        optimizer.step_and_average(ema, ema.share(step), factor)
        return
    optimizer.step()
    ema.update(model, step)
