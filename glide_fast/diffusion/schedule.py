"""Noise schedules: how much of the picture is left after t steps, and which steps a sampler visits.

Tables are float64 NumPy arrays, because products of a thousand factors near one lose digits in float32;
values become float32 only when they are looked up. Notation: DDPM (arXiv 2006.11239); cosine schedule and
respacing: Improved DDPM (arXiv 2102.09672).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatTable: TypeAlias = npt.NDArray[np.float64]
IntTable: TypeAlias = npt.NDArray[np.int64]
TableName = Literal[
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "log_betas",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "previous_x_coef1",
    "previous_x_coef2",
    "fixed_large_variance",
    "fixed_large_log_variance",
]

SCHEDULES = ("linear", "cosine", "squaredcos_cap_v2")
BETA_RAMPS = ("quad", "linear", "warmup10", "warmup50", "const", "jsd")
_FAST27 = (10, 10, 3, 2, 2)


def betas_for_alpha_bar(
    steps: int, alpha_bar: Callable[[float], float], *, max_beta: float = 0.999
) -> FloatTable:
    """Betas [steps] that make prod(1 - beta) follow `alpha_bar`, a function of time in [0, 1].

    beta_i = min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta): Improved DDPM, equation 17.
    """
    _check_steps(steps)
    betas = [
        min(1 - alpha_bar((step + 1) / steps) / alpha_bar(step / steps), max_beta) for step in range(steps)
    ]
    return np.array(betas, dtype=np.float64)


def named_betas(name: str, steps: int) -> FloatTable:
    """Betas [steps] of the schedule `name`: "linear" (DDPM) or "cosine" (Improved DDPM, "squaredcos_cap_v2").

    The linear schedule is scaled by 1000 / steps, so that every length ends at about the same noise level;
    below 20 steps that gives betas above 1, which `Schedule` refuses.

    Raises:
        ValueError: unknown name, or less than one step.
    """
    _check_steps(steps)
    if name == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
    if name in ("cosine", "squaredcos_cap_v2"):
        return betas_for_alpha_bar(steps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(SCHEDULES)}")


def beta_ramp(name: str, steps: int, *, start: float = 0.0001, end: float = 0.02) -> FloatTable:
    """Betas [steps] of the ramps of the first DDPM code (`BETA_RAMPS`), kept for models trained with them.

    Raises:
        ValueError: unknown name, or less than one step.
    """
    _check_steps(steps)
    if name == "quad":
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    if name == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if name in ("warmup10", "warmup50"):
        warmup = int(steps * (0.1 if name == "warmup10" else 0.5))
        betas = np.full(steps, end, dtype=np.float64)
        betas[:warmup] = np.linspace(start, end, warmup, dtype=np.float64)
        return betas
    if name == "const":
        return np.full(steps, end, dtype=np.float64)
    if name == "jsd":
        return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    raise ValueError(f"unknown beta ramp {name!r}; known: {', '.join(BETA_RAMPS)}")


def space_timesteps(steps: int, sections: str | Sequence[int]) -> list[int]:
    """The timesteps, ascending, that a sampler visits out of 0 .. steps - 1.

    `sections` says how many to take, evenly spaced, from each of as many equal sections: `[10, 15, 20]`,
    "10,15,20", or "100" for one section. "ddimN" takes every k-th from 0 on, for the smallest k that gives N.
    "fast27" is GLIDE's hand-made set for its upsampler.

    Raises:
        ValueError: a malformed string, more timesteps wanted than a section has, or no timestep at all.
    """
    _check_steps(steps)
    if sections == "fast27":
        chosen = space_timesteps(steps, _FAST27)
        return [*chosen[:-1], steps - 3]
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _strided(steps, _integer(sections[4:], sections))
    counts = (
        [_integer(part, sections) for part in sections.split(",")] if isinstance(sections, str) else sections
    )
    if not counts or min(counts) < 0 or sum(counts) < 1:
        raise ValueError(
            f"respacing {sections!r} chooses no timestep; every count must be >= 0, one of them > 0"
        )
    size, longer = divmod(steps, len(counts))
    chosen, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"respacing {sections!r} wants {count} timesteps of section {section}, which has {length} "
                f"of the {steps}; use at most {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        offset = 0.0  # accumulated rather than multiplied: published samplers round exactly this sum
        for _ in range(count):
            chosen.append(start + round(offset))
            offset += stride
        start += length
    return sorted(set(chosen))


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise ValueError(
        f"no stride gives {count} of {steps} timesteps; use 'ddimN' with N near {steps} / k, or a plain N"
    )


def _integer(text: str, sections: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"respacing {sections!r} is not understood; use '100', '10,15,20', 'ddim50' or 'fast27'"
        ) from None


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1; published models use 1000 or 4000")


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """Every table of a diffusion with T steps (float64, [T]), and its steps' places in the training schedule.

    Fields: `betas` [T], each in (0, 1]; `timestep_map` [T]: the original timestep of each step, which the
    model sees; `original_steps`: the length of the training schedule. Build it with `create`.
    """

    betas: FloatTable
    timestep_map: IntTable
    original_steps: int
    _tensors: dict[tuple[Hashable, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) < 2:
            raise ValueError(
                f"betas have shape {self.betas.shape}; a schedule needs a row of at least 2 steps"
            )
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError(
                f"betas lie in [{self.betas.min():.3g}, {self.betas.max():.3g}] but must lie in (0, 1]; "
                "use at least 20 steps with 'linear', or 'cosine'"
            )
        if self.timestep_map.shape != self.betas.shape:
            raise ValueError(
                f"timestep_map {self.timestep_map.shape} must be as long as betas {self.betas.shape}"
            )

    @classmethod
    def create(cls, name: str, steps: int = 1000, respacing: str | Sequence[int] = "") -> "Schedule":
        """The named schedule with `steps` training steps, of which a sampler visits `respacing` ("" = all).

        Raises:
            ValueError: as `named_betas` and `space_timesteps`; also fewer than 2 steps, or betas above 1.
        """
        return cls.from_betas(named_betas(name, steps), space_timesteps(steps, respacing or [steps]))

    @classmethod
    def from_betas(cls, betas: FloatTable, timesteps: Sequence[int]) -> "Schedule":
        """The schedule that visits `timesteps` (ascending) of training betas [steps], at their noise levels.

        Betas are recomputed as 1 - alpha_bar_i / alpha_bar_(i-1) even when nothing is skipped (Improved DDPM,
        equation 19).
        """
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas lie in [{betas.min():.3g}, {betas.max():.3g}] but must lie in (0, 1]; "
                "use at least 20 steps with 'linear', or 'cosine'"
            )
        timestep_map = np.asarray(timesteps, dtype=np.int64)
        kept = np.cumprod(1.0 - betas)[timestep_map]
        return cls(
            betas=1.0 - kept / np.append(1.0, kept[:-1]), timestep_map=timestep_map, original_steps=len(betas)
        )

    @property
    def steps(self) -> int:
        """T, the number of steps visited."""
        return len(self.betas)

    def at(self, table: TableName, t: Tensor, like: Tensor) -> Tensor:
        """Values of `table` at steps t [B], float32 on the device of `like` [B, ...], shaped [B, 1, ...].

        The device copy is made once, as float32: rounding before indexing gives the same bits as after it.
        """
        return self._tensor(table, like.device)[t].view(-1, *[1] * (like.dim() - 1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """Timesteps of the training schedule, int64 [B], for steps t [B]."""
        return self._tensor("timestep_map", t.device)[t]

    def steps_of(self, timesteps: Tensor) -> Tensor:
        """The steps t, int64 [B], that visit ``timesteps`` of the training schedule [B]."""
        return torch.searchsorted(self._tensor("timestep_map", timesteps.device), timesteps)

    def first(self, steps: int) -> "Schedule":
        """The schedule that ends, and so begins to sample, after its first ``steps``: for noised pictures.

        Raises:
            ValueError: not in 2 .. T.
        """
        if not 2 <= steps <= self.steps:
            raise ValueError(f"steps {steps} must lie in 2 .. {self.steps}, the steps of the schedule")
        return Schedule(
            betas=self.betas[:steps],
            timestep_map=self.timestep_map[:steps],
            original_steps=self.original_steps,
        )

    def kept(self, name: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, on the device: made once, and there as long as this schedule."""
        key = (name, device)
        if key not in self._tensors:
            # A copy made while sampling must remain usable in training.
            with torch.inference_mode(mode=False):
                self._tensors[key] = make().to(device)
        return self._tensors[key]

    def _tensor(self, table: str, device: torch.device) -> Tensor:
        def make() -> Tensor:
            values = getattr(self, table)
            return torch.from_numpy(values if values.dtype == np.int64 else values.astype(np.float32))

        return self.kept(table, device, make)

    @cached_property
    def alphas_cumprod(self) -> FloatTable:
        """alpha_bar_t = prod(1 - beta): how much of the picture's variance is left (DDPM, equation 4)."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> FloatTable:
        """alpha_bar_(t-1), 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> FloatTable:
        """alpha_bar_(t+1), 0 after the last step."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> FloatTable:
        """sqrt(alpha_bar): the picture's weight in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def one_minus_alphas_cumprod(self) -> FloatTable:
        """1 - alpha_bar: the variance of the noise in x_t."""
        return 1.0 - self.alphas_cumprod

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> FloatTable:
        """sqrt(1 - alpha_bar): the noise's weight in x_t."""
        return np.sqrt(self.one_minus_alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> FloatTable:
        """log(1 - alpha_bar)."""
        return np.log(self.one_minus_alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> FloatTable:
        """sqrt(1 / alpha_bar); infinite where a beta is 1."""
        with np.errstate(divide="ignore"):
            return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> FloatTable:
        """sqrt(1 / alpha_bar - 1); infinite where a beta is 1."""
        with np.errstate(divide="ignore"):
            return np.sqrt(1.0 / self.alphas_cumprod - 1)

    @cached_property
    def log_betas(self) -> FloatTable:
        """log(beta): the upper end of a learned log-variance (Improved DDPM, equation 15)."""
        return np.log(self.betas)

    @cached_property
    def posterior_variance(self) -> FloatTable:
        """beta_tilde, the variance of q(x_(t-1) | x_t, x_0) (DDPM, equation 7); 0 at step 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_log_variance_clipped(self) -> FloatTable:
        """log(beta_tilde) with the value of step 1 at step 0, where it would be minus infinity."""
        values: FloatTable = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        return values

    @cached_property
    def posterior_mean_coef1(self) -> FloatTable:
        """The weight of x_0 in the posterior mean (DDPM, equation 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_mean_coef2(self) -> FloatTable:
        """The weight of x_t in the posterior mean (DDPM, equation 7)."""
        kept = np.sqrt(1.0 - self.betas)
        return (1.0 - self.alphas_cumprod_prev) * kept / self.one_minus_alphas_cumprod

    @cached_property
    def previous_x_coef1(self) -> FloatTable:
        """The weight of x_(t-1) when the posterior mean is solved for x_0."""
        return 1.0 / self.posterior_mean_coef1

    @cached_property
    def previous_x_coef2(self) -> FloatTable:
        """The weight of -x_t when the posterior mean is solved for x_0."""
        return self.posterior_mean_coef2 / self.posterior_mean_coef1

    @cached_property
    def fixed_large_variance(self) -> FloatTable:
        """beta with beta_tilde_1 at step 0: the upper fixed variance, whose last step stays sharp."""
        return np.append(self.posterior_variance[1], self.betas[1:])

    @cached_property
    def fixed_large_log_variance(self) -> FloatTable:
        """log of `fixed_large_variance`."""
        return np.log(self.fixed_large_variance)
