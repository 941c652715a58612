"""What GLIDE's diffusion objects alone have, against the original's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.glide_text2im import gaussian_diffusion, respace
from tests.golden import data


def test_older_schedules() -> None:
    for key, expected in data("schedules").items():
        name, _, which = key.partition(".")
        if name == "get_beta_schedule":
            betas = gaussian_diffusion.get_beta_schedule(
                which, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=100
            )
        elif name in ("linear", "cosine"):
            continue
        else:
            betas = gaussian_diffusion.betas_for_alpha_bar(30, lambda t: math.exp(-5 * t * t), max_beta=0.5)
        np.testing.assert_allclose(betas, expected, rtol=1e-15, atol=0, err_msg=key)
    with pytest.raises(NotImplementedError, match=r"cubic; known: quad"):
        gaussian_diffusion.get_beta_schedule("cubic", beta_start=0, beta_end=1, num_diffusion_timesteps=3)


def test_a_models_second_output_is_handed_through() -> None:
    betas = gaussian_diffusion.get_named_beta_schedule("linear", 1000)
    diffusion = respace.SpacedDiffusion(use_timesteps=respace.space_timesteps(1000, "25"), betas=betas)
    x, t = torch.zeros(1, 3, 4, 4), torch.tensor([3])

    def pair(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, x], dim=1), timesteps

    assert diffusion.p_mean_variance(pair, x, t)["extra"].tolist() == [diffusion.timestep_map[3]]
    assert diffusion.p_mean_variance(lambda x, t: pair(x, t)[0], x, t)["extra"] is None
