"""Samplers on problems of known solution: Gaussian pictures, and guesses of x_0 that are polynomials."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.diffusion.schedule import Schedule
from glide_fast.sampling import SAMPLERS, PerImageNoise, start_from
from glide_fast.sampling.denoiser import Denoiser
from glide_fast.sampling.run import Level, Sampler, Step
from glide_fast.sampling.solvers import dpm_solver, heun, plms, unipc
from tests.golden import normal

SHAPE = (2, 3, 8, 8)
MEAN, STD = 0.3, 0.5
STOCHASTIC = ["ddpm", "euler_ancestral", "dpm++2m_sde"]
DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
SECOND_ORDER = ["plms", "heun", "dpm++2m", "unipc"]


def diffusion_of(steps: int, name: str = "linear") -> GaussianDiffusion:
    schedule = Schedule.create(name, 1000, [steps])
    return GaussianDiffusion(schedule=schedule, mean_type="x_start", variance_type="fixed_small")


def level(diffusion: GaussianDiffusion, step: int) -> Level:
    kept = float(diffusion.schedule.alphas_cumprod[step])
    return Level(math.sqrt(kept), math.sqrt(1 - kept))


def gaussian_denoiser(diffusion: GaussianDiffusion) -> Denoiser:
    """E[x_0 | x_t] where pictures are normal with MEAN and STD."""

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = level(diffusion, int(diffusion.steps_of(timesteps)[0]))
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    return denoise


def exact(diffusion: GaussianDiffusion, x: Tensor) -> Tensor:
    """Where the probability-flow ODE takes x: the same place in the distribution of pictures."""
    alpha, sigma = level(diffusion, diffusion.steps - 1)
    return MEAN + STD * (x - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)


def error(sampler: Sampler, steps: int, name: str = "linear") -> float:
    diffusion = diffusion_of(steps, name)
    x = normal("x", SHAPE, 0)
    found = sampler(gaussian_denoiser(diffusion), x, diffusion, clip_denoised=False)
    return float((found - exact(diffusion, x)).abs().max())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_come_closer_to_the_exact_solution(name: str, schedule: str) -> None:
    errors = [error(SAMPLERS[name], steps, schedule) for steps in (10, 40, 160)]
    rounding = 1e-3
    assert errors[0] > 2 * errors[1] or errors[1] < rounding
    assert errors[1] > 2 * errors[2] or errors[2] < rounding
    assert errors[2] < 0.03


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_needs_fewer_steps(name: str, schedule: str) -> None:
    for steps in (10, 20, 40):
        ours, ddim = error(SAMPLERS[name], steps, schedule), error(SAMPLERS["ddim"], steps, schedule)
        assert ours < (0.8 if steps == 10 else 0.5) * ddim


@pytest.mark.parametrize("name", [*STOCHASTIC, *DETERMINISTIC])
def test_pictures_have_the_mean_and_deviation_of_the_data(name: str) -> None:
    diffusion = diffusion_of(250)
    noise = PerImageNoise([1])
    x = noise((1, 3, 64, 64), torch.device("cpu"))
    found = SAMPLERS[name](gaussian_denoiser(diffusion), x, diffusion, noise=noise, clip_denoised=False)
    assert abs(float(found.mean()) - MEAN) < 0.03
    assert abs(float(found.std()) - STD) < 0.03


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_random_sampler_follows_its_noise(name: str) -> None:
    diffusion = diffusion_of(10)
    x = normal("x", SHAPE, 0)
    first, same, other = (
        SAMPLERS[name](gaussian_denoiser(diffusion), x, diffusion, noise=PerImageNoise([seed, 5]))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_euler_is_the_method_of_that_name_in_sigma_over_alpha(eta: float) -> None:
    """Karras et al.: y' = y + (down - s) (y - x_0) / s + up z, where up^2 + down^2 = s'^2."""
    diffusion = diffusion_of(7)
    denoise = gaussian_denoiser(diffusion)
    start, source = normal("x", SHAPE, 0), PerImageNoise([3, 4])
    alpha, sigma = level(diffusion, 6)
    y = start.double() / alpha
    for step in range(7)[::-1]:
        alpha, sigma = level(diffusion, step)
        here = sigma / alpha
        there = 0.0 if step == 0 else level(diffusion, step - 1).sigma / level(diffusion, step - 1).alpha
        up = eta * math.sqrt(there**2 * (here**2 - there**2) / here**2)
        down = math.sqrt(there**2 - up**2)
        guess = denoise(y * alpha, torch.full((2,), diffusion.schedule.timestep_map[step])).clamp(-1, 1)
        y = y + (down - here) * (y - guess) / here + up * source(SHAPE, torch.device("cpu"))
    found = SAMPLERS["euler"](denoise, start, diffusion, noise=PerImageNoise([3, 4]), eta=eta)
    torch.testing.assert_close(found.double(), y, rtol=1e-4, atol=1e-4)


def polynomial_denoiser(diffusion: GaussianDiffusion, *coefficients: float) -> Denoiser:
    """A guess of x_0 that does not depend on x and is a polynomial in lambda / 5."""

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        place = level(diffusion, int(diffusion.steps_of(timesteps)[0])).log_ratio / 5
        return torch.full_like(x, sum(value * place**power for power, value in enumerate(coefficients)))

    return denoise


def integral(diffusion: GaussianDiffusion, denoise: Denoiser, x: Tensor, last: int) -> Tensor:
    """x at step ``last`` by the solution formula, x_0 integrated over lambda in 20,000 trapezoids."""
    here, there = level(diffusion, diffusion.steps - 1), level(diffusion, last)
    growth = there.log_ratio - here.log_ratio
    u = torch.linspace(0, growth, 20_001, dtype=torch.float64)
    ends = [float(denoise(x[:1], torch.tensor([diffusion.schedule.timestep_map[step]]))[0, 0, 0, 0])
            for step in (diffusion.steps - 1, last)]  # fmt: skip
    guess = ends[0] + (ends[1] - ends[0]) * u / growth
    total = torch.trapezoid(torch.exp(u - growth) * guess, u)
    return there.sigma / here.sigma * x + there.alpha * float(total)


def test_unipc_is_exact_where_the_guess_is_linear_in_lambda() -> None:
    diffusion = diffusion_of(12)
    denoise = polynomial_denoiser(diffusion, 0.3, 0.7)
    steps: list[Step] = []
    x = normal("x", SHAPE, 0)
    unipc(denoise, x, diffusion, clip_denoised=False, callback=steps.append)
    # After step k the state is x at step 12 - 2 - k, predicted from corrected states: exact from k = 1 on.
    for index in (2, 5, 9):
        expected = integral(diffusion, denoise, x, 10 - index)
        torch.testing.assert_close(steps[index].x, expected, rtol=1e-3, atol=1e-3)


def test_dpm_solver_is_the_papers_formula() -> None:
    """Algorithm 2 with its letters, but for steps that are longer than the last, where r stays 1."""
    diffusion = diffusion_of(5)
    denoise = gaussian_denoiser(diffusion)
    x, previous, last_h = normal("x", SHAPE, 0).double(), None, 0.0
    for step in range(5)[::-1]:
        guess = denoise(x, torch.full((2,), diffusion.schedule.timestep_map[step]))
        if step == 0:
            x = guess
            break
        here, there = level(diffusion, step), level(diffusion, step - 1)
        h = there.log_ratio - here.log_ratio
        d = guess
        if previous is not None:
            r = max(last_h / h, 1)
            d = (1 + 1 / (2 * r)) * guess - 1 / (2 * r) * previous
        x = there.sigma / here.sigma * x - there.alpha * (math.exp(-h) - 1) * d
        previous, last_h = guess, h
    found = dpm_solver(denoise, normal("x", SHAPE, 0), diffusion, clip_denoised=False)
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)


def test_evaluations_of_the_denoiser() -> None:
    diffusion = diffusion_of(10)
    counts = {}
    for sampler, expected in ((plms, 10), (heun, 19), (dpm_solver, 10), (unipc, 10)):
        calls: list[int] = []
        inner = gaussian_denoiser(diffusion)

        def counted(x: Tensor, t: Tensor, calls: list[int] = calls, inner: Denoiser = inner) -> Tensor:
            calls.append(1)
            return inner(x, t)

        sampler(counted, normal("x", SHAPE, 0), diffusion)
        counts[expected, len(calls)] = sampler
    assert all(expected == found for expected, found in counts)


@pytest.mark.parametrize("name", ["ddpm", "heun", "plms", "unipc"])
def test_samplers_without_a_choice_refuse_eta(name: str) -> None:
    with pytest.raises(ValueError, match=f"sampler '{name}' has no eta to choose, but eta 0.5 is given"):
        SAMPLERS[name](gaussian_denoiser(diffusion_of(5)), normal("x", SHAPE, 0), diffusion_of(5), eta=0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_starting_from_a_noised_picture_keeps_it_more_the_less_it_is_noised(name: str) -> None:
    diffusion = diffusion_of(50)
    picture = normal("picture", SHAPE, 1).clamp(-1, 1)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        noise = PerImageNoise([8, 9])
        x, rest = start_from(picture, diffusion, strength, noise=noise)
        assert rest.steps == round(50 * strength)
        found = SAMPLERS[name](gaussian_denoiser(diffusion), x, rest, noise=noise)
        distances.append(float((found - picture).square().mean()))
    assert distances[0] < 0.5 * distances[1] < distances[2]


def test_a_noised_start_has_the_noise_of_its_step() -> None:
    diffusion = diffusion_of(50)
    x, rest = start_from(torch.zeros(1, 3, 64, 64), diffusion, 0.4, noise=PerImageNoise([0]))
    assert abs(float(x.std()) - level(diffusion, 19).sigma) < 0.02
    assert int(rest.schedule.timestep_map[-1]) == int(diffusion.schedule.timestep_map[19])


@pytest.mark.parametrize("strength", [0.0, 0.02, 1.1, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength .* must lie in 0.04 .. 1, .* of the 50 steps"):
        start_from(torch.zeros(SHAPE), diffusion_of(50), strength, noise=PerImageNoise([0, 1]))


@pytest.mark.parametrize("rescaled", [False, True])
def test_steps_are_found_by_their_timesteps(rescaled: bool) -> None:
    schedule = Schedule.create("cosine", 4000, "10,5")
    diffusion = GaussianDiffusion(schedule=schedule, rescale_timesteps=rescaled)
    t = torch.arange(diffusion.steps)
    assert torch.equal(diffusion.steps_of(diffusion.model_timesteps(t)), t)


def test_eta_is_between_the_ode_and_the_sde() -> None:
    diffusion = diffusion_of(100)
    x = normal("x", (1, 3, 64, 64), 0)
    spread = []
    for eta in (0.0, 0.5, 1.0):
        sample = partial(dpm_solver, gaussian_denoiser(diffusion), x, diffusion, clip_denoised=False, eta=eta)
        spread.append(float((sample(noise=PerImageNoise([1])) - sample(noise=PerImageNoise([2]))).std()))
    assert spread[0] == 0
    assert 0 < spread[1] < spread[2]
