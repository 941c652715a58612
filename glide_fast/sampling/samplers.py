"""Samplers: from noise to a picture, one function an algorithm.

Each takes the start x_T and gives x_0. Loops run in inference mode and draw one noise tensor for the whole
batch every step, also where its weight is zero, so that a seed gives the pictures of the published code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from glide_fast.diffusion.process import DenoisedFunction, GaussianDiffusion
from glide_fast.sampling.denoiser import Denoiser, NoiseSource, global_noise


@dataclass(frozen=True, kw_only=True)
class Step:
    """After a step: its number from 0, its timestep in training, x [B, C, H, W] and the guess of x_0."""

    index: int
    timestep: int
    x: Tensor
    x_start: Tensor


StepCallback = Callable[[Step], None]


class Sampler(Protocol):
    """What all samplers have in common."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        diffusion: GaussianDiffusion,
        *,
        noise: NoiseSource = global_noise,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """x_0 [B, C, H, W] from x_T [B, C, H, W]."""


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise: NoiseSource = global_noise,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFunction | None = None,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Ancestral sampling (DDPM, arXiv 2006.11239, algorithm 2): x_0 [B, C, H, W] from noise x, float32.

    `denoised_fn` changes each guess of x_0 before it is clipped to [-1, 1]; `callback` sees every step;
    `progress` shows a bar.

    Raises:
        ValueError: x is not float32, or the denoiser's output does not fit.
    """
    with torch.inference_mode():
        x = _checked(x)
        for index, t, timestep in _countdown(diffusion, x, progress=progress):
            output = denoise(x, diffusion.model_timesteps(t))
            p = diffusion.predict(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
            z = noise(x.shape, x.device)
            last = index == diffusion.steps - 1
            x = p.mean if last else p.mean + torch.exp(0.5 * p.log_variance) * z
            if callback is not None:
                callback(Step(index=index, timestep=timestep, x=x, x_start=p.x_start))
    return x.clone()  # a normal tensor, which the caller may change and differentiate


def ddim(
    denoise: Denoiser,
    x: Tensor,
    diffusion: GaussianDiffusion,
    *,
    eta: float = 0.0,
    noise: NoiseSource = global_noise,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFunction | None = None,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12): deterministic given x at eta 0, as random as DDPM at eta 1.

    Other arguments, shapes and errors as for `ddpm`.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must lie in [0, 1]; 0 is deterministic, 1 is as random as DDPM")
    at = diffusion.schedule.at
    with torch.inference_mode():
        x = _checked(x)
        for index, t, timestep in _countdown(diffusion, x, progress=progress):
            output = denoise(x, diffusion.model_timesteps(t))
            p = diffusion.predict(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
            epsilon = diffusion.predict_epsilon_from_x_start(x, t, p.x_start)
            alpha, alpha_prev = at("alphas_cumprod", t, x), at("alphas_cumprod_prev", t, x)
            # Equation 16; the paper's alpha is DDPM's alpha_bar.
            sigma = eta * torch.sqrt((1 - alpha_prev) / (1 - alpha)) * torch.sqrt(1 - alpha / alpha_prev)
            z = noise(x.shape, x.device)
            kept = (1 - alpha_prev - sigma**2).clamp(min=0)  # rounding takes it below zero at eta 1
            mean = p.x_start * torch.sqrt(alpha_prev) + torch.sqrt(kept) * epsilon
            x = mean if index == diffusion.steps - 1 else mean + sigma * z
            if callback is not None:
                callback(Step(index=index, timestep=timestep, x=x, x_start=p.x_start))
    return x.clone()


def ddim_encode(
    denoise: Denoiser,
    x: Tensor,
    diffusion: GaussianDiffusion,
    *,
    clip_denoised: bool = True,
    callback: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """DDIM at eta 0 run backwards (arXiv 2010.02502, section 4.3): the noise x_T that leads to picture x.

    Shapes and errors as for `ddpm`.
    """
    at = diffusion.schedule.at
    with torch.inference_mode():
        x = _checked(x)
        for index, t, timestep in _countdown(diffusion, x, progress=progress, upwards=True):
            output = denoise(x, diffusion.model_timesteps(t))
            p = diffusion.predict(output, x, t, clip_denoised=clip_denoised)
            epsilon = diffusion.predict_epsilon_from_x_start(x, t, p.x_start)
            alpha_next = at("alphas_cumprod_next", t, x)
            x = p.x_start * torch.sqrt(alpha_next) + torch.sqrt(1 - alpha_next) * epsilon
            if callback is not None:
                callback(Step(index=index, timestep=timestep, x=x, x_start=p.x_start))
    return x.clone()


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim}


def find_sampler(name: str) -> Sampler:
    """The sampler `name` of `SAMPLERS`.

    Raises:
        ValueError: unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _countdown(
    diffusion: GaussianDiffusion, x: Tensor, *, progress: bool, upwards: bool = False
) -> Iterator[tuple[int, Tensor, int]]:
    """Each step's number from 0, its t [B] from T - 1 down to 0 (or up from 0), its timestep in training."""
    order = range(diffusion.steps) if upwards else range(diffusion.steps)[::-1]
    for index, step in enumerate(tqdm(order, desc="sampling", unit="step", disable=not progress)):
        t = torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)
        yield index, t, int(diffusion.schedule.timestep_map[step])


def _checked(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() < 2:
        raise ValueError(
            f"x is {x.dtype} with shape {tuple(x.shape)}; samplers keep float32 [B, C, H, W]: "
            "use initial_noise, or x.float()"
        )
    return x.contiguous()
