"""What kinds of networks there are: their configs, and the network that a config describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from glide_fast.models.clip import CLIP, CLIPConfig
from glide_fast.models.encoder import EncoderConfig, EncoderUNet
from glide_fast.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig
from glide_fast.models.trunk import UNetConfig
from glide_fast.models.unet import UNet


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A U-Net together with the noise schedule it was trained on, and what it predicts.

    ``variance`` and ``rescale_timesteps`` are those of :class:`~glide_fast.diffusion.GaussianDiffusion`.
    """

    unet: UNetConfig
    schedule: str = "cosine"
    steps: int = 1000
    prediction: Literal["epsilon", "x_start"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = "learned_range"
    rescale_timesteps: bool = False


Config: TypeAlias = ModelConfig | EncoderConfig | CLIPConfig | NoisyCLIPConfig
Network: TypeAlias = UNet | EncoderUNet | CLIP | NoisyCLIP

KINDS: dict[str, type[Config]] = {
    "diffusion": ModelConfig,
    "classifier": EncoderConfig,
    "clip": CLIPConfig,
    "noisy_clip": NoisyCLIPConfig,
}


def kind_of(config: Config) -> str:
    """The name of the config's kind, a key of ``KINDS``."""
    return next(name for name, kind in KINDS.items() if isinstance(config, kind))


def build(config: Config) -> Network:
    """The network that the config describes, freshly initialised, on the default device."""
    if isinstance(config, ModelConfig):
        return UNet(config.unet)
    if isinstance(config, EncoderConfig):
        return EncoderUNet(config)
    if isinstance(config, CLIPConfig):
        return CLIP(config)
    return NoisyCLIP(config)


def describe(config: Config) -> Network:
    """The same without memory or initial values, on the meta device: names, shapes and counts."""
    with torch.device("meta"):
        return build(config)
