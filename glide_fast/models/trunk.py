"""What every network of the family begins with: timestep embedding, encoder, middle, in upstream's numbering.

:class:`~glide_fast.models.unet.UNet` adds a decoder, :class:`~glide_fast.models.encoder.EncoderUNet` a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glide_fast.models.blocks import AttentionBlock, ResBlock
from glide_fast.models.conditioning import TextConditioned, TextConfig
from glide_fast.models.layers import CONVOLUTIONS, Downsample, Linear, Upsample, is_plain, timestep_embedding
from glide_fast.models.modulation import Modulations, modulations
from glide_fast.ops import AttentionOrder

Given: TypeAlias = Tensor | Mapping[nn.Module, Tensor]
Timed: TypeAlias = Tensor | Modulations
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a U-Net.

    ``channel_mult`` gives the channels of each level as multiples of ``channels``; ``attention_strides`` the
    downsampling rates that have attention. ``head_channels`` fixes the width of a head, else ``heads`` (and
    ``heads_up`` in the decoder) fix their number; ``attention_order`` says how queries, keys and values share
    a projection. ``resblock_updown`` resamples inside residual blocks, else ``learned_resample`` decides
    whether resampling has a convolution. ``norm_groups`` are the groups of every GroupNorm: with as many
    groups as channels a layer would lose each channel's mean. ``dims`` are the dimensions of space. ``text``,
    ``low_res``, ``inpaint`` and ``classes`` say what it is conditioned on.
    """

    image_size: int
    channels: int
    channel_mult: tuple[float, ...]
    res_blocks: int
    attention_strides: tuple[int, ...]
    image_channels: int = 3
    out_channels: int = 6
    dims: Literal[1, 2, 3] = 2
    head_channels: int | None = 64
    heads: int = 1
    heads_up: int | None = None
    attention_order: AttentionOrder = "by_head"
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

    @property
    def stride(self) -> int:
        """Pixels of the picture a pixel of the smallest map; sizes must be multiples of it."""
        return 1 << (len(self.channel_mult) - 1)


class Stage(nn.ModuleList):
    """Layers applied in order, each given what it needs besides the activations.

    Embedding and text are either themselves or what each block projects them to.
    ``skip`` is more of the input, [B, S, *space], which the first layer, a residual block, takes beside x.
    With ``recompute`` their activations are not kept for the backward pass but computed again in it.
    """

    recompute = False

    def forward(self, x: Tensor, embedding: Timed, text: Given | None, skip: Tensor | None = None) -> Tensor:
        return self.with_input(x, embedding, text, skip)[0]

    def with_input(
        self, x: Tensor, embedding: Timed, text: Given | None, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output, and x for another reader, as the first layer's :meth:`ResBlock.with_input` has it."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layers, x, embedding, text, skip, use_reentrant=False)  # type: ignore[no-any-return]
        return self._layers(x, embedding, text, skip)

    def _layers(
        self, x: Tensor, embedding: Timed, text: Given | None, skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first, *others = self
        if skip is None and isinstance(first, ResBlock) and is_plain(first, ResBlock.forward):
            y, x = first.with_input(x, embedding)
        else:
            y = _applied(first, x, embedding, text, skip)
        for layer in others:
            y = _applied(layer, y, embedding, text)
        return y, x


def _applied(
    layer: nn.Module, x: Tensor, embedding: Timed, text: Given | None, skip: Tensor | None = None
) -> Tensor:
    if isinstance(layer, ResBlock):
        return layer(x, embedding, skip)  # type: ignore[no-any-return]
    return layer(x, text) if isinstance(layer, AttentionBlock) else layer(x)  # type: ignore[no-any-return]


class TimestepLayers(nn.ModuleDict):
    """Two linear layers with a SiLU between them."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__({"0": Linear(channels, out_channels), "2": Linear(out_channels, out_channels)})

    def forward(self, x: Tensor) -> Tensor:  # [B, channels] -> [B, out_channels]
        return self["2"](F.silu(self["0"](x)))  # type: ignore[no-any-return]


class Trunk(TextConditioned):
    """Timestep (and class) embedding, ``input_blocks`` and ``middle_block``.

    ``compute_dtype`` is the dtype of the activations; ``skip_channels`` are the channels of every map that
    the encoder hands on.
    """

    stage: ClassVar[type[Stage]] = Stage

    def __init__(self, config: UNetConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        embedding_channels = 4 * config.channels
        self.time_embed = TimestepLayers(config.channels, embedding_channels)
        if config.classes is not None:
            self.label_emb = nn.Embedding(config.classes, embedding_channels)
        self.skip_channels = self._add_encoder()
        middle = self.skip_channels[-1]
        self.middle_block = self.stage(
            [
                self.res_block(middle, middle),
                self.attention(middle, config.heads),
                self.res_block(middle, middle),
            ]
        )

    def embed(self, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Timesteps [B or 1] and class indices [B] -> [B or 1, 4·channels], before the blocks' SiLU."""
        embedding = timestep_embedding(timesteps, self.config.channels)
        embedding = self.time_embed(embedding)
        return embedding if labels is None else embedding + self.label_emb(labels)  # type: ignore[no-any-return]

    def modulations(self, embedding: Tensor) -> Timed:
        """What the blocks are given of the embedding [B or 1, E] with its SiLU applied."""
        return modulations(self.residual_blocks(), embedding, self.compute_dtype)

    def residual_blocks(self) -> list[ResBlock]:
        """The blocks that read the timestep, in the order in which they compute."""
        return [layer for stage in self.stages() for layer in stage if isinstance(layer, ResBlock)]

    def stages(self) -> Iterator[Stage]:
        """Every stage in the order in which they compute."""
        parts: tuple[Any, ...] = self.input_blocks, [self.middle_block], getattr(self, "output_blocks", ())
        for part in parts:
            yield from part

    def encode(self, x: Tensor, embedding: Timed, text: Given | None = None) -> list[Tensor]:
        """Every map of the encoder, then that of the middle; ``embedding`` with its SiLU applied."""
        layout = _CHANNELS_LAST.get(self.config.dims, torch.contiguous_format)
        h = x.to(self.compute_dtype, memory_format=layout).contiguous(memory_format=layout)  # one copy
        maps = []
        for stage in (*self.input_blocks, self.middle_block):
            h, before = self._with_input(stage, h, embedding, text)
            maps.append(before)
        return [*maps[1:], h]

    def _with_input(
        self, stage: Any, x: Tensor, embedding: Timed, text: Given | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`Stage.with_input`, unless the stage is replaced or watched: then it is called."""
        if is_plain(stage, self.stage.forward):
            return stage.with_input(x, embedding, text)  # type: ignore[no-any-return]
        return stage(x, embedding, text), x

    def check_inputs(self, x: Tensor, timesteps: Tensor) -> None:
        """Raise ``ValueError`` if a picture's dimensions or sides, or the number of timesteps, do not fit."""
        dims, stride = self.config.dims, self.config.stride
        if x.dim() != dims + 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model has {dims} dimensions of space")
        sides = tuple(x.shape[-min(dims, 2) :])
        if any(side % stride for side in sides):
            raise ValueError(f"picture size {sides} is not divisible by {stride}, as its levels need")
        if timesteps.shape not in ((1,), (len(x),)):
            raise ValueError(
                f"timesteps have shape {tuple(timesteps.shape)}; give one for each of the {len(x)} pictures, "
                "or one for all"
            )

    def res_block(self, channels: int, out_channels: int) -> ResBlock:
        """A residual block of this model's kind."""
        return ResBlock(
            channels,
            out_channels,
            4 * self.config.channels,
            dims=self.config.dims,
            dropout=self.config.dropout,
            scale_shift_norm=self.config.scale_shift_norm,
            norm_groups=self.config.norm_groups,
        )

    @property
    def text_channels(self) -> int | None:
        """Channels of the text that attention reads besides the pixels; None without text."""
        return None if self.config.text is None else self.config.text.width

    def attention(self, channels: int, heads: int) -> AttentionBlock:
        """An attention block of this model's kind; ``heads`` counts unless the config fixes their width."""
        config = self.config
        if config.head_channels is not None:
            if channels % config.head_channels:
                raise ValueError(
                    f"channels {channels} are not divisible by head_channels {config.head_channels}; "
                    f"use a divisor of every attention level's channels"
                )
            heads = channels // config.head_channels
        return AttentionBlock(
            channels,
            heads,
            self.text_channels,
            order=config.attention_order,
            norm_groups=config.norm_groups,
        )

    def resampling(self, channels: int, direction: Literal["up", "down"]) -> nn.Module:
        """What doubles or halves a map between two levels."""
        config = self.config
        if config.resblock_updown:
            block = self.res_block(channels, channels)
            block.resample = direction
            return block
        layer = Upsample if direction == "up" else Downsample
        return layer(channels, dims=config.dims, learned=config.learned_resample)

    def _add_encoder(self) -> list[int]:
        """Create ``input_blocks``; the channels of every skip connection are returned in order."""
        config = self.config
        width = int(config.channel_mult[0] * config.channels)
        stem = CONVOLUTIONS[config.dims](config.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([self.stage([stem])])
        widths = [width]
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                out = int(multiple * config.channels)
                stage = self.stage([self.res_block(width, out)])
                if 2**level in config.attention_strides:
                    stage.append(self.attention(out, config.heads))
                self.input_blocks.append(stage)
                width = out
                widths.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(self.stage([self.resampling(width, "down")]))
                widths.append(width)
        return widths
