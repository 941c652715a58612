"""Samplers by name, and the published ones: DDPM, DDIM, and DDIM backwards.

Each takes the start x_T and gives x_0, as :class:`~glide_fast.sampling.run.Sampler` says. DDPM and DDIM draw
one noise tensor for the whole batch every step, also where its weight is zero, so that a seed gives the
pictures of the published code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glide_fast.diffusion.rules import ddim_encode_rule, ddim_rule, ddpm_rule
from glide_fast.sampling.run import Run, Sampler, sampler
from glide_fast.sampling.solvers import dpm_solver, dpm_solver_sde, heun, plms, unipc


def _ddpm(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2), with the variance of the model."""
    x, rule = run.x, ddpm_rule(run.diffusion, clip=run.clip_denoised, device=run.x.device)
    for step in run.countdown:
        if run.is_plain:
            x, x_start = run.move(rule, x, step)
        else:
            x, x_start = run.compute(_ancestral, x, run.t(step), run.draw())
        yield x, x_start


def _ancestral(run: Run, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the rule does, where the prediction is more than the denoiser's output."""
    p = run.predict(x, t)
    inside = (t > 0).view(-1, *[1] * (x.dim() - 1))  # the last step adds no noise
    return p.mean + inside * torch.exp(0.5 * p.log_variance) * z, p.x_start


def _ddim(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """DDIM (arXiv 2010.02502, equation 12): deterministic given x at eta 0, as random as DDPM at eta 1."""
    x, rule = run.x, ddim_rule(run.diffusion, run.eta, clip=run.clip_denoised, device=run.x.device)
    for step in run.countdown:
        if run.is_plain:
            x, x_start = run.move(rule, x, step)
        else:
            x, x_start = run.compute(_implicit, x, run.t(step), run.draw())
        yield x, x_start


def _implicit(run: Run, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    x_start = run.predict(x, t).x_start
    epsilon = run.diffusion.predict_epsilon_from_x_start(x, t, x_start)
    mean, sigma = run.diffusion.ddim_step(x_start, epsilon, t, run.eta)
    return mean + sigma * z, x_start  # sigma is 0 at the last step


def _ddim_encode(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """DDIM at eta 0 run backwards (arXiv 2010.02502, section 4.3): the noise x_T that leads to picture x."""
    x, rule = run.x, ddim_encode_rule(run.diffusion, clip=run.clip_denoised, device=run.x.device)
    for step in run.countdown[::-1]:
        if run.is_plain:
            x, x_start = run.move(rule, x, step, noisy=False)
        else:
            x, x_start = run.compute(_encoding, x, run.t(step))
        yield x, x_start


def _encoding(run: Run, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x_start = run.predict(x, t).x_start
    epsilon = run.diffusion.predict_epsilon_from_x_start(x, t, x_start)
    return run.diffusion.ddim_step_to_noise(x_start, epsilon, t), x_start


ddpm = sampler(_ddpm)
ddim = sampler(_ddim, eta=0.0)
ddim_encode = sampler(_ddim_encode, upwards=True)
# In y = x / sqrt(alpha_bar), Euler's method on the probability-flow ODE of EDM (arXiv 2206.00364) is DDIM,
# step by step, and the ancestral form with its sigma_up and sigma_down is DDIM at eta 1.
euler = sampler(_ddim, eta=0.0)
euler_ancestral = sampler(_ddim, eta=1.0)

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpm_solver,
    "dpm++2m_sde": dpm_solver_sde,
    "unipc": unipc,
}


def find_sampler(name: str) -> Sampler:
    """The sampler `name` of `SAMPLERS`.

    Raises:
        ValueError: unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
