"""The definitions of the ops of losses: see :mod:`glide_fast.ops.reference`.

Shapes: B batch, C channels, T timesteps. DDPM is arXiv 2006.11239, Improved DDPM arXiv 2102.09672.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_GAIN, _CUBE = math.sqrt(2.0 / math.pi), 0.044715  # of the tanh
_OUTERMOST = 0.999  # pictures beyond it are in the outer bins
_LEAST = 1e-12  # probability


def normal_kl(
    mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor | float, log_variance2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, element by element."""
    first = torch.as_tensor(log_variance1, dtype=mean1.dtype, device=mean1.device)
    second = torch.as_tensor(log_variance2, dtype=mean1.dtype, device=mean1.device)
    distance = (mean1 - mean2) ** 2 * torch.exp(-second)
    return 0.5 * (-1.0 + second - first + torch.exp(first - second) + distance)


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """The cumulative distribution of the standard normal, by a tanh (largest error 3e-4)."""
    return 0.5 * (1.0 + torch.tanh(_GAIN * (x + _CUBE * x**3)))


def _density(x: Tensor) -> Tensor:
    """The derivative of `approximate_normal_cdf`."""
    return 0.5 * _GAIN * (1 + 3 * _CUBE * x**2) * (1 - torch.tanh(_GAIN * (x + _CUBE * x**3)) ** 2)


def _bins(x: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ends of the bins of pictures x, in standard deviations, and the bins' probabilities."""
    centered = x - means
    inverse_scale = torch.exp(-log_scales)
    ends = inverse_scale * (centered + 1.0 / 255.0), inverse_scale * (centered - 1.0 / 255.0)
    upper, lower = map(approximate_normal_cdf, ends)
    brightest_or_between = torch.where(x > _OUTERMOST, 1.0 - lower, upper - lower)
    return *ends, torch.where(x < -_OUTERMOST, upper, brightest_or_between)


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability (nats, shape of x) of 8-bit pictures x in [-1, 1] under a Gaussian cut into 256 bins.

    `log_scales` are logarithms of standard deviations. The outer bins reach to infinity (DDPM, equation 13).
    """
    return torch.log(_bins(x, means, log_scales)[2].clamp(min=_LEAST))


def _slope_by_log_scales(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """The derivative of `discretized_gaussian_log_likelihood` by the logarithms of the deviations."""
    upper, lower, probability = _bins(x, means, log_scales)
    lost = torch.where(x > _OUTERMOST, 0.0, upper * _density(upper))
    lost = lost - torch.where(x < -_OUTERMOST, 0.0, lower * _density(lower))
    return torch.where(probability < _LEAST, 0.0, -lost / probability)


def bound_in_bits(t: Tensor, divergence: Tensor, likelihood: Tensor) -> Tensor:
    """The bound's term [B] in bits a dimension, from nats an element: the likelihood where t is 0."""
    nats = torch.where(t == 0, -likelihood.flatten(1).mean(1), divergence.flatten(1).mean(1))
    return nats / math.log(2.0)


class _Terms(NamedTuple):
    """What both losses are made of; the log-variance of the posterior is the lower of the two."""

    told: Tensor
    truth: Tensor
    mean: Tensor
    log_variance: Tensor
    low: Tensor
    high: Tensor


def _terms(output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, table: Tensor) -> _Terms:
    told, variance = output.to(x_t.dtype).chunk(2, dim=1)
    guess_x, guess_output, mean_start, mean_direction, _, _, low, high = (
        column.view(-1, *[1] * (x_t.ndim - 1)) for column in table[t].unbind(1)
    )
    guess = guess_x * x_t + guess_output * told.detach()
    share = (variance + 1) / 2  # the v of Improved DDPM, equation 15
    return _Terms(
        told=told,
        truth=mean_start * x_start + mean_direction * x_t,
        mean=mean_start * guess + mean_direction * x_t,
        log_variance=share * high + (1 - share) * low,
        low=low,
        high=high,
    )


def hybrid_loss(
    output: Tensor,  # [B, 2C, *space]
    x_start: Tensor,  # [B, C, *space]
    x_t: Tensor,  # [B, C, *space]
    noise: Tensor,  # [B, C, *space]
    t: Tensor,  # [B]
    table: Tensor,  # [T, 8]
) -> tuple[Tensor, Tensor]:
    """The simple loss and the bound's term, both [B]: see :mod:`..ops.hybrid_loss`.

    Autograd finds its gradient too: the bound does not see where the mean comes from.
    """
    told, truth, mean, log_variance, low, _ = _terms(output, x_start, x_t, t, table)
    mse = F.mse_loss(told, noise, reduction="none").flatten(1).mean(1)
    divergence = normal_kl(truth, low, mean, log_variance)
    likelihood = discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
    return mse, bound_in_bits(t, divergence, likelihood)


def hybrid_loss_backward(
    grad_mse: Tensor,  # [B]
    grad_vlb: Tensor,  # [B]
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    table: Tensor,
) -> Tensor:
    """The gradient of the output, laid out like it."""
    told, truth, mean, log_variance, low, high = _terms(output, x_start, x_t, t, table)
    distance = (truth - mean) ** 2 * torch.exp(-log_variance)
    of_divergence = 0.5 * (1.0 - torch.exp(low - log_variance) - distance)
    of_likelihood = 0.5 * _slope_by_log_scales(x_start, means=mean, log_scales=0.5 * log_variance)
    slope = torch.where((t == 0).view(low.shape), -of_likelihood, of_divergence) * (high - low) / 2
    elements = math.prod(x_t.shape[1:])
    grads = (
        2 * (told - noise) * (grad_mse / elements).view(low.shape),
        slope * (grad_vlb / (elements * math.log(2.0))).view(low.shape),
    )
    return torch.empty_like(output).copy_(torch.cat(grads, dim=1))
