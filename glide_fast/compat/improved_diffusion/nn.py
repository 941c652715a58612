"""Small functions and layers; what improved-diffusion's module of this name offers."""

from glide_fast.compat.layers import *  # noqa: F403
