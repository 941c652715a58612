"""The training loop, annealed after each step; what guided-diffusion's module of this name offers."""

from glide_fast.compat.training import *  # noqa: F403
