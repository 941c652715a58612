"""The training loop, annealed before each step; what improved-diffusion's module of this name offers."""

from __future__ import annotations

from torch import Tensor

from glide_fast.compat import training
from glide_fast.compat.half import INITIAL_LOG_LOSS_SCALE, SingleGroupTrainer
from glide_fast.compat.training import (
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    parse_resume_step_from_filename,
)

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "TrainLoop",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]


class TrainLoop(training.TrainLoop):
    """The shared loop, whose master weights in half precision are one flat vector."""

    anneals_first = True
    trainer = SingleGroupTrainer

    @property
    def model_params(self) -> list[Tensor]:
        """The model's parameters."""
        return list(self.mp_trainer.model_params)

    @property
    def master_params(self) -> list[Tensor]:
        """What the optimiser steps: the model's parameters, or their flat float32 copy."""
        return list(self.mp_trainer.master_params)

    @property
    def lg_loss_scale(self) -> float:
        """The loss scale's logarithm to base 2."""
        return self.mp_trainer.lg_loss_scale
