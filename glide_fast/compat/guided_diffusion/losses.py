"""Divergences and likelihoods of Gaussians; what guided-diffusion's module of this name offers."""

from glide_fast.compat.likelihoods import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)

__all__ = ["approx_standard_normal_cdf", "discretized_gaussian_log_likelihood", "normal_kl"]
