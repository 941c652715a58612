"""What is learned: a task turns pictures and captions into a model's inputs, and draws samples to look at.

Base: text → small picture. Upsampler: text and a degraded small picture → large picture (GLIDE, section 4).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_tensor
from glide_fast.models import LoadedModel, UNet
from glide_fast.sampling.denoiser import PerImageNoise
from glide_fast.sampling.pipeline import StageOptions, quantise, sample_stage
from glide_fast.text.tokenizer import get_tokenizer
from glide_fast.training.config import LowResConfig, TrainConfig

Rows = NDArray[np.int64]


class Batch(NamedTuple):
    """Clean pictures [B, 3, H, W] in [-1, 1] and what the model is told about them."""

    x_start: Tensor
    tokens: Tensor  # [B, S]
    mask: Tensor  # [B, S]
    low_res: Tensor | None = None  # [B, 3, h, w]

    def part(self, rows: slice) -> Batch:
        """The given rows of every field."""
        low_res = None if self.low_res is None else self.low_res[rows]
        return Batch(self.x_start[rows], self.tokens[rows], self.mask[rows], low_res)


class Task(Protocol):
    """A thing to learn from N captioned pictures."""

    def __len__(self) -> int:
        """N."""

    def batch(self, rows: Rows, generator: Generator) -> Batch:
        """What the model learns from the pictures at ``rows`` [B]; randomness from ``generator`` alone."""

    def samples(self, model: UNet) -> Tensor:
        """One picture [B, 3, H, W] for each of the config's prompts, always from the same seeds."""


class BaseTask:
    """Text → picture: captions are dropped at random, so that the model also learns to paint without one."""

    def __init__(self, config: TrainConfig, pictures: CaptionedPictures) -> None:
        text = config.model.unet.text
        if text is None:
            raise ValueError("this task needs a model with text; add [model.unet.text]")
        tokenizer = get_tokenizer(text.tokenizer)
        if tokenizer.size != text.vocabulary:
            raise ValueError(
                f"model.unet.text.vocabulary {text.vocabulary} is not the size of tokenizer "
                f"{text.tokenizer!r}; use {tokenizer.size}"
            )
        self.config = config
        self.pictures = pictures
        self.captions = tokenizer.batch(pictures.captions, text.context)
        self.dropped = tokenizer.batch([""], text.context)

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, rows: Rows, generator: Generator) -> Batch:
        index = torch.from_numpy(rows)
        drop = torch.rand(len(rows), 1, generator=generator) < self.config.caption_drop
        tokens = torch.where(drop, self.dropped.tokens, self.captions.tokens[index])
        mask = torch.where(drop, self.dropped.mask, self.captions.mask[index])
        return Batch(to_tensor(self.pictures.images[rows]), tokens, mask)

    def samples(self, model: UNet) -> Tensor:
        return self._draw(model, None)

    def _draw(self, model: UNet, low_res: Tensor | None) -> Tensor:
        settings = self.config.samples
        return sample_stage(
            LoadedModel(model, self.config.model),
            settings.prompts,
            noise=PerImageNoise(range(len(settings.prompts))),
            options=StageOptions(steps=settings.steps, guidance=settings.guidance),
            low_res=low_res,
        )


class UpsamplerTask(BaseTask):
    """Text and half-size picture → picture; the half-size one is degraded, as a base model's pictures are."""

    def __init__(self, config: TrainConfig, pictures: CaptionedPictures) -> None:
        super().__init__(config, pictures)
        rows = {caption: row for row, caption in enumerate(pictures.captions)}
        missing = [prompt for prompt in config.samples.prompts if prompt not in rows]
        if missing:
            raise ValueError(f"samples.prompts: {missing[0]!r} is not a caption of {config.data.source!r}")
        self.sample_rows = [rows[prompt] for prompt in config.samples.prompts]

    def batch(self, rows: Rows, generator: Generator) -> Batch:
        batch = super().batch(rows, generator)
        low_res = degrade(halve(batch.x_start), self.config.low_res, generator)
        return batch._replace(low_res=low_res)

    def samples(self, model: UNet) -> Tensor:
        """The prompts' own pictures, halved and enlarged again."""
        return self._draw(model, halve(to_tensor(self.pictures.images[self.sample_rows])))


TASKS: dict[str, type[BaseTask]] = {"base": BaseTask, "upsampler": UpsamplerTask}


def halve(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] averaged 2×2 and rounded to 8 bits: what a base model would hand over."""
    return quantise(F.avg_pool2d(pictures, 2))


def degrade(pictures: Tensor, config: LowResConfig, generator: Generator) -> Tensor:
    """Blur and noise of a strength drawn for each picture [B, 3, H, W] (Cascaded Diffusion, section 4.2)."""
    strength = torch.rand(2, len(pictures), 1, 1, 1, generator=generator)
    blurred = gaussian_blur(pictures, config.blur * strength[0])
    noise = torch.randn(pictures.shape, generator=generator)
    return blurred + config.noise * strength[1] * noise


def gaussian_blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Blur [B, C, H, W] by a 5×5 Gaussian of ``sigma`` [B, 1, 1, 1] pixels; 0 leaves a picture sharp."""
    offsets = torch.arange(-2, 3, dtype=pictures.dtype)
    weights = torch.exp(-(offsets**2) / (2 * sigma.flatten(1).clamp(min=1e-3) ** 2))  # [B, 5]
    weights = weights / weights.sum(1, keepdim=True)
    batch, channels = pictures.shape[:2]
    kernel = (weights[:, :, None] * weights[:, None, :]).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernel, groups=batch * channels).view_as(pictures)
