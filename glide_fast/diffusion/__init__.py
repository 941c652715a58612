"""The equations: noise schedules, the diffusion process, its losses, and the steps that training draws."""

from glide_fast.diffusion.losses import LossTerms, hybrid_loss, simple_loss, v_weight, vlb_term
from glide_fast.diffusion.process import GaussianDiffusion, Prediction
from glide_fast.diffusion.schedule import Schedule, named_betas, space_timesteps
from glide_fast.diffusion.timesteps import (
    LossSecondMomentTimesteps,
    NoisyTimesteps,
    TimestepSampler,
    UniformTimesteps,
    timestep_sampler,
)

__all__ = [
    "GaussianDiffusion",
    "LossSecondMomentTimesteps",
    "LossTerms",
    "NoisyTimesteps",
    "Prediction",
    "Schedule",
    "TimestepSampler",
    "UniformTimesteps",
    "hybrid_loss",
    "named_betas",
    "simple_loss",
    "space_timesteps",
    "timestep_sampler",
    "v_weight",
    "vlb_term",
]
