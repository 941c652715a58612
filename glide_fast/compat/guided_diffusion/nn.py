"""Small functions and layers; what guided-diffusion's module of this name offers."""

from glide_fast.compat.layers import *  # noqa: F403
