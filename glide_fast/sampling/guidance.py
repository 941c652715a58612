"""Guidance: how strongly a picture follows its condition.

Guidance is a function from denoiser to denoiser, so that kinds combine: classifier-free (arXiv 2207.12598),
only in an interval of noise levels, along a gradient (:mod:`glide_fast.sampling.gradients` has those of a
classifier and of CLIP). The two diffusions below push along a gradient in the place where the published
samplers do, after the guess of x_0 was clipped, and give their pictures.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from glide_fast.diffusion.process import DenoisedFunction, GaussianDiffusion, Prediction
from glide_fast.sampling.denoiser import Denoiser
from glide_fast.sampling.graph import Capturable, capturable

GradientFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
MAX_GUIDANCE_SCALE = 100.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierFree(Capturable):
    """A guided denoiser, as :func:`classifier_free` makes it; samplers may mix its two halves themselves.

    A graph holds it with both numbers on the device, where they can change.
    """

    denoise: Denoiser  # on 2B rows
    scale: float | Tensor
    rescale: float | Tensor

    @property
    def rescales(self) -> bool:
        """Whether any contrast is taken back."""
        return isinstance(self.rescale, Tensor) or self.rescale > 0

    def halves(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The output for B conditional rows and B unconditional ones after them, [2B, C or 2C, H, W]."""
        return self.denoise(torch.cat([x, x]), torch.cat([timesteps, timesteps]))

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The guided output [B, C or 2C, H, W]."""
        conditional, unconditional = self.halves(x, timesteps).chunk(2)
        channels = x.shape[1]
        epsilon = unconditional[:, :channels]
        mixed = epsilon + self.scale * (conditional[:, :channels] - epsilon)
        if self.rescales:
            ratio = _deviation(conditional[:, :channels]) / _deviation(mixed)
            mixed = mixed * (1 - self.rescale + self.rescale * ratio)
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return capturable(self.denoise).networks

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        numbers = (self.scale, self.rescale) if self.rescales else (self.scale,)
        own = (torch.as_tensor(number, dtype=torch.float32) for number in numbers)
        return *own, *capturable(self.denoise).inputs

    @property
    def recipe(self) -> Hashable:
        return type(self), self.rescales, capturable(self.denoise).recipe

    def reading(self, inputs: Sequence[Tensor]) -> "ClassifierFree":
        denoise: Any = capturable(self.denoise)
        if not self.rescales:
            return replace(self, scale=inputs[0], denoise=denoise.reading(inputs[1:]))
        return replace(self, scale=inputs[0], rescale=inputs[1], denoise=denoise.reading(inputs[2:]))


def classifier_free(denoise: Denoiser, scale: float, *, rescale: float = 0.0) -> ClassifierFree:
    """A denoiser on B rows out of one on 2B: conditional rows first, unconditional rows after them.

    epsilon = unconditional + scale (conditional - unconditional): scale 0 ignores the condition, 1 is the
    plain conditional model, GLIDE uses 3. Only the prediction is mixed, learned variances are conditional.
    Predictions of x_0 are mixed by the same formula, which is the same guidance: given x_t, each is a linear
    function of the other. ``rescale`` from 0 to 1 takes back that share of the contrast that large scales
    add: the prediction gets the conditional one's standard deviation (arXiv 2305.08891, equations 15, 16).

    Raises:
        ValueError: a scale outside 0 .. 100 or a rescale outside 0 .. 1, or not finite.
    """
    if not 0 <= scale <= MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"guidance scale {scale} must lie in 0 .. {MAX_GUIDANCE_SCALE:.0f}; 0 ignores the prompt, "
            "1 is the plain model, 3 to 5 is usual"
        )
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale {rescale} must lie in 0 .. 1; 0 leaves it out, 0.7 is usual")

    return ClassifierFree(denoise=denoise, scale=scale, rescale=rescale)


def within(guided: Denoiser, plain: Denoiser, *, first: int, last: int) -> Denoiser:
    """``guided`` at timesteps of training in first .. last, both included, ``plain`` at others.

    Guidance in the middle of the noise levels keeps its gain and loses less diversity, and ``plain`` may cost
    half (arXiv 2404.07724). All pictures of a batch must be at the same timestep.

    Raises:
        ValueError: the interval is empty.
    """
    if not 0 <= first <= last:
        raise ValueError(f"guidance interval {first} .. {last} is empty; 0 <= first <= last must hold")

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        inside = bool(((timesteps >= first) & (timesteps <= last)).all())
        return (guided if inside else plain)(x, timesteps)

    return denoise


def along_gradient(denoise: Denoiser, gradient: GradientFunction, diffusion: GaussianDiffusion) -> Denoiser:
    """A denoiser whose prediction is pushed along the gradient of log p(condition | x_t).

    epsilon - sqrt(1 - alpha_bar) gradient (arXiv 2105.05233, equation 14), or what that means for predictions
    of x_0 or of the previous x. Works with every sampler; learned variances stay.
    """

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        output = denoise(x, timesteps)
        t = diffusion.steps_of(timesteps)
        at, channels = diffusion.schedule.at, x.shape[1]
        push = gradient(x, timesteps).to(output.dtype)
        if diffusion.mean_type == "epsilon":
            push = -at("sqrt_one_minus_alphas_cumprod", t, x) * push
        else:  # x_0 moves by (1 - alpha_bar) / sqrt(alpha_bar) times the gradient
            push = at("one_minus_alphas_cumprod", t, x) / at("sqrt_alphas_cumprod", t, x) * push
            if diffusion.mean_type == "previous_x":
                push = at("posterior_mean_coef1", t, x) * push
        return torch.cat([output[:, :channels] + push, output[:, channels:]], dim=1)

    return guided


def _deviation(pictures: Tensor) -> Tensor:
    """The standard deviation of each picture, [B, 1, ...]."""
    return pictures.flatten(1).std(dim=1).view(-1, *[1] * (pictures.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class MeanGuidedDiffusion(GaussianDiffusion):
    """A diffusion whose step back is pushed along `gradient`, for `ddpm`.

    `gradient(x, timesteps)` is that of log p(condition | x_t), [B, C, H, W]. Samplers run in inference mode:
    a gradient by autograd needs `torch.inference_mode(False)`, `torch.enable_grad()` and a clone of x inside.
    """

    gradient: GradientFunction

    def predict(
        self,
        model_output: Tensor,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
    ) -> Prediction:
        """The plain prediction with variance * gradient added to the mean (arXiv 2105.05233, algorithm 1)."""
        plain = super().predict(model_output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        push = self.gradient(x, self.model_timesteps(t)).float()
        return plain._replace(mean=plain.mean + plain.variance * push)


@dataclass(frozen=True, kw_only=True)
class ScoreGuidedDiffusion(GaussianDiffusion):
    """A diffusion whose predicted noise is pushed along `gradient`, for `ddim`; see `MeanGuidedDiffusion`."""

    gradient: GradientFunction

    def predict(
        self,
        model_output: Tensor,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
    ) -> Prediction:
        """The plain prediction pushed along the gradient (arXiv 2105.05233, algorithm 2)."""
        plain = super().predict(model_output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        return self.push_along(plain, x, t, self.gradient(x, self.model_timesteps(t)))
