"""Diffusions that skip steps; what glide-text2im's module of this name offers, GLIDE's "fast27" included."""

from __future__ import annotations

from collections.abc import Sequence

from glide_fast.compat import respacing
from glide_fast.compat.glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_fast.compat.respacing import _WrappedModel
from glide_fast.diffusion import schedule

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "_WrappedModel", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The steps below ``num_timesteps`` that "100", [10, 15, 20], "10,15,20", "ddim50" or "fast27" choose.

    Raises:
        ValueError: a malformed string, or more steps wanted than there are.
    """
    return set(schedule.space_timesteps(num_timesteps, section_counts))


class SpacedDiffusion(respacing.SpacedDiffusion, GaussianDiffusion):
    """A diffusion that visits ``use_timesteps`` of the training schedule ``betas``."""
