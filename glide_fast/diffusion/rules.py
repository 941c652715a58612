"""The steps of DDPM and DDIM as tables of coefficients, for :func:`glide_fast.ops.sampler_step`.

A rule says in one row a timestep what the methods of :class:`~glide_fast.diffusion.process.GaussianDiffusion`
compute one after the other, with the same roundings: the same pictures, in one pass over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion, VarianceType
from glide_fast.diffusion.schedule import TableName
from glide_fast.ops.sampler_step import COLUMNS, Deviation, StepRule

_DEVIATIONS: dict[VarianceType, Deviation] = {"learned": "learned", "learned_range": "learned_range"}


def ddpm_rule(diffusion: GaussianDiffusion, *, clip: bool, device: torch.device) -> StepRule:
    """The ancestral step (arXiv 2006.11239, algorithm 2), with the variance of the model."""

    def columns() -> dict[str, Tensor]:
        found = _guess(diffusion) | {
            "mean_start": _column(diffusion, "posterior_mean_coef1"),
            "mean_direction": _column(diffusion, "posterior_mean_coef2"),
        }
        if diffusion.learns_variance:
            found["low"] = _column(diffusion, "posterior_log_variance_clipped")
            found["high"] = _column(diffusion, "log_betas")
        else:
            large = diffusion.variance_type == "fixed_large"
            log_variance: TableName = (
                "fixed_large_log_variance" if large else "posterior_log_variance_clipped"
            )
            found["low"] = torch.exp(0.5 * _column(diffusion, log_variance))
        return found

    return StepRule(
        table=_table(diffusion, ("ddpm", diffusion.variance_type), columns, device),
        deviation=_DEVIATIONS.get(diffusion.variance_type, "table"),
        direction="output" if diffusion.mean_type == "previous_x" else "x",
        clip=clip,
    )


def ddim_rule(diffusion: GaussianDiffusion, eta: float, *, clip: bool, device: torch.device) -> StepRule:
    """The step of :meth:`GaussianDiffusion.ddim_step` (arXiv 2010.02502, equation 12)."""

    def columns() -> dict[str, Tensor]:
        one, t = _ones(diffusion)
        # Linear in the guess of x_0 and in the noise: each factor comes out where the other is 0.
        mean_start, sigma = diffusion.ddim_step(one, 0 * one, t, eta)
        mean_noise, _ = diffusion.ddim_step(0 * one, one, t, eta)
        return _implicit(diffusion, mean_start, mean_noise, sigma)

    table = _table(diffusion, ("ddim", eta), columns, device)
    return StepRule(table=table, deviation="table", direction="noise", clip=clip)


def ddim_encode_rule(diffusion: GaussianDiffusion, *, clip: bool, device: torch.device) -> StepRule:
    """The step of :meth:`GaussianDiffusion.ddim_step_to_noise` (arXiv 2010.02502, section 4.3)."""

    def columns() -> dict[str, Tensor]:
        one, t = _ones(diffusion)
        mean_start = diffusion.ddim_step_to_noise(one, 0 * one, t)
        mean_noise = diffusion.ddim_step_to_noise(0 * one, one, t)
        return _implicit(diffusion, mean_start, mean_noise, 0 * one)

    table = _table(diffusion, ("ddim_encode",), columns, device)
    return StepRule(table=table, deviation="table", direction="noise", clip=clip)


def _implicit(
    diffusion: GaussianDiffusion, mean_start: Tensor, mean_noise: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    return _guess(diffusion) | {
        "mean_start": mean_start,
        "mean_direction": mean_noise,
        "noise_x": _column(diffusion, "sqrt_recip_alphas_cumprod"),
        "noise_start": _column(diffusion, "sqrt_recipm1_alphas_cumprod"),
        "low": sigma,
    }


def _guess(diffusion: GaussianDiffusion) -> dict[str, Tensor]:
    """The weights of x and of the output in the guess of x_0."""
    if diffusion.mean_type == "epsilon":
        return {
            "guess_x": _column(diffusion, "sqrt_recip_alphas_cumprod"),
            "guess_output": -_column(diffusion, "sqrt_recipm1_alphas_cumprod"),
        }
    if diffusion.mean_type == "previous_x":
        return {
            "guess_x": -_column(diffusion, "previous_x_coef2"),
            "guess_output": _column(diffusion, "previous_x_coef1"),
        }
    return {"guess_output": _ones(diffusion)[0]}


def _ones(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor]:
    """Ones [T, 1], and all timesteps [T]."""
    return torch.ones(diffusion.steps, 1), torch.arange(diffusion.steps)


def _column(diffusion: GaussianDiffusion, name: TableName) -> Tensor:
    """A table of the schedule, float32 [T, 1]."""
    one, t = _ones(diffusion)
    return diffusion.schedule.at(name, t, one)


def _table(
    diffusion: GaussianDiffusion,
    name: tuple[object, ...],
    columns: Callable[[], dict[str, Tensor]],
    device: torch.device,
) -> Tensor:
    """The table [T, 8] on the device, which the schedule keeps."""

    def make() -> Tensor:
        found = columns()
        absent = torch.zeros_like(found["guess_output"])
        return torch.cat([found.get(column, absent) for column in COLUMNS], dim=1)

    return diffusion.schedule.kept((diffusion.mean_type, *name), device, make)
