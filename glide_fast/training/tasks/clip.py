"""GLIDE's noise-aware CLIP: which caption belongs to a noised picture? (arXiv 2112.10741, section 2.4).

Contrastive, as CLIP (arXiv 2103.00020, section 2.3): each picture of a batch, at a timestep of its own, is to
find its caption among those of the whole batch, and each caption its picture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_tensor
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models.configs import Config
from glide_fast.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig
from glide_fast.text.framing import framed, tokenizer_size
from glide_fast.training.config import TrainConfig
from glide_fast.training.distributed import everybodys, first_row
from glide_fast.training.draws import Draws
from glide_fast.training.tasks.diffusion import mirror
from glide_fast.training.tasks.task import Batch

FIRST_SCALE = 1 / 0.07
LARGEST_SCALE = 100.0


class LearningCLIP(NoisyCLIP):
    """A noise-aware CLIP whose scale of the similarities is learned, up to 100."""

    logit_scale: nn.Parameter  # type: ignore[assignment]  # its logarithm [1]: FSDP knows no scalars

    def __init__(self, config: NoisyCLIPConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        del self.logit_scale
        self.logit_scale = nn.Parameter(torch.tensor([math.log(FIRST_SCALE)]))
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Unit vectors of the pictures, of the texts, both [B, embedding] float32, and the scale."""
        pictures = self.image_encoder(x.to(self.compute_dtype), timesteps)
        text = self.text_encoder.blocks
        last = self.text_encoder.transform(text["input"](tokens).to(self.compute_dtype), lengths - 1)
        scale = self.logit_scale.exp().clamp(max=LARGEST_SCALE)
        return F.normalize(pictures.float(), dim=1), F.normalize(text["output"](last).float(), dim=1), scale


class ClipTask:
    """Noised picture ↔ caption."""

    def __init__(self, config: TrainConfig, _pictures: CaptionedPictures | None) -> None:
        """Raise ValueError if the vocabulary has no room for the tokenizer."""
        if config.clip is None:
            raise ValueError("task 'clip' trains what [clip] describes; add it")
        self.config = config
        self.clip = config.clip
        size = tokenizer_size(self.clip.tokenizer)
        if self.clip.vocabulary < size:
            raise ValueError(
                f"clip.vocabulary {self.clip.vocabulary} is smaller than tokenizer "
                f"{self.clip.tokenizer!r}; use {size}"
            )
        self.diffusion = GaussianDiffusion(
            schedule=Schedule.create(config.noise.schedule, config.noise.steps, "")
        )

    def network(self) -> nn.Module:
        """Both towers and the scale."""
        return LearningCLIP(self.clip, getattr(torch, self.config.compute_dtype))

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        x_start = to_tensor(pictures.images)
        if self.config.data.flip:
            x_start = mirror(x_start, draws)
        tokens, lengths = framed(self.clip.tokenizer, pictures.captions, self.clip.context)
        mask = torch.arange(self.clip.context) < lengths[:, None]
        return Batch(x_start, tokens=tokens, mask=mask)

    def loss(self, model: nn.Module, batch: Batch, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy of both directions, and whether the picture finds its caption, each [B]."""
        if batch.tokens is None or batch.mask is None:
            raise ValueError("this task needs captions")
        x_t = self.diffusion.q_sample(batch.x_start, t, noise)
        pictures, texts, scale = model(
            x_t, self.diffusion.model_timesteps(t), batch.tokens, batch.mask.sum(1)
        )
        own = torch.arange(len(pictures), device=pictures.device) + first_row(len(pictures))
        of_pictures = scale * pictures @ everybodys(texts).T  # [B / processes, B]
        of_texts = scale * texts @ everybodys(pictures).T
        to_text, to_picture = (
            F.cross_entropy(logits, own, reduction="none") for logits in (of_pictures, of_texts)
        )
        found = (of_pictures.detach().argmax(1) == own).float()
        return {"loss": (to_text + to_picture) / 2, "accuracy": found}

    def export(self, state: dict[str, Tensor]) -> tuple[Config, dict[str, Tensor]]:
        """The scale becomes part of the config, as in the published models."""
        weights = dict(state)
        scale = min(float(weights.pop("logit_scale").exp()), LARGEST_SCALE)
        return replace(self.clip, logit_scale=round(scale, 4)), weights

    def samples(self, _state: dict[str, Tensor]) -> Tensor | None:
        return None
