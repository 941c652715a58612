"""Losses and their gradients against the original's numbers."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.diffusion.losses import (
    LossTerms,
    hybrid_loss,
    simple_loss,
    v_weight,
    vlb_term,
)
from glide_fast.diffusion.process import GaussianDiffusion, MeanType, VarianceType
from glide_fast.diffusion.schedule import Schedule
from glide_fast.ops.reference_losses import (
    approximate_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from tests.diffusion.test_process import MEAN_TYPES
from tests.golden import assert_close, data, entry, normal

SHAPE = (4, 3, 4, 4)
COSINE = Schedule.create("cosine", 1000)
CASES = [key.removesuffix(".loss") for key in entry("training_losses")["arrays"] if key.endswith(".loss")]


def given(name: str) -> Tensor:
    return normal(name, SHAPE, 301)


def test_normal_kl() -> None:
    arguments = given("mean1"), given("logvar1"), given("mean2"), given("logvar2")
    assert_close(normal_kl(*arguments), "losses", "normal_kl")
    assert_close(normal_kl(arguments[0], arguments[1], 0.0, 0.0), "losses", "normal_kl.scalar")
    assert_close(normal_kl(arguments[0], -1.0, *arguments[2:]), "losses", "normal_kl.mixed")
    assert_close(approximate_normal_cdf(3 * arguments[0]), "losses", "approx_standard_normal_cdf")


def test_discretized_gaussian_log_likelihood() -> None:
    image, mean, log_variance = torch.from_numpy(data("losses")["in.image"]), given("mean1"), given("logvar1")
    key = "discretized_gaussian_log_likelihood"
    values = discretized_gaussian_log_likelihood(
        image, means=image + 0.02 * mean, log_scales=0.2 * log_variance - 3.5
    )
    assert_close(values, "losses", key)
    tail = discretized_gaussian_log_likelihood(image, means=0.5 * mean, log_scales=log_variance - 2)
    np.testing.assert_allclose(tail.exp(), np.exp(data("losses")[f"{key}.tail"]), rtol=0, atol=1e-6)


def test_bins_of_a_pixel_add_up_to_one() -> None:
    levels = torch.arange(256) / 127.5 - 1
    for mean, scale in ((0.0, 0.1), (-1.0, 0.01), (0.97, 0.5)):
        log_likelihood = discretized_gaussian_log_likelihood(
            levels, means=torch.full((256,), mean), log_scales=torch.full((256,), math.log(scale))
        )
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_training_losses(case: str) -> None:
    kind, mean, variance = case.split(".")
    diffusion = GaussianDiffusion(
        schedule=COSINE,
        mean_type=MEAN_TYPES[mean],
        variance_type=cast(VarianceType, variance.lower()),
    )
    x_start, t = (torch.from_numpy(data("training_losses")[key]) for key in ("in.x_start", "in.t"))
    noise, output = normal("noise", SHAPE, 311), 0.5 * normal("model_output", (4, 6, 4, 4), 311)
    output = (output if diffusion.learns_variance else output[:, :3]).clone().requires_grad_()
    x_t = diffusion.q_sample(x_start, t, noise)
    if kind.endswith("KL"):
        loss = vlb_term(diffusion, output, x_start, x_t, t) * (1000 if kind == "RESCALED_KL" else 1)
    elif diffusion.learns_variance:
        weight = None if kind == "RESCALED_MSE" else 1.0
        terms = hybrid_loss(diffusion, output, x_start, x_t, t, noise, vlb_weight=weight)
        loss = terms.loss
        assert_close(terms.mse, "training_losses", f"{case}.mse")
        assert_close(terms.vlb, "training_losses", f"{case}.vb")
    else:
        loss = simple_loss(diffusion, output, x_start, x_t, t, noise)
        assert_close(loss, "training_losses", f"{case}.mse")
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert_close(loss, "training_losses", f"{case}.loss")
    assert_close(gradient, "training_losses", f"{case}.grad")


def hybrid(respacing: str) -> tuple[LossTerms, Tensor, Tensor]:
    """A hybrid loss, its model output, and the simple loss's share of the output's gradient."""
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, respacing))
    x_start, noise, t = (
        torch.tanh(normal("x", SHAPE, 0)),
        normal("noise", SHAPE, 0),
        torch.tensor([0, 1, 5, 9]),
    )
    output = normal("output", (4, 6, 4, 4), 0).requires_grad_()
    terms = hybrid_loss(diffusion, output, x_start, diffusion.q_sample(x_start, t, noise), t, noise)
    return terms, output, 2 * (output[:, :3].detach() - noise) / noise[0].numel()


def test_bound_trains_the_variance_only() -> None:
    terms, output, simple_gradient = hybrid("")
    (gradient,) = torch.autograd.grad(terms.loss.sum(), output)
    torch.testing.assert_close(gradient[:, :3], simple_gradient)
    assert (gradient[:, 3:] != 0).any()
    torch.testing.assert_close(terms.loss, terms.mse + terms.vlb)


def test_bound_weighs_a_thousandth_of_all_steps() -> None:
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, "10"))
    terms, output, _ = hybrid("10")
    x_start, noise, t = (
        torch.tanh(normal("x", SHAPE, 0)),
        normal("noise", SHAPE, 0),
        torch.tensor([0, 1, 5, 9]),
    )
    bound = vlb_term(diffusion, output, x_start, diffusion.q_sample(x_start, t, noise), t)
    torch.testing.assert_close(terms.vlb, bound * 10 / 1000)


def test_fixed_variance_has_no_hybrid_loss() -> None:
    diffusion = GaussianDiffusion(schedule=COSINE, variance_type="fixed_small")
    zeros, t = torch.zeros(SHAPE), torch.zeros(4).long()
    with pytest.raises(ValueError, match="'fixed_small'; use 'learned_range', or simple_loss"):
        hybrid_loss(diffusion, zeros, zeros, zeros, t, zeros)


@pytest.mark.parametrize("mean_type", ["epsilon", "x_start"])
def test_v_weight_turns_the_simple_loss_into_that_of_v(mean_type: MeanType) -> None:
    schedule = Schedule.create("cosine", 1000)
    diffusion = GaussianDiffusion(schedule=schedule, mean_type=mean_type, variance_type="fixed_small")
    t = torch.tensor([250, 500, 750])
    generator = torch.Generator().manual_seed(0)
    x_start, noise, guess = (torch.randn(3, 3, 4, 4, generator=generator) for _ in range(3))
    x_t = diffusion.q_sample(x_start, t, noise)
    if mean_type == "epsilon":
        epsilon_guess, x_start_guess = guess, diffusion.predict_x_start_from_epsilon(x_t, t, guess)
    else:
        epsilon_guess, x_start_guess = diffusion.predict_epsilon_from_x_start(x_t, t, guess), guess
    signal = schedule.at("sqrt_alphas_cumprod", t, x_t)
    spread = schedule.at("sqrt_one_minus_alphas_cumprod", t, x_t)
    v = signal * noise - spread * x_start
    v_guess = signal * epsilon_guess - spread * x_start_guess
    expected = ((v - v_guess) ** 2).flatten(1).mean(1)
    weighted = v_weight(diffusion, t) * simple_loss(diffusion, guess, x_start, x_t, t, noise)
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=0)


def test_v_weight_is_bounded_and_refuses_other_means() -> None:
    schedule = Schedule.create("cosine", 1000)
    weights = v_weight(GaussianDiffusion(schedule=schedule), torch.tensor([0, 999]), largest=7.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 7.0]), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="no v weight for mean type 'previous_x'; known: epsilon, x_start"):
        v_weight(GaussianDiffusion(schedule=schedule, mean_type="previous_x"), torch.tensor([0]))


def test_the_hybrid_loss_weighs_only_its_simple_part() -> None:
    diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000))
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    output, t = torch.randn(2, 6, 4, 4, generator=generator), torch.tensor([10, 900])
    x_t = diffusion.q_sample(x_start, t, noise)
    plain = hybrid_loss(diffusion, output, x_start, x_t, t, noise)
    weighted = hybrid_loss(diffusion, output, x_start, x_t, t, noise, mse_weight=torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(weighted.mse, plain.mse * torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(weighted.vlb, plain.vlb)
