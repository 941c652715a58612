"""What the loop asks of a task, and what a batch may hold."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.diffusion import GaussianDiffusion
from glide_fast.models.configs import Config
from glide_fast.training.draws import Draws


class Batch(NamedTuple):
    """Clean pictures [B, 3, H, W] in [-1, 1] and what the model is told about them, if anything."""

    x_start: Tensor
    tokens: Tensor | None = None  # [B, S]
    mask: Tensor | None = None  # [B, S]: true where a token is
    low_res: Tensor | None = None  # [B, 3, h, w]
    known: Tensor | None = None  # [B, 1, H, W]: 1 where the model sees the picture, 0 where it paints
    labels: Tensor | None = None  # [B]

    def part(self, rows: slice) -> Batch:
        """The given rows of every field."""
        return Batch(*(None if value is None else value[rows] for value in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Batch:
        """Every field on the device."""
        return Batch(*(None if value is None else value.to(device) for value in self))  # type: ignore[arg-type]


class Task(Protocol):
    """A thing to learn from pictures, their captions or their labels.

    ``diffusion`` noises the pictures.
    """

    diffusion: GaussianDiffusion

    def network(self) -> nn.Module:
        """What is trained, freshly initialised."""

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        """What the model learns from B pictures; all randomness is from ``draws``."""

    def loss(self, model: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The "loss" of each picture [B] at steps t [B], and other numbers [B] for the log."""

    def export(self, state: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
        """The config and the state dict of the model file for weights of :meth:`network`."""

    def samples(self, state: dict[str, Tensor]) -> Tensor | None:
        """Pictures [B, 3, H, W] to look at, always from the same seeds; None if there are none to draw."""
