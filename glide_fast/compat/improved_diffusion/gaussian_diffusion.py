"""Diffusion objects; what improved-diffusion's module of this name offers, sampling without ``cond_fn``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glide_fast.compat import diffusion
from glide_fast.compat.diffusion import Conditions, Model, Outputs
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
from glide_fast.diffusion.process import DenoisedFunction

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


class GaussianDiffusion(diffusion.GaussianDiffusion):
    """The shared diffusion, whose sampling methods take ``model_kwargs`` where others take ``cond_fn``."""

    def p_sample(  # type: ignore[override]
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
    ) -> Outputs:
        """One ancestral step: "sample" x_(t-1) and "pred_xstart"."""
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs=model_kwargs)

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Pictures [B, C, H, W] of ``shape`` by ancestral sampling, from ``noise`` or a draw."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress
        )
        return diffusion.last_sample(steps)

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Outputs]:
        """What :meth:`p_sample` returns, step by step."""

        def step(x: Tensor, t: Tensor) -> Outputs:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)

        return self.steps_down(step, model, shape, noise, device, progress)

    def ddim_sample(  # type: ignore[override]
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        eta: float = 0.0,
    ) -> Outputs:
        """One DDIM step: "sample" x_(t-1) and "pred_xstart"."""
        return super().ddim_sample(
            model, x, t, clip_denoised, denoised_fn, model_kwargs=model_kwargs, eta=eta
        )

    def ddim_sample_loop(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Pictures [B, C, H, W] of ``shape`` by DDIM, from ``noise`` or a draw."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
        )
        return diffusion.last_sample(steps)

    def ddim_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Outputs]:
        """What :meth:`ddim_sample` returns, step by step."""

        def step(x: Tensor, t: Tensor) -> Outputs:
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)

        return self.steps_down(step, model, shape, noise, device, progress)
