"""Guidance: how strongly a picture follows its condition.

Classifier-free guidance (arXiv 2207.12598) turns a denoiser into a denoiser. Guidance by the gradient of a
classifier or of CLIP (arXiv 2105.05233) changes what a model's output means: a diffusion into a diffusion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from glide_fast.diffusion.process import DenoisedFunction, GaussianDiffusion, Prediction
from glide_fast.sampling.denoiser import Denoiser

GradientFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
MAX_GUIDANCE_SCALE = 100.0


def classifier_free(denoise: Denoiser, scale: float) -> Denoiser:
    """A denoiser on B rows out of one on 2B: conditional rows first, unconditional rows after them.

    epsilon = unconditional + scale (conditional - unconditional): scale 0 ignores the condition, 1 is the
    plain conditional model, GLIDE uses 3. Only the prediction is mixed, learned variances are conditional.
    Predictions of x_0 are mixed by the same formula, which is the same guidance: given x_t, each is a linear
    function of the other.

    Raises:
        ValueError: a scale outside 0 .. 100 or not finite.
    """
    if not 0 <= scale <= MAX_GUIDANCE_SCALE:
        raise ValueError(
            f"guidance scale {scale} must lie in 0 .. {MAX_GUIDANCE_SCALE:.0f}; 0 ignores the prompt, "
            "1 is the plain model, 3 to 5 is usual"
        )

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        output = denoise(torch.cat([x, x]), torch.cat([timesteps, timesteps]))
        conditional, unconditional = output.chunk(2)
        channels = x.shape[1]
        epsilon = unconditional[:, :channels]
        mixed = epsilon + scale * (conditional[:, :channels] - epsilon)
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    return guided


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
        """epsilon - sqrt(1 - alpha_bar) gradient, x_0 not clipped again (arXiv 2105.05233, algorithm 2)."""
        plain = super().predict(model_output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        spread = (1 - self.schedule.at("alphas_cumprod", t, x)).sqrt()
        epsilon = self.predict_epsilon_from_x_start(x, t, plain.x_start)
        epsilon = epsilon - spread * self.gradient(x, self.model_timesteps(t))
        x_start = self.predict_x_start_from_epsilon(x, t, epsilon)
        return plain._replace(x_start=x_start, mean=self.q_posterior(x_start, x, t).mean)
