"""Which steps a training batch sees: the original projects' ``resample``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from glide_fast.compat.diffusion import GaussianDiffusion
from glide_fast.compat.distributed import world_size
from glide_fast.diffusion.timesteps import LossSecondMomentTimesteps

__all__ = [
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "ScheduleSampler",
    "UniformSampler",
    "create_named_schedule_sampler",
]


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """The sampler "uniform" or "loss-second-moment" over the steps of a diffusion.

    Raises:
        NotImplementedError: another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"unknown schedule sampler: {name}; known: uniform, loss-second-moment")


class ScheduleSampler(ABC):
    """A distribution over steps; subclasses say how likely each is."""

    @abstractmethod
    def weights(self) -> npt.NDArray[np.float64]:
        """How likely each step is, not normalised, [T]."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Steps, int64 [batch_size], and the weight of each one's loss, float32; numpy's global stream."""
        weights = self.weights()
        shares = weights / np.sum(weights)
        steps = np.random.choice(len(shares), size=(batch_size,), p=shares)  # noqa: NPY002
        loss_weights = 1 / (len(shares) * shares[steps])
        return torch.from_numpy(steps).long().to(device), torch.from_numpy(loss_weights).float().to(device)


class UniformSampler(ScheduleSampler):
    """Every step is equally likely."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> npt.NDArray[np.float64]:
        """Ones [T]."""
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from losses, those of all processes."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Take in this process's losses [B] at steps [B]; called by every process at the same time."""
        pairs: list[tuple[list[int], list[float]]] = [(local_ts.tolist(), local_losses.tolist())]
        if world_size() > 1:
            gathered: list[tuple[list[int], list[float]]] = [([], [])] * world_size()
            dist.all_gather_object(gathered, pairs[0])
            pairs = gathered
        self.update_with_all_losses(
            [step for steps, _ in pairs for step in steps], [loss for _, losses in pairs for loss in losses]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses at steps, in order."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps are as likely as the root mean square of their last losses (arXiv 2102.09672, equation 18)."""

    def __init__(
        self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001
    ) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._timesteps = LossSecondMomentTimesteps(diffusion.num_timesteps, history_per_term, uniform_prob)

    def weights(self) -> npt.NDArray[np.float64]:
        """How likely each step is; ones until every step has a full history."""
        return self._timesteps.weights()

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses at steps, in order."""
        self._timesteps.update(torch.tensor(ts), torch.tensor(losses, dtype=torch.float64))
