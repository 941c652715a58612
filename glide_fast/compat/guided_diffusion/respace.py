"""Diffusions that skip steps; what guided-diffusion's module of this name offers."""

from glide_fast.compat.diffusion import GaussianDiffusion
from glide_fast.compat.respacing import SpacedDiffusion, _WrappedModel, space_timesteps

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "_WrappedModel", "space_timesteps"]
