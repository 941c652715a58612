"""Diffusion objects; what improved-diffusion's module of this name offers, sampling without ``cond_fn``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from glide_fast.compat import diffusion
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


def unguided(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method without its argument ``cond_fn``."""
    whole = inspect.signature(method)
    kept = [parameter for name, parameter in whole.parameters.items() if name != "cond_fn"]
    signature = whole.replace(parameters=kept)

    @functools.wraps(method)
    def without(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        return method(arguments.pop("self"), **arguments)

    without.__signature__ = signature  # type: ignore[attr-defined]
    return without


class GaussianDiffusion(diffusion.GaussianDiffusion):
    """The shared diffusion, whose sampling methods take ``model_kwargs`` where others take ``cond_fn``."""

    p_sample = unguided(diffusion.GaussianDiffusion.p_sample)
    p_sample_loop = unguided(diffusion.GaussianDiffusion.p_sample_loop)
    p_sample_loop_progressive = unguided(diffusion.GaussianDiffusion.p_sample_loop_progressive)
    ddim_sample = unguided(diffusion.GaussianDiffusion.ddim_sample)
    ddim_sample_loop = unguided(diffusion.GaussianDiffusion.ddim_sample_loop)
    ddim_sample_loop_progressive = unguided(diffusion.GaussianDiffusion.ddim_sample_loop_progressive)
