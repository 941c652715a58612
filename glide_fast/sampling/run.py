"""What all samplers share: the arguments, the loop, the progress bar, the checks.

A sampler is written as a rule: a generator that takes a :class:`Run` and yields x and the guess of x_0 after
each step. :func:`sampler` makes the function that users call out of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from glide_fast.diffusion.process import DenoisedFunction, GaussianDiffusion, Prediction
from glide_fast.ops import StepRule, sampler_step
from glide_fast.sampling.denoiser import Denoiser, NoiseSource, global_noise
from glide_fast.sampling.guidance import ClassifierFree


@dataclass(frozen=True, kw_only=True)
class Step:
    """After a step: its number from 0, its timestep in training, x [B, C, H, W] and the guess of x_0."""

    index: int
    timestep: int
    x: Tensor
    x_start: Tensor


StepCallback = Callable[[Step], None]


class Level(NamedTuple):
    """A noise level: x = alpha x_0 + sigma noise, with alpha^2 + sigma^2 = 1."""

    alpha: float
    sigma: float

    @property
    def log_ratio(self) -> float:
        """lambda = log(alpha / sigma), infinite without noise (DPM-Solver, arXiv 2206.00927)."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = Level(1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of a sampler, as its rule sees it; ``x`` is the start."""

    denoise: Denoiser
    x: Tensor
    diffusion: GaussianDiffusion
    noise: NoiseSource
    eta: float
    clip_denoised: bool
    denoised_fn: DenoisedFunction | None

    @property
    def countdown(self) -> range:
        """The steps from the noisiest, T - 1, to 0."""
        return range(self.diffusion.steps)[::-1]

    def t(self, step: int) -> Tensor:
        """``step`` for each picture, int64 [B]."""
        return torch.full((self.x.shape[0],), step, dtype=torch.int64, device=self.x.device)

    def predict(self, x: Tensor, step: int) -> Prediction:
        """One evaluation of the denoiser at ``step``."""
        t = self.t(step)
        output = self.denoise(x, self.diffusion.model_timesteps(t))
        return self.diffusion.predict(
            output, x, t, clip_denoised=self.clip_denoised, denoised_fn=self.denoised_fn
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing comes between the denoiser's output and the step, so that `move` serves."""
        return type(self.diffusion) is GaussianDiffusion and self.denoised_fn is None

    @cached_property
    def guided(self) -> ClassifierFree | None:
        """The denoiser, if it mixes two halves by a formula that a step can compute as well."""
        return self.denoise if isinstance(self.denoise, ClassifierFree) and not self.denoise.rescale else None

    @cached_property
    def guidance(self) -> Tensor | None:
        """The scale of `guided` [1], on the device of x."""
        return None if self.guided is None else torch.full((1,), self.guided.scale, device=self.x.device)

    def move(self, rule: StepRule, x: Tensor, step: int, *, noisy: bool = True) -> tuple[Tensor, Tensor]:
        """One evaluation of the denoiser, and all that follows in one pass: the next x, the guess of x_0."""
        t = self.t(step)
        evaluate = self.denoise if self.guided is None else self.guided.halves
        output = evaluate(x, self.diffusion.model_timesteps(t))
        self.diffusion.check_output(output[: x.shape[0]], x)
        noise = self.draw() if noisy else None
        return sampler_step(x, output, t, rule, noise=noise, guidance=self.guidance)

    def limit(self, x_start: Tensor) -> Tensor:
        """An extrapolated guess of x_0 treated as the denoiser's own: ``denoised_fn``, then the clip."""
        if self.denoised_fn is not None:
            x_start = self.denoised_fn(x_start)
        return x_start.clamp(-1, 1) if self.clip_denoised else x_start

    def draw(self) -> Tensor:
        """The next standard normals, of the shape of x."""
        return self.noise(self.x.shape, self.x.device)

    def level(self, step: int) -> Level:
        """The noise of x at ``step``; none at -1, after the last step."""
        if step < 0:
            return CLEAN
        kept = float(self.diffusion.schedule.alphas_cumprod[step])
        return Level(math.sqrt(kept), math.sqrt(1 - kept))

    def growth(self, step: int) -> float:
        """h, by how much lambda grows from `step` to the next; infinite from step 0."""
        return self.level(step - 1).log_ratio - self.level(step).log_ratio


Rule = Callable[[Run], Iterator[tuple[Tensor, Tensor]]]


class Sampler(Protocol):
    """What all samplers have in common."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        diffusion: GaussianDiffusion,
        *,
        noise: NoiseSource = global_noise,
        eta: float | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """x_0 [B, C, H, W] from x_T [B, C, H, W], float32.

        ``eta`` scales the noise that is added each step, for samplers that have a choice; None is the
        sampler's usual. ``denoised_fn`` changes each guess of x_0 before it is clipped to [-1, 1];
        ``callback`` sees every step; ``progress`` shows a bar.

        Raises:
            ValueError: x is not float32, the denoiser's output does not fit, or eta is out of range.
        """


def sampler(rule: Rule, *, eta: float | None = None, upwards: bool = False) -> Sampler:
    """The function that users call, from a rule.

    ``eta`` is the usual value for a rule that reads ``run.eta``, None for one that does not; ``upwards``
    says that the rule goes from the picture to the noise.
    """
    usual, name = eta, rule.__name__.lstrip("_")

    def sample(
        denoise: Denoiser,
        x: Tensor,
        diffusion: GaussianDiffusion,
        *,
        noise: NoiseSource = global_noise,
        eta: float | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
    ) -> Tensor:
        run = Run(
            denoise=denoise,
            x=_checked(x),
            diffusion=diffusion,
            noise=noise,
            eta=_checked_eta(eta, usual, name),
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
        )
        order = run.countdown[::-1] if upwards else run.countdown
        with torch.inference_mode():
            states = tqdm(rule(run), total=len(order), desc="sampling", unit="step", disable=not progress)
            for (index, step), (x, x_start) in zip(enumerate(order), states, strict=True):
                if callback is not None:
                    timestep = int(diffusion.schedule.timestep_map[step])
                    callback(Step(index=index, timestep=timestep, x=x, x_start=x_start))
        return x.clone()  # a normal tensor, which the caller may change and differentiate

    sample.__name__, sample.__doc__ = name, rule.__doc__
    return sample


def _checked(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.dim() < 2:
        raise ValueError(
            f"x is {x.dtype} with shape {tuple(x.shape)}; samplers keep float32 [B, C, H, W]: "
            "use initial_noise, or x.float()"
        )
    return x.contiguous()


def _checked_eta(eta: float | None, usual: float | None, name: str) -> float:
    if eta is None:
        return usual or 0.0
    if usual is None:
        raise ValueError(f"sampler {name!r} has no eta to choose, but eta {eta} is given; leave it out")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must lie in [0, 1]; 0 is deterministic, 1 is as random as DDPM")
    return eta
