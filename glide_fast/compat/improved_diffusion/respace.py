"""Diffusions that skip steps; what improved-diffusion's module of this name offers."""

from glide_fast.compat import respacing
from glide_fast.compat.improved_diffusion.gaussian_diffusion import GaussianDiffusion
from glide_fast.compat.respacing import _WrappedModel, space_timesteps

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "_WrappedModel", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion, respacing.SpacedDiffusion):
    """A diffusion that visits ``use_timesteps`` of the training schedule ``betas``."""
