"""Which steps a batch sees; what guided-diffusion's module of this name offers."""

from glide_fast.compat.timestep_samplers import *  # noqa: F403
