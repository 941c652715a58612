"""Diffusion objects; what guided-diffusion's module of this name offers."""

from glide_fast.compat.diffusion import GaussianDiffusion
from glide_fast.compat.diffusion_options import (
    LossType,
    ModelMeanType,
    ModelVarType,
    _extract_into_tensor,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from glide_fast.compat.layers import mean_flat
from glide_fast.compat.likelihoods import discretized_gaussian_log_likelihood, normal_kl

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "_extract_into_tensor",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]
