"""Training losses of Gaussian diffusion, one number a picture.

Simple loss: DDPM (arXiv 2006.11239, equation 14). Variational bound in bits a dimension, and the hybrid of
both that learns the variance: Improved DDPM (arXiv 2102.09672, equation 16).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast import ops
from glide_fast.diffusion.process import GaussianDiffusion, Prediction
from glide_fast.diffusion.rules import ddpm_rule
from glide_fast.diffusion.schedule import TableName
from glide_fast.ops.dispatch import needs_gradient
from glide_fast.ops.reference_losses import bound_in_bits, discretized_gaussian_log_likelihood, normal_kl


class LossTerms(NamedTuple):
    """The loss to minimise and its two parts, each [B]; loss = mse + vlb."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor


def vlb_term(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    clip_denoised: bool = False,
) -> Tensor:
    """The term of the variational bound at steps t, [B] in bits a dimension (DDPM, equation 5).

    It is KL(q(x_(t-1) | x_t, x_0) || p) for t > 0 and the likelihood of the picture for t = 0.
    """
    guess = diffusion.predict(model_output, x_t, t, clip_denoised=clip_denoised)
    return vlb_of_prediction(diffusion, guess, x_start, x_t, t)


def vlb_of_prediction(
    diffusion: GaussianDiffusion, guess: Prediction, x_start: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """`vlb_term` of a prediction that is already made, [B] in bits a dimension."""
    truth = diffusion.q_posterior(x_start, x_t, t)
    divergence = normal_kl(truth.mean, truth.log_variance, guess.mean, guess.log_variance)
    likelihood = discretized_gaussian_log_likelihood(
        x_start, means=guess.mean, log_scales=0.5 * guess.log_variance
    )
    return bound_in_bits(t, divergence, likelihood)


def simple_loss(
    diffusion: GaussianDiffusion, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error [B] of the model's prediction: of the noise, of x_0 or of the posterior mean."""
    values, _ = diffusion.split(model_output, x_t)
    if diffusion.mean_type == "epsilon":
        target = noise
    elif diffusion.mean_type == "x_start":
        target = x_start
    else:
        target = diffusion.q_posterior(x_start, x_t, t).mean
    return F.mse_loss(values, target, reduction="none").flatten(1).mean(1)


def v_weight(diffusion: GaussianDiffusion, t: Tensor, *, largest: float = 20.0) -> Tensor:
    """The factor, at most `largest`, that turns the simple loss into that of v, float32 [B].

    It is 1 / alpha_bar where the noise is predicted and 1 / (1 - alpha_bar) where x_0 is. The simple loss of
    the noise hardly counts the noisiest steps, which decide what a picture shows; the loss of v =
    sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 weighs all alike (Salimans & Ho, arXiv 2202.00512, 4).

    Raises:
        ValueError: the model predicts the previous picture.
    """
    tables: dict[str, TableName] = {"epsilon": "alphas_cumprod", "x_start": "one_minus_alphas_cumprod"}
    if diffusion.mean_type not in tables:
        raise ValueError(f"no v weight for mean type {diffusion.mean_type!r}; known: {', '.join(tables)}")
    return (1 / diffusion.schedule.at(tables[diffusion.mean_type], t, t.float())).clamp(max=largest)


def hybrid_loss(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    mse_weight: Tensor | float = 1.0,
    vlb_weight: float | None = None,
) -> LossTerms:
    """Simple loss plus weighted variational bound, which teaches the variance (Improved DDPM, equation 16).

    model_output [B, 2C, H, W] is the model's answer to x_t = q_sample(x_start, t, noise) [B, C, H, W] at
    steps t [B]. The bound sees the mean's channels without gradient. Its weight is T / 1000 unless given: a
    thousandth of the bound summed over all T steps. `mse_weight` [B] multiplies the simple loss (`v_weight`).

    Raises:
        ValueError: the variance is not learned, or the output has the wrong shape.
    """
    if not diffusion.learns_variance:
        raise ValueError(
            f"the hybrid loss needs a learned variance but variance_type is {diffusion.variance_type!r}; "
            "use 'learned_range', or simple_loss"
        )
    diffusion.check_output(model_output, x_t)
    as_published = (diffusion.mean_type, diffusion.variance_type) == ("epsilon", "learned_range")
    if as_published and not needs_gradient((x_start, x_t, noise)):
        table = ddpm_rule(diffusion, clip=False, device=model_output.device).table
        mse, vlb = ops.hybrid_loss(model_output, x_start, x_t, noise, t, table)
    else:
        mean_values, variance_values = model_output.chunk(2, dim=1)
        frozen = torch.cat([mean_values.detach(), variance_values], dim=1)
        mse = simple_loss(diffusion, model_output, x_start, x_t, t, noise)
        vlb = vlb_term(diffusion, frozen, x_start, x_t, t)
    mse = _weighted(mse, mse_weight)
    vlb = _weighted(vlb, diffusion.steps / 1000.0 if vlb_weight is None else vlb_weight)
    return LossTerms(loss=mse + vlb, mse=mse, vlb=vlb)


def _weighted(losses: Tensor, weight: Tensor | float) -> Tensor:
    """Their product, which a weight of 1 needs no launch for."""
    return losses if isinstance(weight, int | float) and weight == 1 else losses * weight
