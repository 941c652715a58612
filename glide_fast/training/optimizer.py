"""The optimiser: torch's AdamW, and one that takes its whole step, average included, in one launch on a GPU.

Both have the same state, so that a run begun with one goes on with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.ops import StepNumbers, reference_elements
from glide_fast.training.config import OptimizerConfig
from glide_fast.training.distributed import own, whole
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.working_weights import WorkingWeights, widen_gradients


@dataclass(frozen=True, kw_only=True)
class _Moving:
    """The tensors of a launch: parameters whose gradients are alike, all of them with copies or none."""

    groups: list[dict[str, Any]]  # of each parameter
    owners: list[Tensor]  # of the gradients
    parameters: list[Tensor]
    steps: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    average: list[Tensor]
    copies: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The tensors of a step, found once for all steps that have such gradients for the same parameters."""

    key: tuple[object, ...]
    launches: list[_Moving]
    still: list[tuple[Tensor, Tensor]]  # averages and parameters without gradients


class OneLaunchAdamW(torch.optim.AdamW):
    """AdamW by :func:`glide_fast.ops.adamw`; its state is that of ``torch.optim.AdamW(fused=True)``.

    Numbers of steps are kept on the CPU, where the bias corrections are computed from them. Weights that have
    16-bit copies take a launch of their own.
    """

    def __init__(self, model: nn.Module, settings: OptimizerConfig) -> None:
        self._found: _Step | None = None
        super().__init__(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of any AdamW."""
        super().load_state_dict(state_dict)
        self._found = None

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
        self,
        ema: ExponentialMovingAverage | None,
        share: float,
        factor: Tensor | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """One step, after which the average of every parameter moves by ``share`` towards it.

        ``factor``, one number on the weights' device, multiplies the gradients; None for 1. ``copies`` of
        parameters get the new weights.
        """
        copies = {} if copies is None else copies
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        kinds = [None if each.grad is None else (each.grad.dtype, each in copies) for each in every]
        key = (id(ema), *(id(copy) for copy in copies.values()), *kinds)
        if self._found is None or self._found.key != key:
            self._found = self._find(kinds, ema, copies, key)
        for moving in self._found.launches:
            torch._foreach_add_(moving.steps, 1)
            ops.adamw(
                moving.parameters,
                [own(each.grad) for each in moving.owners if each.grad is not None],
                moving.first,
                moving.second,
                _numbers(moving, share),
                average=moving.average,
                copies=moving.copies,
                factor=None if factor is None else own(factor),
            )
        for average, parameter in self._found.still:
            average.lerp_(parameter, share)

    def _find(
        self,
        kinds: list[tuple[torch.dtype, bool] | None],
        ema: ExponentialMovingAverage | None,
        copies: Mapping[Tensor, Tensor],
        key: tuple[object, ...],
    ) -> _Step:
        groups = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        averages = [None] * len(groups) if ema is None else list(ema.average.values())
        rows = [(*pair, average) for pair, average in zip(groups, averages, strict=True)]
        launches = [
            self._moving([row for row, each in zip(rows, kinds, strict=True) if each == kind], copies)
            for kind in dict.fromkeys(kinds)
            if kind is not None
        ]
        still = [
            (average, parameter)
            for _, parameter, average in rows
            if parameter.grad is None and average is not None
        ]
        return _Step(key=key, launches=launches, still=still)

    def _moving(
        self, rows: list[tuple[dict[str, Any], Tensor, Tensor | None]], copies: Mapping[Tensor, Tensor]
    ) -> _Moving:
        states = [self._state(parameter) for _, parameter, _ in rows]
        return _Moving(
            groups=[group for group, *_ in rows],
            owners=[parameter for _, parameter, _ in rows],
            parameters=[own(parameter) for _, parameter, _ in rows],
            steps=[state["step"] for state in states],
            first=[own(state["exp_avg"]) for state in states],
            second=[own(state["exp_avg_sq"]) for state in states],
            average=[own(average) for *_, average in rows if average is not None],
            copies=[copies[parameter] for _, parameter, _ in rows if parameter in copies],
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state, made if it is not there; moments laid out like it, steps on the CPU."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] = state["step"].cpu()
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
        return state


def _numbers(moving: _Moving, share: float) -> list[StepNumbers]:
    """Those of each tensor; parameters that have learned for as long share them."""
    counts = torch.stack(moving.steps).tolist()
    made: dict[tuple[int, float], StepNumbers] = {}
    for group, count in zip(moving.groups, counts, strict=True):
        if (id(group), count) not in made:
            made[id(group), count] = StepNumbers.of(
                count,
                rate=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                decay=group["weight_decay"],
                share=share,
            )
    return [made[id(group), count] for group, count in zip(moving.groups, counts, strict=True)]


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
    parameters = [each for each in model.parameters() if each.grad is not None]
    if not isinstance(optimizer, OneLaunchAdamW):
        widen_gradients(parameters)
        if scale != 1:
            scaled = [own(each.grad) for each in parameters if each.grad is not None]
            torch._foreach_mul_(scaled, 1 / scale)
        return whole(torch.nn.utils.clip_grad_norm_(parameters, limit)), None
    gradients = [each.grad for each in parameters if each.grad is not None]
    if any(own(each) is not each for each in gradients):  # shards, whose sums PyTorch gathers
        return reference_elements.clip_factor(whole(reference_elements.norm_of(gradients)), limit, scale)
    return ops.gradient_norm(gradients, limit, scale=scale)


def update(
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage,
    model: nn.Module,
    step: int,
    factor: Tensor | None = None,
    working: WorkingWeights | None = None,
) -> None:
    """Optimiser step number ``step`` (from 0), and the average after it."""
    if isinstance(optimizer, OneLaunchAdamW):
        copies = None if working is None else working.copies
        optimizer.step_and_average(ema, ema.share(step), factor, copies)
        if working is not None:
            working.written()
        return
    optimizer.step()
    torch.autograd.graph.increment_version(list(model.parameters()))  # torch's fused AdamW does not
    ema.update(model, step)
