"""ADM's classifier: which class does a noised picture show? (arXiv 2105.05233, section 4)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_tensor
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models.configs import Config
from glide_fast.models.encoder import EncoderUNet
from glide_fast.training.config import TrainConfig
from glide_fast.training.draws import Draws
from glide_fast.training.tasks.diffusion import mirror
from glide_fast.training.tasks.task import Batch


class ClassifierTask:
    """Noised picture → class."""

    def __init__(self, config: TrainConfig, _pictures: CaptionedPictures | None) -> None:
        if config.classifier is None:
            raise ValueError("task 'classifier' trains what [classifier] describes; add it")
        self.config = config
        self.classifier = config.classifier
        self.diffusion = GaussianDiffusion(
            schedule=Schedule.create(config.noise.schedule, config.noise.steps, "")
        )

    def network(self) -> nn.Module:
        """The encoder and its pool, with activations of the config's dtype and channels-last weights."""
        network = EncoderUNet(self.classifier, compute_dtype=getattr(torch, self.config.compute_dtype))
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        x_start = to_tensor(pictures.images)
        if self.config.data.flip:
            x_start = mirror(x_start, draws)
        return Batch(x_start, labels=pictures.label_tensor())

    def loss(self, model: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Cross entropy, and whether the class is found, each [B]."""
        if batch.labels is None:
            raise ValueError("this task needs labels")
        x_t = self.diffusion.q_sample(batch.x_start, t, noise)
        logits = model(x_t, self.diffusion.model_timesteps(t)).float()
        found = (logits.detach().argmax(1) == batch.labels).float()
        return {"loss": F.cross_entropy(logits, batch.labels, reduction="none"), "accuracy": found}

    def export(self, state: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
        return self.classifier, state

    def samples(self, _state: dict[str, Tensor]) -> Tensor | None:
        return None
