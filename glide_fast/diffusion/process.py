"""Gaussian diffusion: adding noise, q, and what a model's output says about the step back, p.

DDPM (arXiv 2006.11239) for q and the posterior, Improved DDPM (arXiv 2102.09672) for learned variances. x_0,
the clean picture, is called x_start; x_t is the picture at step t. Steps t are int64 [B], 0 .. T - 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from glide_fast.diffusion.schedule import Schedule

MeanType = Literal["epsilon", "x_start", "previous_x"]
VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
DenoisedFunction: TypeAlias = Callable[[Tensor], Tensor]


class Gaussian(NamedTuple):
    """A diagonal Gaussian over pictures; every field broadcasts to [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_(t-1) | x_t) of the model, and its guess of the clean picture; every field is [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion:
    """A schedule, and what the model's output means.

    `mean_type`: the first C output channels are the noise, the clean picture or the previous picture.
    `variance_type`: "fixed_small" is the posterior variance, "fixed_large" is beta; "learned" reads the
    log-variance from C further channels, "learned_range" reads where it lies between those two, from -1 to 1.
    `rescale_timesteps`: the model sees timesteps as floats scaled to 0 .. 1000.

    Raises:
        ValueError: an unknown mean or variance type.
    """

    schedule: Schedule
    mean_type: MeanType = "epsilon"
    variance_type: VarianceType = "learned_range"
    rescale_timesteps: bool = False

    def __post_init__(self) -> None:
        if self.mean_type not in get_args(MeanType):
            raise ValueError(f"unknown mean type {self.mean_type!r}; known: {', '.join(get_args(MeanType))}")
        if self.variance_type not in get_args(VarianceType):
            known = ", ".join(get_args(VarianceType))
            raise ValueError(f"unknown variance type {self.variance_type!r}; known: {known}")

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return self.schedule.steps

    @property
    def learns_variance(self) -> bool:
        """Whether the model's output has C further channels for the variance."""
        return self.variance_type in ("learned", "learned_range")

    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the model is told at steps t [B]: original timesteps, int64, or float32 when rescaled."""
        timesteps = self.schedule.original_timesteps(t)
        if self.rescale_timesteps:
            return timesteps.float() * (1000.0 / self.schedule.original_steps)
        return timesteps

    def steps_of(self, timesteps: Tensor) -> Tensor:
        """The steps t [B], int64, at which the model is told ``timesteps`` [B]: `model_timesteps` undone."""
        if self.rescale_timesteps:
            timesteps = timesteps * (self.schedule.original_steps / 1000.0)
        return self.schedule.steps_of(timesteps.round().long())

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0) (DDPM, equation 4); the variances are [B, 1, 1, 1]."""
        at = self.schedule.at
        return Gaussian(
            at("sqrt_alphas_cumprod", t, x_start) * x_start,
            at("one_minus_alphas_cumprod", t, x_start),
            at("log_one_minus_alphas_cumprod", t, x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t [B, C, H, W] = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (DDPM, equation 4)."""
        at = self.schedule.at
        return (
            at("sqrt_alphas_cumprod", t, x_start) * x_start
            + at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_(t-1) | x_t, x_0) (DDPM, equations 6 and 7); the variances are [B, 1, 1, 1]."""
        at = self.schedule.at
        mean = at("posterior_mean_coef1", t, x_t) * x_start + at("posterior_mean_coef2", t, x_t) * x_t
        return Gaussian(mean, at("posterior_variance", t, x_t), at("posterior_log_variance_clipped", t, x_t))

    def ddim_step(self, x_start: Tensor, epsilon: Tensor, t: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and deviation [B, 1, 1, 1] of DDIM's step back (arXiv 2010.02502, equation 12).

        `x_start` and `epsilon` are the guesses of the clean picture and of the noise at steps t.
        """
        at = self.schedule.at
        alpha, alpha_prev = at("alphas_cumprod", t, x_start), at("alphas_cumprod_prev", t, x_start)
        # Equation 16; the paper's alpha is DDPM's alpha_bar.
        sigma = eta * torch.sqrt((1 - alpha_prev) / (1 - alpha)) * torch.sqrt(1 - alpha / alpha_prev)
        kept = (1 - alpha_prev - sigma**2).clamp(min=0)  # rounding takes it below zero at eta 1
        return x_start * torch.sqrt(alpha_prev) + torch.sqrt(kept) * epsilon, sigma

    def ddim_step_to_noise(self, x_start: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """x_(t+1) [B, C, H, W] on DDIM's deterministic path (arXiv 2010.02502, section 4.3)."""
        alpha_next = self.schedule.at("alphas_cumprod_next", t, x_start)
        return x_start * torch.sqrt(alpha_next) + torch.sqrt(1 - alpha_next) * epsilon

    def predict_x_start_from_epsilon(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """The clean picture, if `epsilon` is the noise in x_t (DDPM, equation 4 solved for x_0)."""
        at = self.schedule.at
        return (
            at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - at("sqrt_recipm1_alphas_cumprod", t, x_t) * epsilon
        )

    def predict_epsilon_from_x_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise in x_t, if `x_start` is the clean picture (DDPM, equation 4 solved for the noise)."""
        at = self.schedule.at
        return (at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - x_start) / at(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def predict_x_start_from_previous(self, x_t: Tensor, t: Tensor, previous: Tensor) -> Tensor:
        """The clean picture, if `previous` is the posterior mean (DDPM, equation 7 solved for x_0)."""
        at = self.schedule.at
        return at("previous_x_coef1", t, x_t) * previous - at("previous_x_coef2", t, x_t) * x_t

    def predict(
        self,
        model_output: Tensor,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFunction | None = None,
    ) -> Prediction:
        """p(x_(t-1) | x_t) from the model's output [B, C or 2C, H, W] for x [B, C, H, W] at steps t [B].

        The guess of the clean picture goes through `denoised_fn` first and is then clipped to [-1, 1].

        Raises:
            ValueError: the output's shape does not fit x and the variance type.
        """
        output, variance_values = self.split(model_output, x)
        if self.mean_type == "epsilon":
            x_start = self.predict_x_start_from_epsilon(x, t, output)
        elif self.mean_type == "x_start":
            x_start = output
        else:
            x_start = self.predict_x_start_from_previous(x, t, output)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        mean = output if self.mean_type == "previous_x" else self.q_posterior(x_start, x, t).mean
        return Prediction(mean, *self._variance(variance_values, x, t), x_start)

    def push_along(self, prediction: Prediction, x: Tensor, t: Tensor, gradient: Tensor) -> Prediction:
        """The prediction with epsilon - sqrt(1 - alpha_bar) gradient as its noise, x_0 not clipped again.

        `gradient` is that of log p(condition | x_t), [B, C, H, W] (arXiv 2105.05233, algorithm 2).
        """
        spread = (1 - self.schedule.at("alphas_cumprod", t, x)).sqrt()
        epsilon = self.predict_epsilon_from_x_start(x, t, prediction.x_start) - spread * gradient
        x_start = self.predict_x_start_from_epsilon(x, t, epsilon)
        return prediction._replace(x_start=x_start, mean=self.q_posterior(x_start, x, t).mean)

    def split(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output for x [B, C, H, W] in x's dtype: the mean's channels, and the variance's if learned.

        Raises:
            ValueError: the output's shape does not fit x and the variance type.
        """
        self.check_output(model_output, x)
        channels = x.shape[1]
        model_output = model_output.to(x.dtype)
        if self.learns_variance:
            return model_output[:, :channels], model_output[:, channels:]
        return model_output, None

    def check_output(self, model_output: Tensor, x: Tensor) -> None:
        """Raise ``ValueError`` if the output's shape does not fit x and the variance type."""
        channels = x.shape[1] * (2 if self.learns_variance else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model output has shape {tuple(model_output.shape)} but x {tuple(x.shape)} with variance "
                f"type {self.variance_type!r} needs {expected}; check the model's out_channels and image size"
            )

    def _variance(self, values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log-variance [B, C, H, W] of the step back."""
        at = self.schedule.at
        if values is None:
            if self.variance_type == "fixed_large":
                variance, log_variance = (
                    at("fixed_large_variance", t, x),
                    at("fixed_large_log_variance", t, x),
                )
            else:
                variance, log_variance = (
                    at("posterior_variance", t, x),
                    at("posterior_log_variance_clipped", t, x),
                )
            return variance.expand_as(x), log_variance.expand_as(x)
        if self.variance_type == "learned":
            return values.exp(), values
        share = (values + 1) / 2  # the v of Improved DDPM, equation 15
        smallest, largest = at("posterior_log_variance_clipped", t, x), at("log_betas", t, x)
        log_variance = share * largest + (1 - share) * smallest
        return torch.exp(log_variance), log_variance
