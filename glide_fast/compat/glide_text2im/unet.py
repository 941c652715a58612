"""The U-Nets of glide-text2im: its classes, names and signatures over :class:`glide_fast.models.unet.UNet`.

Conditions that are pictures become channels here, as in the original, so that the network itself sees one
input of ``in_channels``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glide_fast.compat import networks
from glide_fast.compat.blocks import Downsample, ResBlock, TimestepBlock, Upsample
from glide_fast.compat.blocks import QKVAttentionLegacy as QKVAttention
from glide_fast.models import blocks
from glide_fast.models.conditioning import MaskedImage, masked_channels

__all__ = [
    "AttentionBlock",
    "Downsample",
    "InpaintUNetModel",
    "QKVAttention",
    "ResBlock",
    "SuperResInpaintUNetModel",
    "SuperResUNetModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
]


class AttentionBlock(blocks.AttentionBlock):
    """Self-attention over the pixels of a map, which also attend to ``encoder_channels`` of a text."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        encoder_channels: int | None = None,
    ) -> None:
        heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        super().__init__(channels, heads, encoder_channels)
        self.channels, self.num_heads, self.use_checkpoint = channels, heads, use_checkpoint

    def forward(  # type: ignore[override]
        self, x: Tensor, encoder_out: Tensor | None = None
    ) -> Tensor:
        """x [B, C, *space], encoder_out [B, encoder_channels, S] -> [B, C, *space]."""
        return super().forward(x, None if encoder_out is None else encoder_out.transpose(1, 2))


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Layers in order, which are given the timestep's embedding and the text where they read them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, encoder_out: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            else:
                x = layer(x, encoder_out) if isinstance(layer, AttentionBlock) else layer(x)
        return x


class UNetModel(networks.UNetModel):
    """A U-Net on pictures of ``in_channels``; its attention reads ``encoder_channels`` of a subclass's text.

    ``attention_resolutions`` are the downsampling rates that have attention; -1 means "not fixed" for
    ``num_head_channels`` and "as num_heads" for ``num_heads_upsample``.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[1, 2, 3] = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        encoder_channels: int | None = None,
    ) -> None:
        arguments = networks.own_arguments(locals())
        del arguments["encoder_channels"]
        self.encoder_channels = encoder_channels
        super().__init__(4 << len(channel_mult), **arguments)

    @property
    def text_channels(self) -> int | None:
        """Channels of the text that attention reads besides the pixels; None without text."""
        return self.encoder_channels


class SuperRes(networks.SuperRes):
    """Adds a low-resolution picture to a U-Net, as channels."""

    def __init__(self, *args: Any, in_channels: int, **kwargs: Any) -> None:
        super().__init__(*args, in_channels=2 * in_channels, **kwargs)


class Inpaint(nn.Module):
    """Adds what is known of a picture to a U-Net, as channels."""

    def __init__(self, *args: Any, in_channels: int, **kwargs: Any) -> None:
        super().__init__(*args, in_channels=2 * in_channels + 1, **kwargs)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the U-Net's, with a picture [B, C, H, W] and its mask [B, 1, H, W], 1 where it is known."""
        x = torch.cat([x, _known(x, inpaint_image, inpaint_mask)], dim=1)
        return super().forward(x, timesteps, **kwargs)  # type: ignore[no-any-return]


class SuperResInpaint(networks.SuperRes):
    """Adds both to a U-Net, as channels."""

    def __init__(self, *args: Any, in_channels: int, **kwargs: Any) -> None:
        super().__init__(*args, in_channels=3 * in_channels + 1, **kwargs)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the U-Net's, with what is known and with ``low_res`` [B, C, h, w], which is needed."""
        known = _known(x, inpaint_image, inpaint_mask)
        return super().forward(torch.cat([x, known], dim=1), timesteps, low_res=low_res, **kwargs)


def _known(x: Tensor, image: Tensor | None, mask: Tensor | None) -> Tensor:
    """The known pixels and their mask [B, C + 1, H, W]; what is not given is zero."""
    image = torch.zeros_like(x) if image is None else image
    mask = torch.zeros_like(x[:, :1]) if mask is None else mask
    return masked_channels(x, MaskedImage(image, mask))


class SuperResUNetModel(SuperRes, UNetModel):  # type: ignore[misc]
    """A U-Net that enlarges ``low_res``; give ``in_channels`` by keyword."""


class InpaintUNetModel(Inpaint, UNetModel):  # type: ignore[misc]
    """A U-Net that completes a picture; give ``in_channels`` by keyword."""


class SuperResInpaintUNetModel(SuperResInpaint, UNetModel):  # type: ignore[misc]
    """A U-Net that enlarges and completes; give ``in_channels`` by keyword."""
