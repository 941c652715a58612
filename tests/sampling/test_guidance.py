"""Classifier-free guidance and inpainting: their properties and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.diffusion.schedule import Schedule
from glide_fast.sampling.guidance import classifier_free
from glide_fast.sampling.inpainting import keep_known
from glide_fast.sampling.run import Sampler
from glide_fast.sampling.samplers import SAMPLERS, ddim, ddpm
from tests.golden import normal
from tests.sampling.toy import toy_denoiser

SHAPE = (2, 3, 8, 8)
DIFFUSION = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, "6"))
IMAGE = normal("image", SHAPE, 0).clamp(-1, 1)


def doubled(x: Tensor, timesteps: Tensor) -> Tensor:
    """A model of two conditions: the second half of the batch answers otherwise."""
    output = toy_denoiser(DIFFUSION)(x, timesteps)
    return torch.cat([output[: len(x) // 2], 0.5 - output[len(x) // 2 :]])


def answers(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x, timesteps = normal("x", SHAPE, 0), torch.tensor([7, 900])
    plain = toy_denoiser(DIFFUSION)(x, timesteps)
    return classifier_free(doubled, scale)(x, timesteps), plain, 0.5 - plain


def test_scale_one_is_the_conditional_model() -> None:
    guided, conditional, _ = answers(1.0)
    torch.testing.assert_close(guided, conditional)


def test_scale_zero_is_the_unconditional_prediction() -> None:
    guided, conditional, unconditional = answers(0.0)
    assert torch.equal(guided[:, :3], unconditional[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


@settings(deadline=None)
@given(scale=st.floats(0, 100))
def test_scale_extrapolates_and_keeps_the_conditional_variance(scale: float) -> None:
    guided, conditional, unconditional = answers(scale)
    expected = (1 - scale) * unconditional[:, :3].double() + scale * conditional[:, :3].double()
    torch.testing.assert_close(guided[:, :3].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


def test_fixed_variance_models_are_guided_too() -> None:
    guided = classifier_free(lambda x, _: torch.cat([x[:2] * 2, x[2:]]), 3.0)
    x = normal("x", SHAPE, 0)
    torch.testing.assert_close(guided(x, torch.tensor([1, 2])), 4 * x)


@pytest.mark.parametrize("scale", [-1.0, 100.5, float("inf"), float("nan")])
def test_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match=r"guidance scale .* must lie in 0 .. 100; 0 ignores the prompt"):
        classifier_free(doubled, scale)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_known_pixels_stay_exactly(sampler: Sampler, seed: int, share: float) -> None:
    mask = (normal("mask", (2, 1, 8, 8), seed).sigmoid() < share).float()
    painted = sampler(
        toy_denoiser(DIFFUSION), normal("x", SHAPE, seed), DIFFUSION, denoised_fn=keep_known(IMAGE, mask)
    )
    known = mask.expand(SHAPE) == 1
    assert torch.equal(painted[known], IMAGE[known])
    assert torch.isfinite(painted).all()


def test_one_picture_and_mask_serve_a_batch() -> None:
    mask = torch.ones(1, 1, 8, 8)
    painted = ddpm(
        toy_denoiser(DIFFUSION), normal("x", SHAPE, 0), DIFFUSION, denoised_fn=keep_known(IMAGE[:1], mask)
    )
    assert torch.equal(painted, IMAGE[:1].expand(SHAPE))


def test_nothing_known_changes_nothing() -> None:
    x = normal("x", SHAPE, 0)
    paste = keep_known(IMAGE, torch.zeros(2, 1, 8, 8))
    assert torch.equal(
        ddim(toy_denoiser(DIFFUSION), x, DIFFUSION, denoised_fn=paste),
        ddim(toy_denoiser(DIFFUSION), x, DIFFUSION),
    )


def test_inpainting_errors_name_value_rule_and_fix() -> None:
    with pytest.raises(
        ValueError, match=r"mask \(2, 3, 8, 8\); they must be \[B, C, H, W\] and \[B, 1, H, W\]"
    ):
        keep_known(IMAGE, torch.ones(SHAPE))
    with pytest.raises(ValueError, match=r"mask has values in \[0.5, 0.5\] but must be 1 .* round it"):
        keep_known(IMAGE, torch.full((2, 1, 8, 8), 0.5))
    for bad in (IMAGE * 255, IMAGE * float("nan")):
        with pytest.raises(ValueError, match=r"known pixels must lie in \[-1, 1\]; scale"):
            keep_known(bad, torch.ones(2, 1, 8, 8))
