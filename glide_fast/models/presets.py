"""The published GLIDE models, and the small embedded ones, by name."""

from __future__ import annotations

from dataclasses import replace

from glide_fast.models.checkpoint import ModelConfig
from glide_fast.models.conditioning import TextConfig
from glide_fast.models.trunk import UNetConfig

_GLIDE_BASE = ModelConfig(
    unet=UNetConfig(
        image_size=64,
        channels=192,
        channel_mult=(1, 2, 3, 4),
        res_blocks=3,
        attention_strides=(2, 4, 8),
        dropout=0.1,
        text=TextConfig(),
    ),
    schedule="cosine",
)
_GLIDE_UPSAMPLER = ModelConfig(
    unet=UNetConfig(
        image_size=256,
        channels=192,
        channel_mult=(1, 1, 2, 2, 4, 4),
        res_blocks=2,
        attention_strides=(8, 16, 32),
        dropout=0.1,
        text=TextConfig(),
        low_res=True,
    ),
    schedule="linear",
)


def _inpainting(config: ModelConfig) -> ModelConfig:
    return replace(config, unet=replace(config.unet, inpaint=True))


PRESETS: dict[str, ModelConfig] = {
    "glide-base": _GLIDE_BASE,
    "glide-upsample": _GLIDE_UPSAMPLER,
    "glide-base-inpaint": _inpainting(_GLIDE_BASE),
    "glide-upsample-inpaint": _inpainting(_GLIDE_UPSAMPLER),
}


def preset(name: str) -> ModelConfig:
    """The config of a published model.

    Raises:
        ValueError: lists the known names.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; the known ones are {', '.join(PRESETS)}")
    return PRESETS[name]
