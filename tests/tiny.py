"""Tiny random models of the shape of the embedded ones, for tests that need any model."""

from __future__ import annotations

from pathlib import Path

import torch

from glide_fast.models import LoadedModel, ModelConfig, TextConfig, UNet, UNetConfig, save_model
from glide_fast.text.tokenizer import embedded_tokenizer

BASE_SIZE, SIZE = 8, 16


def config(*, upsampler: bool = False, inpaint: bool = False) -> ModelConfig:
    """A text model of 8 px, or an upsampler from 8 to 16 px."""
    text = TextConfig(
        tokenizer="embedded",
        vocabulary=embedded_tokenizer().size,
        context=8,
        width=16,
        layers=1,
        heads=1,
    )
    unet = UNetConfig(
        image_size=SIZE if upsampler else BASE_SIZE,
        channels=32,
        channel_mult=(1, 1),
        res_blocks=1,
        attention_strides=(2,),
        head_channels=32,
        text=text,
        low_res=upsampler,
        inpaint=inpaint,
    )
    return ModelConfig(unet=unet, schedule="linear" if upsampler else "cosine")


def model(config: ModelConfig, seed: int = 0) -> LoadedModel:
    """A model with random weights, the zeroed layers included, so that every input matters."""
    torch.manual_seed(seed)
    network = UNet(config.unet)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return LoadedModel(network.eval().requires_grad_(False), config)


def save(folder: Path) -> tuple[Path, Path]:
    """Write base.safetensors and upsampler.safetensors; their paths are returned."""
    paths = folder / "base.safetensors", folder / "upsampler.safetensors"
    for path, upsampler in zip(paths, (False, True), strict=True):
        network, its_config = model(config(upsampler=upsampler))
        save_model(path, its_config, network.state_dict())
    return paths
