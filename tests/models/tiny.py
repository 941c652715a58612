"""Small U-Nets with random weights, the zeroed layers included, so that every input shows in the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from glide_fast.models import TextConfig, UNet, UNetConfig
from tests.golden import fill

TEXT = TextConfig(tokenizer="glide", vocabulary=11, context=5, width=32, layers=2, heads=2)
SHAPE = UNetConfig(
    image_size=8,
    channels=32,
    channel_mult=(1, 2),
    res_blocks=1,
    attention_strides=(2,),
    head_channels=32,
    text=TEXT,
)


def tiny(**changes: Any) -> UNet:
    """A U-Net of two levels in eval mode; ``changes`` replace fields of its config."""
    compute_dtype = changes.pop("compute_dtype", torch.float32)
    model = UNet(replace(SHAPE, **changes), compute_dtype=compute_dtype).eval()
    fill(model, 3)
    return model


def prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    """Tokens and mask of prompts of different lengths."""
    tokens = torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) < 1 + torch.arange(batch)[:, None]
    return {"tokens": tokens, "mask": mask}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
