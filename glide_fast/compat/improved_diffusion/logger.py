"""The log of a run; what improved-diffusion's module of this name offers."""

from glide_fast.compat.logger import *  # noqa: F403
