"""One process or several; what guided-diffusion's module of this name offers."""

from glide_fast.compat.distributed import *  # noqa: F403
