"""The U-Nets of the family as the original code computes them, on a state dict of ours."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.layers import (
    GroupNorm32,
    PlainAttention,
    PlainDownsample,
    PlainResBlock,
    PlainUpsample,
    sinusoids,
)
from bench.peers.text import PlainTextLayers
from glide_fast.models.trunk import UNetConfig


class Stage(nn.ModuleList):
    """Layers in order, each given what it needs besides the map."""

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, PlainResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, PlainAttention):
                x = layer(x, text)
            else:
                x = layer(x)
        return x


class PlainUNet(PlainTextLayers):
    """A U-Net in two dimensions, with any of the family's conditions but a masked picture.

    ``recompute_attention`` is guided-diffusion's habit in training; GLIDE has none of it.
    """

    def __init__(self, config: UNetConfig, *, recompute_attention: bool = False) -> None:
        super().__init__()
        if config.dims != 2 or config.inpaint:
            raise ValueError(
                "the plain U-Net knows two dimensions and no masked picture; measure another model"
            )
        self.config, self.recompute_attention = config, recompute_attention
        embedding = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        if config.classes is not None:
            self.label_emb = nn.Embedding(config.classes, embedding)
        skips = self._add_encoder()
        width = skips[-1]
        self.middle_block = Stage(
            [
                PlainResBlock(width, width, config),
                self._attention(width, config.heads),
                PlainResBlock(width, width, config),
            ]
        )
        width = self._add_decoder(skips)
        self.out = nn.Sequential(
            GroupNorm32(config.norm_groups, width),
            nn.SiLU(),
            nn.Conv2d(width, config.out_channels, 3, padding=1),
        )
        if config.text is not None:
            self.add_text_layers(config.text, embedding)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        sequence: Tensor | None = None,
        low_res: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One evaluation; the text as tokens [B, S], or as pooled [B, E] and sequence [B, S, W] before."""
        embedding = self.time_embed(sinusoids(timesteps, self.config.channels).to(x.dtype))
        text = None if sequence is None else sequence.permute(0, 2, 1)
        if tokens is not None and mask is not None:
            pooled, text = self.encode_text(tokens, mask)
        if pooled is not None:
            embedding = embedding + pooled
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        if low_res is not None:
            large = F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, large], dim=1)
        h, skips = x, []
        for stage in self.input_blocks:
            h = stage(h, embedding, text)
            skips.append(h)
        h = self.middle_block(h, embedding, text)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, text)
        return self.out(h)  # type: ignore[no-any-return]

    def _add_encoder(self) -> list[int]:
        config = self.config
        width = int(config.channel_mult[0] * config.channels)
        stem = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([stem])])
        skips = [width]
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                out = int(multiple * config.channels)
                stage = Stage([PlainResBlock(width, out, config)])
                if 2**level in config.attention_strides:
                    stage.append(self._attention(out, config.heads))
                self.input_blocks.append(stage)
                width = out
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Stage([self._resampling(width, "down")]))
                skips.append(width)
        return skips

    def _add_decoder(self, skips: list[int]) -> int:
        config, waiting = self.config, list(skips)
        width = waiting[-1]
        heads = config.heads if config.heads_up is None else config.heads_up
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            out = int(multiple * config.channels)
            for block in range(config.res_blocks + 1):
                stage = Stage([PlainResBlock(width + waiting.pop(), out, config)])
                if 2**level in config.attention_strides:
                    stage.append(self._attention(out, heads))
                if level and block == config.res_blocks:
                    stage.append(self._resampling(out, "up"))
                self.output_blocks.append(stage)
                width = out
        return width

    def _attention(self, channels: int, heads: int) -> PlainAttention:
        config = self.config
        return PlainAttention(
            channels,
            heads if config.head_channels is None else channels // config.head_channels,
            text_channels=None if config.text is None else config.text.width,
            order=config.attention_order,
            norm_groups=config.norm_groups,
            recompute=self.recompute_attention,
        )

    def _resampling(self, channels: int, direction: Literal["up", "down"]) -> nn.Module:
        if self.config.resblock_updown:
            return PlainResBlock(channels, channels, self.config, direction)
        layer = PlainUpsample if direction == "up" else PlainDownsample
        return layer(channels, learned=self.config.learned_resample)
