"""Bits a dimension against the original's numbers, and what they must be where the answer is known."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from glide_fast.diffusion.likelihood import bits_per_dim, prior_bits_per_dim
from glide_fast.diffusion.process import GaussianDiffusion, Prediction, VarianceType
from glide_fast.diffusion.schedule import Schedule
from tests.diffusion.test_process import MEAN_TYPES
from tests.golden import assert_close, data, entry, normal
from tests.sampling.toy import toy_denoiser

CASES = sorted({key.rsplit(".", 1)[0] for key in data("bpd") if key != "in.x_start"})


@pytest.mark.parametrize("case", CASES)
def test_bound_and_its_parts(case: str) -> None:
    mean, variance, clip = case.split(".")
    diffusion = GaussianDiffusion(
        schedule=Schedule.create("cosine", 1000, "10"),
        mean_type=MEAN_TYPES[mean],
        variance_type=cast(VarianceType, variance.lower()),
    )
    model = toy_denoiser(diffusion)

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        output = model(x_t, diffusion.model_timesteps(t))
        return diffusion.predict(output, x_t, t, clip_denoised=clip == "clip1")

    torch.manual_seed(entry("bpd")["torch_seed"])
    bits = bits_per_dim(diffusion, predict, torch.from_numpy(data("bpd")["in.x_start"]))
    names = ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse")
    for name, values in zip(names, bits, strict=True):
        assert_close(values, "bpd", f"{case}.{name}")


def test_a_model_that_knows_the_picture_pays_only_for_its_last_digits() -> None:
    diffusion = GaussianDiffusion(
        schedule=Schedule.create("linear", 1000, "50"), mean_type="x_start", variance_type="fixed_small"
    )
    picture = ((normal("x", (2, 3, 8, 8), 0).tanh() + 1) * 127.5).round() / 127.5 - 1
    bits = bits_per_dim(
        diffusion,
        lambda x_t, t: diffusion.predict(picture, x_t, t),
        picture,
        noise=lambda like: torch.full_like(like, 0.5),
    )
    assert bits.vlb.shape == (2, 50)
    assert bits.x_start_mse.max() == 0
    assert bits.epsilon_mse.max() < 1e-6
    assert bits.vlb[:, :-1].abs().max() < 1e-5
    torch.testing.assert_close(bits.total, bits.vlb.sum(1) + bits.prior)


def test_prior_is_that_of_the_schedules_end() -> None:
    diffusion = GaussianDiffusion(schedule=Schedule.create("linear", 1000))
    left = float(diffusion.schedule.alphas_cumprod[-1])
    expected = 0.5 * (left - math.log1p(-left) - left) / math.log(2)  # pictures of ones
    ones = torch.ones(2, 3, 4, 4)
    torch.testing.assert_close(
        prior_bits_per_dim(diffusion, ones), torch.full((2,), expected), rtol=1e-2, atol=1e-8
    )
    assert (prior_bits_per_dim(diffusion, 10 * ones) > 10 * expected).all()
