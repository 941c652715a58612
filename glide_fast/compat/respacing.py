"""Diffusions that visit some steps of the training schedule, as the original projects spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glide_fast.compat.diffusion import GaussianDiffusion, Model, Outputs
from glide_fast.diffusion import schedule


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The steps out of 0 .. num_timesteps - 1 that "100", [10, 15, 20], "10,15,20" or "ddim50" choose.

    Raises:
        ValueError: a malformed string, or more steps wanted than there are.
    """
    if section_counts == "fast27":
        raise ValueError("respacing 'fast27' belongs to GLIDE; use '27' or '10,10,3,2,2'")
    return set(schedule.space_timesteps(num_timesteps, section_counts))


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion that visits ``use_timesteps`` of the training schedule ``betas``.

    ``timestep_map`` has the original step of each step, which the model sees.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        betas = np.array(kwargs["betas"], dtype=np.float64)
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(betas)
        self.timestep_map = [step for step in range(len(betas)) if step in self.use_timesteps]
        spaced = schedule.Schedule.from_betas(betas, self.timestep_map)
        super().__init__(**{**kwargs, "betas": spaced.betas})

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> Outputs:
        """As the plain diffusion's, the model seeing original timesteps."""
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Model, *args: Any, **kwargs: Any) -> Outputs:
        """As the plain diffusion's, the model seeing original timesteps."""
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Model, *args: Any, **kwargs: Any) -> Tensor:
        """As the plain diffusion's, ``cond_fn`` seeing original timesteps."""
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Model, *args: Any, **kwargs: Any) -> Outputs:
        """As the plain diffusion's, ``cond_fn`` seeing original timesteps."""
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model scales

    def _wrap_model(self, model: Model) -> _WrappedModel:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)


class _WrappedModel:
    """A model that is called with steps and sees original timesteps, scaled to 0 .. 1000 if asked for."""

    def __init__(
        self, model: Model, timestep_map: Sequence[int], rescale_timesteps: bool, original_num_steps: int
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        timesteps = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            timesteps = timesteps.float() * (1000.0 / self.original_num_steps)
        return self.model(x, timesteps, **kwargs)
