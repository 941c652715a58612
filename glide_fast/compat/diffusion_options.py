"""The words in which the original projects describe a diffusion: enums and named noise schedules."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glide_fast.diffusion import process, schedule


class ModelMeanType(enum.Enum):
    """What the model's first channels are."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of a step back comes from."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether it is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


MEAN_TYPES: dict[ModelMeanType, process.MeanType] = {
    ModelMeanType.PREVIOUS_X: "previous_x",
    ModelMeanType.START_X: "x_start",
    ModelMeanType.EPSILON: "epsilon",
}
VARIANCE_TYPES: dict[ModelVarType, process.VarianceType] = {
    ModelVarType.LEARNED: "learned",
    ModelVarType.FIXED_SMALL: "fixed_small",
    ModelVarType.FIXED_LARGE: "fixed_large",
    ModelVarType.LEARNED_RANGE: "learned_range",
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> schedule.FloatTable:
    """Betas [num_diffusion_timesteps], float64, of "linear" or "cosine".

    Raises:
        NotImplementedError: another name.
    """
    if schedule_name not in ("linear", "cosine"):
        raise NotImplementedError(f"unknown beta schedule: {schedule_name}; known: linear, cosine")
    return schedule.named_betas(schedule_name, num_diffusion_timesteps)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> schedule.FloatTable:
    """Betas whose products follow ``alpha_bar``, a function of one time in [0, 1]."""
    return schedule.betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=max_beta)


def _extract_into_tensor(
    arr: npt.NDArray[np.float64], timesteps: Tensor, broadcast_shape: Sequence[int]
) -> Tensor:
    """Values of a table at ``timesteps`` [B], float32, expanded to ``broadcast_shape`` [B, ...]."""
    values = torch.from_numpy(arr).to(timesteps.device)[timesteps].float()
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(*broadcast_shape)
