"""Random numbers of a training batch: each picture has a stream of its own, whoever computes it.

A picture's stream follows from the run's seed, the step and its place in the batch. Processes that share a
batch, and a run that was resumed, so draw what one process would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """One random stream a picture, B in all; every call draws the next numbers of each."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def of_step(cls, seed: int, step: int, batch: int, part: slice) -> Draws:
        """The streams of the pictures at ``part`` of the ``batch`` that a run sees at ``step``."""
        return cls(np.random.SeedSequence((seed, step)).generate_state(batch)[part].tolist())

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 [B, *shape]."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, float32 [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def numpy(self) -> list[np.random.Generator]:
        """A generator of numpy for each picture, seeded by its next number."""
        seeds = [torch.randint(2**31, (), generator=generator) for generator in self._generators]
        return [np.random.default_rng(int(seed)) for seed in seeds]
