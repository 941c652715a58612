"""Timestep samplers against the original's draws; resuming; errors."""

import numpy as np
import pytest
import torch

from glide_fast.diffusion.timesteps import (
    LossSecondMomentTimesteps,
    NoisyTimesteps,
    TimestepSampler,
    UniformTimesteps,
    timestep_sampler,
)
from tests.golden import data

STORED = data("schedule_samplers")


def check_draw(sampler: TimestepSampler, name: str) -> None:
    expected = STORED[f"{name}.indices"]
    timesteps, weights = sampler.sample(len(expected), np.random.RandomState(601))
    assert timesteps.dtype == torch.int64
    assert weights.dtype == torch.float32
    np.testing.assert_array_equal(timesteps, expected)
    np.testing.assert_allclose(weights, STORED[f"{name}.sample_weights"], rtol=1e-6)


def test_uniform() -> None:
    np.testing.assert_array_equal(UniformTimesteps(12).weights(), STORED["uniform.weights"])
    check_draw(UniformTimesteps(12), "uniform")


def test_noisy_steps_are_drawn_in_proportion_and_weigh_alike() -> None:
    sampler = timestep_sampler("noisy", 4)
    assert isinstance(sampler, NoisyTimesteps)
    timesteps, weights = sampler.sample(20_000, np.random.default_rng(0))
    shares = np.bincount(timesteps, minlength=4) / len(timesteps)
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.01)
    assert torch.equal(weights, torch.ones(20_000))
    assert sampler.state_dict() == {}


def test_loss_second_moment() -> None:
    sampler = LossSecondMomentTimesteps(12)
    pairs = zip(STORED["in.timesteps"], STORED["in.losses"], strict=True)
    for done, (timestep, loss) in enumerate(pairs, start=1):
        sampler.update(torch.tensor([timestep]), torch.tensor([loss]))
        if f"second_moment.weights_after_{done}" in STORED:
            expected = STORED[f"second_moment.weights_after_{done}"]
            np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-12)
    assert sampler.warmed_up
    check_draw(sampler, "second_moment")


def test_one_update_of_many_losses_equals_many_of_one() -> None:
    together, apart = LossSecondMomentTimesteps(12), LossSecondMomentTimesteps(12)
    timesteps, losses = torch.from_numpy(STORED["in.timesteps"]), torch.from_numpy(STORED["in.losses"])
    together.update(timesteps, losses)
    for timestep, loss in zip(timesteps, losses, strict=True):
        apart.update(timestep[None], loss[None])
    np.testing.assert_array_equal(together.weights(), apart.weights())


def test_resumed_sampler_goes_on_as_the_unbroken_one() -> None:
    timesteps, losses = torch.from_numpy(STORED["in.timesteps"]), torch.from_numpy(STORED["in.losses"])
    unbroken, resumed = LossSecondMomentTimesteps(12), LossSecondMomentTimesteps(12)
    unbroken.update(timesteps[:150], losses[:150])
    resumed.load_state_dict(unbroken.state_dict())
    for sampler in (unbroken, resumed):
        sampler.update(timesteps[150:], losses[150:])
    draws = [sampler.sample(64, np.random.default_rng(5)) for sampler in (unbroken, resumed)]
    for left, right in zip(*draws, strict=True):
        assert torch.equal(left, right)


def test_state_is_a_copy() -> None:
    sampler = LossSecondMomentTimesteps(2, history=1)
    state = sampler.state_dict()
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert state["seen"].tolist() == [0, 0]


def test_weights_keep_the_expected_loss() -> None:
    sampler = LossSecondMomentTimesteps(4, history=1)
    losses = torch.tensor([0.1, 0.2, 0.4, 3.0])
    sampler.update(torch.arange(4), losses)
    timesteps, weights = sampler.sample(40_000, np.random.default_rng(0))
    assert (weights * losses[timesteps]).mean().item() == pytest.approx(losses.mean().item(), rel=0.01)


def test_losses_of_zero_stay_uniform() -> None:
    sampler = LossSecondMomentTimesteps(4, history=1)
    sampler.update(torch.arange(4), torch.zeros(4))
    np.testing.assert_allclose(sampler.weights(), 0.25)


def test_errors_name_value_rule_and_fix() -> None:
    with pytest.raises(
        ValueError, match="unknown timestep sampler 'lucky'; known: uniform, noisy, loss_second_moment"
    ):
        timestep_sampler("lucky", 10)
    with pytest.raises(ValueError, match="count 0 must be at least 1"):
        timestep_sampler("uniform", 0)
    with pytest.raises(ValueError, match="history 0 must be at least 1"):
        LossSecondMomentTimesteps(10, history=0)
    with pytest.raises(ValueError, match=r"uniform_probability 2 must lie in \[0, 1\]"):
        LossSecondMomentTimesteps(10, uniform_probability=2)
    with pytest.raises(ValueError, match="must be finite"):
        LossSecondMomentTimesteps(10).update(torch.tensor([1]), torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"'losses' should have shape \(10, 10\) but is \(9, 10\)"):
        LossSecondMomentTimesteps(10).load_state_dict(LossSecondMomentTimesteps(9).state_dict())
    with pytest.raises(ValueError, match="no state but got"):
        UniformTimesteps(9).load_state_dict(LossSecondMomentTimesteps(9).state_dict())
