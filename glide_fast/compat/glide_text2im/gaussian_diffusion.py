"""GLIDE's diffusion (noise predicted, variances learned); what glide-text2im's module of this name offers."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

from glide_fast.compat import diffusion
from glide_fast.compat.diffusion import Model, Outputs
from glide_fast.compat.diffusion_options import (
    LossType,
    ModelMeanType,
    ModelVarType,
    _extract_into_tensor,
    betas_for_alpha_bar,
)
from glide_fast.diffusion import schedule

__all__ = [
    "GaussianDiffusion",
    "_extract_into_tensor",
    "betas_for_alpha_bar",
    "get_beta_schedule",
    "get_named_beta_schedule",
]


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> schedule.FloatTable:
    """Betas [num_diffusion_timesteps], float64, of the older schedules ("quad", "linear", "warmup10" ...).

    Raises:
        NotImplementedError: another name.
    """
    if beta_schedule not in schedule.BETA_RAMPS:
        raise NotImplementedError(f"{beta_schedule}; known: {', '.join(schedule.BETA_RAMPS)}")
    return schedule.beta_ramp(beta_schedule, num_diffusion_timesteps, start=beta_start, end=beta_end)


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> schedule.FloatTable:
    """Betas [num_diffusion_timesteps], float64, of "linear" or "squaredcos_cap_v2".

    Raises:
        NotImplementedError: another name.
    """
    if schedule_name not in ("linear", "squaredcos_cap_v2"):
        raise NotImplementedError(f"unknown beta schedule: {schedule_name}; known: linear, squaredcos_cap_v2")
    return schedule.named_betas(schedule_name, num_diffusion_timesteps)


class GaussianDiffusion(diffusion.GaussianDiffusion):
    """A diffusion on ``betas`` [T], whose models predict noise and a variance between its bounds."""

    def __init__(self, *, betas: npt.ArrayLike) -> None:
        super().__init__(
            betas=betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.LEARNED_RANGE,
            loss_type=LossType.MSE,
        )

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> Outputs:
        """As the shared diffusion's; of a model's pair the second is handed through as "extra"."""
        extra = None

        def first(*inputs: Tensor, **conditions: Any) -> Tensor:
            nonlocal extra
            output = model(*inputs, **conditions)
            if isinstance(output, tuple):
                output, extra = output
            return output  # type: ignore[no-any-return]

        return {**super().p_mean_variance(first, *args, **kwargs), "extra": extra}
