"""Which steps a training batch sees: uniformly drawn, or more often where the noise or the loss is large.

Importance sampling by the loss's second moment: Improved DDPM (arXiv 2102.09672, equation 18). A weight of
1 / (T p(t)) keeps the expected loss that of uniform steps.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Generator = np.random.Generator | np.random.RandomState


class TimestepSampler(Protocol):
    """Draws training steps and learns from their losses."""

    def sample(self, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Steps, int64 [batch], and the weight of each one's loss, float32 [batch]."""

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Takes in the unweighted losses [B] of steps [B]."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`."""


class UniformTimesteps:
    """Every step of 0 .. count - 1 is equally likely, and every weight is 1."""

    def __init__(self, count: int) -> None:
        self.count = _check_count(count)

    def weights(self) -> npt.NDArray[np.float64]:
        """How likely each step is, not normalised, [count]."""
        return np.ones(self.count)

    def sample(self, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Steps, int64 [batch], and the weight of each one's loss, float32 [batch]."""
        return _draw(self.weights(), batch, generator)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Losses do not matter here."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accepts an empty state.

        Raises:
            ValueError: the state belongs to another sampler.
        """
        if state:
            raise ValueError(
                f"uniform timesteps have no state but got {sorted(state)}; use the sampler that saved it"
            )


class NoisyTimesteps(UniformTimesteps):
    """Step t is as likely as t + 1 is large, and every weight is 1: noisy steps count more.

    What a picture shows is decided, and a caption learned, where little of the picture is left. A data set of
    a few thousand captions is learned in fewer steps when those are drawn more often.
    """

    def weights(self) -> npt.NDArray[np.float64]:
        """How likely each step is, not normalised, [count]."""
        return np.arange(1.0, self.count + 1)

    def sample(self, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Steps, int64 [batch], and ones, float32 [batch]."""
        steps, _ = super().sample(batch, generator)
        return steps, torch.ones(batch)


class LossSecondMomentTimesteps:
    """Steps are as likely as the root mean square of their last `history` losses, once each has so many.

    `uniform_probability` of the draws stay uniform, so that no step starves.

    Raises:
        ValueError: count or history below 1, or a probability outside [0, 1].
    """

    def __init__(self, count: int, history: int = 10, uniform_probability: float = 0.001) -> None:
        if history < 1:
            raise ValueError(f"history {history} must be at least 1; the usual value is 10")
        if not 0 <= uniform_probability <= 1:
            raise ValueError(
                f"uniform_probability {uniform_probability} must lie in [0, 1]; the usual value is 0.001"
            )
        self.count = _check_count(count)
        self.uniform_probability = uniform_probability
        self._losses = np.zeros((count, history))  # the oldest first
        self._seen = np.zeros(count, dtype=np.int64)

    @property
    def warmed_up(self) -> bool:
        """Whether every step has a full history; until then steps are uniform."""
        return bool((self._seen == self._losses.shape[1]).all())

    def weights(self) -> npt.NDArray[np.float64]:
        """How likely each step is, not normalised before the histories are full, [count]."""
        if not self.warmed_up:
            return np.ones(self.count)
        moments = np.sqrt(np.mean(self._losses**2, axis=-1))
        total = moments.sum()
        shares = moments / total if total > 0 else np.full(self.count, 1 / self.count)
        return shares * (1 - self.uniform_probability) + self.uniform_probability / self.count

    def sample(self, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Steps, int64 [batch], and the weight of each one's loss, float32 [batch]."""
        return _draw(self.weights(), batch, generator)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Takes in the unweighted losses [B] of steps [B], in order.

        Raises:
            ValueError: a loss is not finite, which would spoil every later draw.
        """
        values = losses.detach().double().cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"losses must be finite but are {values}; stop the run and look at its log")
        history = self._losses.shape[1]
        for step, loss in zip(timesteps.tolist(), values, strict=True):
            if self._seen[step] == history:
                self._losses[step, :-1] = self._losses[step, 1:]
                self._losses[step, -1] = loss
            else:
                self._losses[step, self._seen[step]] = loss
                self._seen[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Loss histories, float64 [count, history], and how many of each are filled, int64 [count]."""
        return {"losses": torch.from_numpy(self._losses.copy()), "seen": torch.from_numpy(self._seen.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: the state has other entries or shapes.
        """
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"timestep sampler state {name!r} should have shape {tuple(own.shape)} but is {found}; "
                    "use the count and history it was saved with"
                )
        self._losses = state["losses"].double().cpu().numpy().copy()
        self._seen = state["seen"].long().cpu().numpy().copy()


TIMESTEP_SAMPLERS = ("uniform", "noisy", "loss_second_moment")


def timestep_sampler(name: str, count: int) -> TimestepSampler:
    """The sampler `name` of `TIMESTEP_SAMPLERS` over steps 0 .. count - 1.

    Raises:
        ValueError: unknown name, or count below 1.
    """
    if name == "uniform":
        return UniformTimesteps(count)
    if name == "noisy":
        return NoisyTimesteps(count)
    if name == "loss_second_moment":
        return LossSecondMomentTimesteps(count)
    raise ValueError(f"unknown timestep sampler {name!r}; known: {', '.join(TIMESTEP_SAMPLERS)}")


def _draw(weights: npt.NDArray[np.float64], batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    probabilities = weights / weights.sum()
    steps = generator.choice(len(probabilities), size=(batch,), p=probabilities)
    loss_weights = 1 / (len(probabilities) * probabilities[steps])
    return torch.from_numpy(steps).long(), torch.from_numpy(loss_weights).float()


def _check_count(count: int) -> int:
    if count < 1:
        raise ValueError(f"count {count} must be at least 1: the number of diffusion steps")
    return count
