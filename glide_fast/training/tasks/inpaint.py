"""Inpainting: text and a part of the picture → picture (GLIDE, arXiv 2112.10741, section 3.4).

The model reads the known pixels and their mask as four more input channels. A run usually starts from a model
without them (``--initial``), whose weights for them are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.images import to_tensor
from glide_fast.data.masks import random_mask
from glide_fast.models import LoadedModel, MaskedImage
from glide_fast.training.draws import Draws
from glide_fast.training.tasks.diffusion import DiffusionTask, UpsamplerTask
from glide_fast.training.tasks.task import Batch


class InpaintTask(DiffusionTask):
    """Text and a part of the picture → picture; which part is drawn anew each time."""

    samples_show_data = True

    def batch(self, pictures: CaptionedPictures, draws: Draws) -> Batch:
        batch = super().batch(pictures, draws)
        return batch._replace(known=self._masks(batch.x_start, draws.numpy()))

    def draw(self, stage: LoadedModel, conditions: dict[str, Any]) -> Tensor:
        """The prompts' own pictures, completed where a mask, always the same, hides them."""
        if self.shown is not None:
            image = to_tensor(self.shown.images)
            generators = [np.random.default_rng(index) for index in range(len(image))]
            conditions["known"] = MaskedImage(image, self._masks(image, generators))
        return super().draw(stage, conditions)

    def _masks(self, pictures: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """One mask a picture, float32 [B, 1, H, W]."""
        size, config = pictures.shape[-1], self.config.masks
        masks = [random_mask(size, config, generator) for generator in generators]
        return torch.from_numpy(np.stack(masks)).float()[:, None]


class InpaintUpsamplerTask(InpaintTask, UpsamplerTask):
    """Text, small picture and a part of the large one → picture."""
