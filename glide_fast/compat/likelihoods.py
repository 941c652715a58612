"""Divergences and likelihoods of Gaussians, as guided- and improved-diffusion's ``losses`` offer them."""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops import reference_losses
from glide_fast.ops.reference_losses import approximate_normal_cdf as approx_standard_normal_cdf
from glide_fast.ops.reference_losses import discretized_gaussian_log_likelihood

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats; numbers broadcast to the tensors.

    Raises:
        ValueError: none of the four is a tensor.
    """
    tensors = [each for each in (mean1, logvar1, mean2, logvar2) if isinstance(each, Tensor)]
    if not tensors:
        raise ValueError("normal_kl has no tensor among its arguments; make at least one a tensor")
    mean = torch.as_tensor(mean1, dtype=tensors[0].dtype, device=tensors[0].device)
    return reference_losses.normal_kl(mean, logvar1, mean2, logvar2)
