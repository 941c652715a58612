"""Half-precision training; what guided-diffusion's module of this name offers."""

from glide_fast.compat.half import *  # noqa: F403
