"""The U-Net of the family: DDPM's, with ADM's blocks and GLIDE's text (arXiv 2105.05233, 2112.10741).

Layout, numbering and parameter names are upstream's; what a model is conditioned on is composed from
:mod:`glide_fast.models.conditioning`. Inside, activations are channels-last from the first layer to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.models.conditioning import (
    MaskedImage,
    TextConditioned,
    TextConfig,
    TextEncoding,
    low_res_channels,
    masked_channels,
)
from glide_fast.models.layers import (
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    ResBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a U-Net.

    ``channel_mult`` gives the channels of each level as multiples of ``channels``; ``attention_strides`` the
    downsampling rates that have attention. ``head_channels`` fixes the width of a head, else ``heads`` (and
    ``heads_up`` in the decoder) fix their number. ``resblock_updown`` resamples inside residual blocks, else
    ``learned_resample`` decides whether resampling has a convolution. ``norm_groups`` are the groups of every
    GroupNorm: with as many groups as channels a layer would lose each channel's mean. ``text``, ``low_res``,
    ``inpaint`` and ``classes`` say what it is conditioned on.
    """

    image_size: int
    channels: int
    channel_mult: tuple[float, ...]
    res_blocks: int
    attention_strides: tuple[int, ...]
    image_channels: int = 3
    out_channels: int = 6
    head_channels: int | None = 64
    heads: int = 1
    heads_up: int | None = None
    dropout: float = 0.0
    scale_shift_norm: bool = True
    norm_groups: int = 32
    resblock_updown: bool = True
    learned_resample: bool = True
    text: TextConfig | None = None
    low_res: bool = False
    inpaint: bool = False
    classes: int | None = None

    @property
    def in_channels(self) -> int:
        """Channels the stem reads: the noised picture and the pictures it is conditioned on."""
        return self.image_channels + (4 if self.inpaint else 0) + (3 if self.low_res else 0)


class Stage(nn.ModuleList):
    """Layers applied in order, each given what it needs besides the activations."""

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, AttentionBlock):
                x = layer(x, text)
            else:
                x = layer(x)
        return x


class UNet(TextConditioned):
    """Predicts the noise (and the variance) of a picture at a timestep.

    ``compute_dtype`` is the dtype of the activations.
    """

    def __init__(self, config: UNetConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        embedding_channels = 4 * config.channels
        self.time_embed = nn.ModuleDict(
            {
                "0": Linear(config.channels, embedding_channels),
                "2": Linear(embedding_channels, embedding_channels),
            }
        )
        if config.classes is not None:
            self.label_emb = nn.Embedding(config.classes, embedding_channels)
        widths = self._add_encoder()
        middle = widths[-1]
        self.middle_block = Stage(
            [
                self._res_block(middle, middle),
                self._attention(middle, config.heads),
                self._res_block(middle, middle),
            ]
        )
        out = self._add_decoder(widths)
        self.out = nn.ModuleDict(
            {
                "0": GroupNorm(out, config.norm_groups),
                "2": zeroed(Conv2d(out, config.out_channels, 3, padding=1)),
            }
        )
        if config.text is not None:
            self.add_text_layers(config.text, embedding_channels)

    def _res_block(self, channels: int, out_channels: int) -> ResBlock:
        return ResBlock(
            channels,
            out_channels,
            4 * self.config.channels,
            dropout=self.config.dropout,
            scale_shift_norm=self.config.scale_shift_norm,
            norm_groups=self.config.norm_groups,
        )

    def _attention(self, channels: int, heads: int) -> AttentionBlock:
        config = self.config
        if config.head_channels is not None:
            if channels % config.head_channels:
                raise ValueError(
                    f"channels {channels} are not divisible by head_channels {config.head_channels}; "
                    f"use a divisor of every attention level's channels"
                )
            heads = channels // config.head_channels
        text_channels = None if config.text is None else config.text.width
        return AttentionBlock(channels, heads, text_channels, norm_groups=config.norm_groups)

    def _resampling(self, channels: int, direction: str) -> nn.Module:
        config = self.config
        if config.resblock_updown:
            block = self._res_block(channels, channels)
            block.resample = "up" if direction == "up" else "down"
            return block
        layer = Upsample if direction == "up" else Downsample
        return layer(channels, learned=config.learned_resample)

    def _add_encoder(self) -> list[int]:
        """Create ``input_blocks``; the channels of every skip connection are returned in order."""
        config = self.config
        width = int(config.channel_mult[0] * config.channels)
        self.input_blocks = nn.ModuleList([Stage([Conv2d(config.in_channels, width, 3, padding=1)])])
        widths = [width]
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                out = int(multiple * config.channels)
                stage = Stage([self._res_block(width, out)])
                if 2**level in config.attention_strides:
                    stage.append(self._attention(out, config.heads))
                self.input_blocks.append(stage)
                width = out
                widths.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(Stage([self._resampling(width, "down")]))
                widths.append(width)
        return widths

    def _add_decoder(self, skips: list[int]) -> int:
        """Create ``output_blocks``, which consume the skips from the last; the final channels return."""
        config = self.config
        skips = list(skips)
        width = skips[-1]
        heads = config.heads if config.heads_up is None else config.heads_up
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.res_blocks + 1):
                out = int(multiple * config.channels)
                stage = Stage([self._res_block(width + skips.pop(), out)])
                if 2**level in config.attention_strides:
                    stage.append(self._attention(out, heads))
                if level and block == config.res_blocks:
                    stage.append(self._resampling(out, "up"))
                self.output_blocks.append(stage)
                width = out
        return width

    def text(self, tokens: Tensor, mask: Tensor | None = None) -> TextEncoding:
        """Encode tokens [B, S] (mask [B, S]: true where a token is) once, for any number of steps."""
        if self.config.text is None:
            raise ValueError("this model is not conditioned on text; leave tokens out")
        return self.encode_text(tokens, mask, self.compute_dtype)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        text: TextEncoding | None = None,
        low_res: Tensor | None = None,
        known: MaskedImage | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            x: noised pictures [B, 3, H, W]; H and W divisible by 2**(levels - 1).
            timesteps: [B], integer or float, as in the training schedule.
            tokens, mask: the prompts [B, S]; or ``text``, the same already encoded.
            low_res: [B, 3, h, w] in [-1, 1], for upsamplers.
            known: the known part of the picture, for inpainting models; None = nothing is known.
            labels: class indices [B], for class-conditional models.

        Returns:
            [B, out_channels, H, W] in the dtype of ``x``: the noise, then the variance where it is learned.

        Raises:
            ValueError: a condition is missing, given twice, or not one of this model, or the size does not
                fit.
        """
        config = self.config
        self._check_conditions(x, tokens, text, low_res, known, labels)
        embedding = timestep_embedding(timesteps, config.channels)
        embedding = self.time_embed["2"](F.silu(self.time_embed["0"](embedding)))
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        if tokens is not None:
            text = self.text(tokens, mask)
        if text is not None:
            embedding = embedding + text.pooled.to(embedding.dtype)
        h = self._input(x, low_res, known)
        h = self._body(h, F.silu(embedding), None if text is None else text.sequence)
        h = self.out["0"](h.to(x.dtype), activation="silu")
        out: Tensor = self.out["2"](h)
        return out.contiguous()

    def _input(self, x: Tensor, low_res: Tensor | None, known: MaskedImage | None) -> Tensor:
        pictures = [x]
        if self.config.inpaint:
            pictures.append(masked_channels(x, known))
        if low_res is not None:
            pictures.append(low_res_channels(x, low_res))
        h = torch.cat(pictures, dim=1).to(self.compute_dtype)
        return h.contiguous(memory_format=torch.channels_last)

    def _body(self, h: Tensor, embedding: Tensor, text: Tensor | None) -> Tensor:
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding, text)
            skips.append(h)
        h = self.middle_block(h, embedding, text)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, text)
        return h

    def _check_conditions(
        self,
        x: Tensor,
        tokens: Tensor | None,
        text: TextEncoding | None,
        low_res: Tensor | None,
        known: MaskedImage | None,
        labels: Tensor | None,
    ) -> None:
        config = self.config
        stride = 2 ** (len(config.channel_mult) - 1)
        if x.shape[-1] % stride or x.shape[-2] % stride:
            raise ValueError(
                f"picture size {tuple(x.shape[-2:])} is not divisible by {stride}, as its levels need"
            )
        if tokens is not None and text is not None:
            raise ValueError("tokens and text are both given; give the prompt once, as tokens or encoded")
        given = {
            "text": tokens is not None or text is not None,
            "low_res": low_res is not None,
            "labels": labels is not None,
        }
        needed = {
            "text": config.text is not None,
            "low_res": config.low_res,
            "labels": config.classes is not None,
        }
        for name, is_needed in needed.items():
            if given[name] != is_needed:
                problem = "needs" if is_needed else "is not conditioned on"
                raise ValueError(f"this model {problem} {name}; {'give' if is_needed else 'leave out'} it")
        if known is not None and not config.inpaint:
            raise ValueError("this model is not conditioned on a masked picture; leave known out")
