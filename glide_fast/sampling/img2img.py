"""Variations of a picture: sampling that starts from it, partly noised, instead of from noise."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.sampling.denoiser import NoiseSource


def start_from(
    pictures: Tensor, diffusion: GaussianDiffusion, strength: float, *, noise: NoiseSource
) -> tuple[Tensor, GaussianDiffusion]:
    """The start x and the diffusion for a sampler that keeps the layout of ``pictures`` (arXiv 2108.01073).

    ``pictures`` [B, C, H, W] in [-1, 1]; ``strength`` is the share of the steps that is sampled: 1 forgets
    the pictures all but for the terminal noise level, 0.5 keeps their layout.

    Raises:
        ValueError: the strength leaves less than 2 steps or more than all.
    """
    steps = round(strength * diffusion.steps) if 0 <= strength <= 1 else 0
    if steps < 2:
        raise ValueError(
            f"strength {strength} must lie in {2 / diffusion.steps:.3g} .. 1, so that 2 to all of the "
            f"{diffusion.steps} steps are sampled; 0.5 keeps the layout"
        )
    rest = replace(diffusion, schedule=diffusion.schedule.first(steps))
    t = torch.full((len(pictures),), steps - 1, dtype=torch.int64, device=pictures.device)
    return rest.q_sample(pictures.float(), t, noise(pictures.shape, pictures.device)), rest
