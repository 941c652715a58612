"""The log of a run; what guided-diffusion's module of this name offers."""

from glide_fast.compat.logger import *  # noqa: F403
