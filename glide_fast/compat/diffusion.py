"""The diffusion object that the original projects share, on the equations of :mod:`glide_fast.diffusion`.

Methods call one another through ``self`` as the originals do, so that subclasses which override one of them
work here too. Every step draws noise for the whole batch, also where it is multiplied by zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from glide_fast.compat.diffusion_options import (
    MEAN_TYPES,
    VARIANCE_TYPES,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from glide_fast.compat.errors import RuleError
from glide_fast.diffusion import process, schedule
from glide_fast.diffusion.likelihood import bits_per_dim, prior_bits_per_dim
from glide_fast.diffusion.losses import hybrid_loss, simple_loss, vlb_of_prediction
from glide_fast.diffusion.process import DenoisedFunction, Prediction

Model: TypeAlias = Callable[..., Any]
Conditions: TypeAlias = dict[str, Any] | None
Outputs: TypeAlias = dict[str, Any]
Arguments = ParamSpec("Arguments")

TABLES: tuple[schedule.TableName, ...] = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def _pictures_of(
    progressive: Callable[Concatenate[Any, Arguments], Iterator[Outputs]],
) -> Callable[Concatenate[Any, Arguments], Tensor]:
    """The method that goes through all steps of another and returns the last pictures, [B, C, H, W]."""

    @functools.wraps(progressive)
    def loop(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        for out in getattr(self, progressive.__name__)(*args, **kwargs):
            sample: Tensor = out["sample"]
        return sample

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__doc__ = f"The pictures after the last step of :meth:`{progressive.__name__}`, [B, C, H, W]."
    return loop


class GaussianDiffusion:
    """A diffusion on ``betas`` [T]; every table is an attribute, float64 [T]."""

    betas: schedule.FloatTable
    alphas_cumprod: schedule.FloatTable
    alphas_cumprod_prev: schedule.FloatTable
    alphas_cumprod_next: schedule.FloatTable
    sqrt_alphas_cumprod: schedule.FloatTable
    sqrt_one_minus_alphas_cumprod: schedule.FloatTable
    log_one_minus_alphas_cumprod: schedule.FloatTable
    sqrt_recip_alphas_cumprod: schedule.FloatTable
    sqrt_recipm1_alphas_cumprod: schedule.FloatTable
    posterior_variance: schedule.FloatTable
    posterior_log_variance_clipped: schedule.FloatTable
    posterior_mean_coef1: schedule.FloatTable
    posterior_mean_coef2: schedule.FloatTable

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        self.num_timesteps = len(self.betas)
        steps = np.arange(self.num_timesteps)
        self.process = process.GaussianDiffusion(
            schedule=schedule.Schedule(
                betas=self.betas, timestep_map=steps, original_steps=self.num_timesteps
            ),
            mean_type=MEAN_TYPES[model_mean_type],
            variance_type=VARIANCE_TYPES[model_var_type],
            rescale_timesteps=rescale_timesteps,
        )
        for name in TABLES:
            setattr(self, name, getattr(self.process.schedule, name))

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return self.process.model_timesteps(t)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each [B, C, H, W]."""
        mean, variance, log_variance = self.process.q_mean_variance(x_start, t)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W]: the picture with ``noise``, drawn if not given."""
        return self.process.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_(t-1) | x_t, x_0), each [B, C, H, W]."""
        mean, variance, log_variance = self.process.q_posterior(x_start, x_t, t)
        return mean, variance.expand_as(x_t), log_variance.expand_as(x_t)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.process.predict_x_start_from_epsilon(x_t, t, eps)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return self.process.predict_x_start_from_previous(x_t, t, xprev)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return self.process.predict_epsilon_from_x_start(x_t, t, pred_xstart)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
    ) -> Outputs:
        """p(x_(t-1) | x_t): "mean", "variance", "log_variance", and "pred_xstart", each [B, C, H, W]."""
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        p = self.process.predict(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        return {
            "mean": p.mean,
            "variance": p.variance,
            "log_variance": p.log_variance,
            "pred_xstart": p.x_start,
        }

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Outputs, x: Tensor, t: Tensor, model_kwargs: Conditions = None
    ) -> Tensor:
        """The mean pushed along the gradient that ``cond_fn(x, timesteps)`` returns."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        mean: Tensor = p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()
        return mean

    def condition_score(
        self, cond_fn: Model, p_mean_var: Outputs, x: Tensor, t: Tensor, model_kwargs: Conditions = None
    ) -> Outputs:
        """The prediction with its noise pushed along the gradient; "pred_xstart" is not clipped again."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        pushed = self.process.push_along(_as_prediction(p_mean_var), x, t, gradient)
        return {**p_mean_var, "pred_xstart": pushed.x_start, "mean": pushed.mean}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Conditions = None,
    ) -> Outputs:
        """One ancestral step: "sample" x_(t-1) and "pred_xstart"."""
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        spread = _unless_last(t, x) * torch.exp(0.5 * out["log_variance"])
        return {"sample": out["mean"] + spread * noise, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Outputs]:
        """What :meth:`p_sample` returns, step by step."""
        options = _given(denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        step = partial(self.p_sample, model, clip_denoised=clip_denoised, **options)
        return self.steps_down(step, model, shape, noise, device, progress)

    p_sample_loop = _pictures_of(p_sample_loop_progressive)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Conditions = None,
        eta: float = 0.0,
    ) -> Outputs:
        """One DDIM step (arXiv 2010.02502, equation 12): "sample" x_(t-1) and "pred_xstart"."""
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        mean, sigma = self.process.ddim_step(out["pred_xstart"], eps, t, eta)
        noise = torch.randn_like(x)
        return {"sample": mean + _unless_last(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        model_kwargs: Conditions = None,
        eta: float = 0.0,
    ) -> Outputs:
        """One DDIM step towards the noise: "sample" x_(t+1) and "pred_xstart".

        Raises:
            RuleError: ``eta`` is not 0.
        """
        if eta != 0:
            raise RuleError(f"eta {eta} must be 0: only the deterministic path can be reversed")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        sample = self.process.ddim_step_to_noise(out["pred_xstart"], eps, t)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Conditions = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Outputs]:
        """What :meth:`ddim_sample` returns, step by step."""
        options = _given(denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs)
        step = partial(self.ddim_sample, model, clip_denoised=clip_denoised, eta=eta, **options)
        return self.steps_down(step, model, shape, noise, device, progress)

    ddim_sample_loop = _pictures_of(ddim_sample_loop_progressive)

    def steps_down(
        self,
        step: Callable[[Tensor, Tensor], Outputs],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[Outputs]:
        """What ``step(x, t)`` returns from the last step to step 0, without gradients."""
        if device is None:
            device = next(model.parameters()).device  # type: ignore[attr-defined]
        x = torch.randn(*shape, device=device) if noise is None else noise
        for index in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            t = torch.full((shape[0],), index, dtype=torch.int64, device=device)
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Conditions = None,
    ) -> Outputs:
        prediction = self._prediction(model, x_t, t, clip_denoised, model_kwargs)
        output = vlb_of_prediction(self.process, prediction, x_start, x_t, t)
        return {"output": output, "pred_xstart": prediction.x_start}

    def _prediction(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool, model_kwargs: Conditions
    ) -> Prediction:
        out = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return _as_prediction(out)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Conditions = None,
        noise: Tensor | None = None,
    ) -> Outputs:
        """ "loss" [B] at steps t [B], and its parts "mse" and "vb" [B] where it has them."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            terms = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
            steps = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": terms["output"] * steps}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if not self.process.learns_variance:
            mse = simple_loss(self.process, output, x_start, x_t, t, noise)
            return {"mse": mse, "loss": mse}
        weight = self.num_timesteps / 1000.0 if self.loss_type == LossType.RESCALED_MSE else 1.0
        loss = hybrid_loss(self.process, output, x_start, x_t, t, noise, vlb_weight=weight)
        return {"vb": loss.vlb, "mse": loss.mse, "loss": loss.loss}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        return prior_bits_per_dim(self.process, x_start)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Conditions = None
    ) -> Outputs:
        """The bound on the pictures' log-likelihood in bits a dimension.

        "total_bpd" and "prior_bpd" are [B]; "vb", "xstart_mse" and "mse" are [B, T], the last step first.
        """
        with torch.no_grad():
            bits = bits_per_dim(
                self.process,
                lambda x_t, t: self._prediction(model, x_t, t, clip_denoised, model_kwargs),
                x_start,
            )
        return {
            "total_bpd": bits.total,
            "prior_bpd": bits.prior,
            "vb": bits.vlb,
            "xstart_mse": bits.x_start_mse,
            "mse": bits.epsilon_mse,
        }


def _unless_last(t: Tensor, like: Tensor) -> Tensor:
    """1 where a step still adds noise, 0 at step 0: [B, 1, ...]."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _as_prediction(out: Outputs) -> Prediction:
    return Prediction(out["mean"], out["variance"], out["log_variance"], out["pred_xstart"])


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None: a step need not take those that nobody gives."""
    return {name: value for name, value in options.items() if value is not None}
