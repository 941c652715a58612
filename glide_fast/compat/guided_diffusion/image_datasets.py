"""Batches of a folder's pictures; what guided-diffusion's module of this name offers."""

from glide_fast.compat.image_folders import *  # noqa: F403
