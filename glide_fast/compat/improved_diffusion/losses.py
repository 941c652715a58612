"""Divergences and likelihoods of Gaussians; what improved-diffusion's module of this name offers."""

from glide_fast.compat.likelihoods import *  # noqa: F403
