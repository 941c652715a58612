"""Networks of the diffusion family, with upstream's state-dict names."""

from glide_fast.models.checkpoint import LoadedModel, ModelConfig, load_model, save_model
from glide_fast.models.conditioning import MaskedImage, TextConfig, TextEncoding
from glide_fast.models.presets import PRESETS, preset
from glide_fast.models.trunk import UNetConfig
from glide_fast.models.unet import UNet

__all__ = [
    "PRESETS",
    "LoadedModel",
    "MaskedImage",
    "ModelConfig",
    "TextConfig",
    "TextEncoding",
    "UNet",
    "UNetConfig",
    "load_model",
    "preset",
    "save_model",
]
