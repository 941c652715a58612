"""Networks of the diffusion family, with upstream's state-dict names."""

from glide_fast.models.checkpoint import LoadedModel, convert, load_model, load_network, save_model
from glide_fast.models.clip import CLIP, CLIPConfig
from glide_fast.models.conditioning import MaskedImage, TextConfig, TextEncoding
from glide_fast.models.configs import ModelConfig
from glide_fast.models.encoder import EncoderConfig, EncoderUNet
from glide_fast.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig
from glide_fast.models.presets import PRESETS, preset
from glide_fast.models.trunk import UNetConfig
from glide_fast.models.unet import UNet

__all__ = [
    "CLIP",
    "PRESETS",
    "CLIPConfig",
    "EncoderConfig",
    "EncoderUNet",
    "LoadedModel",
    "MaskedImage",
    "ModelConfig",
    "NoisyCLIP",
    "NoisyCLIPConfig",
    "TextConfig",
    "TextEncoding",
    "UNet",
    "UNetConfig",
    "convert",
    "load_model",
    "load_network",
    "preset",
    "save_model",
]
