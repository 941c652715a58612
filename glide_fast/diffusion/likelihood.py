"""How well a model explains pictures: the variational bound in bits a dimension, over all steps.

DDPM (arXiv 2006.11239, equation 5); Improved DDPM (arXiv 2102.09672, section 3).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from glide_fast.diffusion.losses import vlb_of_prediction
from glide_fast.diffusion.process import GaussianDiffusion, Prediction
from glide_fast.ops.reference_losses import normal_kl


class BitsPerDim(NamedTuple):
    """The bound and its parts: `total` and `prior` [B], the others [B, T] with the last step first.

    total = prior + the sum of `vlb`; `x_start_mse` and `epsilon_mse` are the errors of the model's guesses.
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    x_start_mse: Tensor
    epsilon_mse: Tensor


def prior_bits_per_dim(diffusion: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)), [B] in bits a dimension: what is left of pictures [B, C, H, W] at the end.

    It depends on the schedule only, not on the model.
    """
    last = torch.full((x_start.shape[0],), diffusion.steps - 1, dtype=torch.int64, device=x_start.device)
    marginal = diffusion.q_mean_variance(x_start, last)
    divergence = normal_kl(marginal.mean, marginal.log_variance, 0.0, 0.0)
    return divergence.flatten(1).mean(1) / math.log(2.0)


def bits_per_dim(
    diffusion: GaussianDiffusion,
    predict: Callable[[Tensor, Tensor], Prediction],
    x_start: Tensor,
    *,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> BitsPerDim:
    """The bound on the negative log-likelihood of 8-bit pictures x_start [B, C, H, W] in [-1, 1].

    `predict(x_t, t)` is the model's step back from x_t [B, C, H, W] at steps t [B], for example

        lambda x_t, t: diffusion.predict(model(x_t, diffusion.model_timesteps(t)), x_t, t)

    It is called for every step, the last first, each with one draw of `noise`.
    """
    vlb, x_start_mse, epsilon_mse = [], [], []
    for step in range(diffusion.steps)[::-1]:
        t = torch.full((x_start.shape[0],), step, dtype=torch.int64, device=x_start.device)
        epsilon = noise(x_start)
        x_t = diffusion.q_sample(x_start, t, epsilon)
        guess = predict(x_t, t)
        vlb.append(vlb_of_prediction(diffusion, guess, x_start, x_t, t))
        x_start_mse.append(((guess.x_start - x_start) ** 2).flatten(1).mean(1))
        epsilon_guess = diffusion.predict_epsilon_from_x_start(x_t, t, guess.x_start)
        epsilon_mse.append(((epsilon_guess - epsilon) ** 2).flatten(1).mean(1))
    terms, prior = torch.stack(vlb, dim=1), prior_bits_per_dim(diffusion, x_start)
    return BitsPerDim(
        total=terms.sum(1) + prior,
        prior=prior,
        vlb=terms,
        x_start_mse=torch.stack(x_start_mse, dim=1),
        epsilon_mse=torch.stack(epsilon_mse, dim=1),
    )
