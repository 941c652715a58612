"""Residual and attention blocks at the shapes of GLIDE's base model, in their place in the network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import glide_fast
from bench.networks import Case, noise, randomised, small
from bench.parity import NETWORK_FACTOR
from bench.peers.layers import PlainAttention, PlainResBlock
from bench.peers.runtimes import SDPA
from bench.place import CPU, Place
from bench.subject import Outputs, Plain, Subject
from glide_fast.models import UNetConfig
from glide_fast.models.blocks import AttentionBlock, ResBlock
from glide_fast.models.presets import preset

BATCH = 2  # classifier-free guidance of one picture


class _Block(nn.Module):
    """A plain block whose second input is fixed by its place: the embedding, or the text."""

    def __init__(self, block: nn.Module, ours: nn.Module) -> None:
        super().__init__()
        block.load_state_dict(ours.state_dict(), assign=True)
        self.block = block.eval()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.block(x, condition)  # type: ignore[no-any-return]


def residual(config: UNetConfig, channels: int, out: int, size: int, place: Place = CPU) -> Subject:
    """A residual block with FiLM; the original applies the embedding's SiLU in each, ours before all."""
    width = 4 * config.channels
    block = ResBlock(channels, out, width)
    glide_fast.accelerate(place.narrowed(place.moved(randomised(block))))
    x, embedding = place.put(noise(BATCH, channels, size, size)), place.put(noise(BATCH, width, seed=1))
    ours_x = x.to(place.dtype).contiguous(memory_format=torch.channels_last)
    ours_embedding = nn.functional.silu(embedding).to(place.dtype)

    def ours() -> Outputs:
        with torch.inference_mode():
            return (block(ours_x, ours_embedding),)

    twin = place.plain(_Block(PlainResBlock(channels, out, replace(config, dropout=0.0)), block))
    plain = Plain(module=twin, inputs=place.inputs((x, embedding)))
    return Subject(ours=ours, plain=plain, factor=NETWORK_FACTOR)


def attention(config: UNetConfig, channels: int, size: int, place: Place = CPU) -> Subject:
    """An attention block with its norm, projections, text and residual path."""
    if config.text is None or config.head_channels is None:
        raise ValueError("the attention of a model with text and heads of a fixed width is measured")
    heads, text_width = channels // config.head_channels, config.text.width
    block = AttentionBlock(channels, heads, text_width)
    glide_fast.accelerate(place.narrowed(place.moved(randomised(block))))
    x = place.put(noise(BATCH, channels, size, size))
    text = place.put(noise(BATCH, config.text.context, text_width, seed=1))
    ours_x, ours_text = x.to(place.dtype).contiguous(memory_format=torch.channels_last), text.to(place.dtype)

    def ours() -> Outputs:
        with torch.inference_mode():
            return (block(ours_x, ours_text),)

    plain = PlainAttention(
        channels, heads, text_channels=text_width, order="by_head", norm_groups=32, recompute=False
    )
    inputs = place.inputs((x, text.transpose(1, 2).contiguous()))
    twin = place.plain(_Block(plain, block))
    return Subject(ours=ours, plain=Plain(module=twin, inputs=inputs), factor=NETWORK_FACTOR)


def cases(*, quick: bool, place: Place = CPU) -> list[Case]:
    """Every level's residual block in the encoder and the first of its decoder; every attention."""
    config = preset("glide-base").unet
    if quick:
        config = small(config, size=32)
    rows = []
    for level, multiple in enumerate(config.channel_mult):
        channels, size = int(multiple * config.channels), config.image_size >> level
        for width in (channels, 2 * channels):
            rows.append(_residual_case(config, width, channels, size, place))
        if 2**level in config.attention_strides:
            rows.append(_attention_case(config, channels, size, place))
    return rows


def _residual_case(config: UNetConfig, channels: int, out: int, size: int, place: Place) -> Case:
    return Case(
        name=f"residual block {channels}->{out}, {size}x{size}, batch {BATCH}",
        build=lambda: residual(config, channels, out, size, place),
        peers=("upstream", "compile, CUDA graphs") if place.gpu else ("upstream",),
    )


def _attention_case(config: UNetConfig, channels: int, size: int, place: Place) -> Case:
    return Case(
        name=f"attention block {channels}, {size}x{size} + text, batch {BATCH}",
        build=lambda: attention(config, channels, size, place),
        peers=("upstream", *SDPA, "compile, CUDA graphs") if place.gpu else ("upstream",),
    )
