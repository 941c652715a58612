"""U-Nets and their blocks; what improved-diffusion's module of this name offers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.compat import blocks, networks
from glide_fast.compat.blocks import Downsample, ResBlock, TimestepBlock, TimestepEmbedSequential, Upsample
from glide_fast.compat.networks import SuperRes

__all__ = [
    "AttentionBlock",
    "Downsample",
    "QKVAttention",
    "ResBlock",
    "SuperResModel",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
]


class AttentionBlock(blocks.AttentionBlock):
    """Self-attention over the pixels of a map [B, C, *space]."""

    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False) -> None:
        super().__init__(channels, num_heads, use_checkpoint=use_checkpoint)


class QKVAttention(blocks.QKVAttention):
    """Attention of one head on [B, 3·D, T], queries first."""

    def __init__(self) -> None:
        super().__init__(1)


class UNetModel(networks.UNetModel):
    """A U-Net on pictures of ``in_channels``, class-conditional with ``num_classes``.

    It computes in the dtype of its blocks' weights, and always resamples with convolutions.
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
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
    ) -> None:
        arguments = networks.own_arguments(locals())
        smallest = 1 << (len(channel_mult) - 1)  # any multiple of it will do
        super().__init__(image_size=smallest, **arguments)
        del self.image_size

    @property
    def inner_dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights."""
        return next(self.input_blocks.parameters()).dtype

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [B, in_channels, *space] at timesteps [B], classes y [B] -> [B, out_channels, *space]."""
        self.compute_dtype = self.inner_dtype
        return super().forward(x, timesteps, y)

    def get_feature_vectors(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        """The maps of every block in x's dtype: lists "down" and "up", and "middle"."""
        self.check_classes(y)
        self.compute_dtype = self.inner_dtype
        embedding = F.silu(self.embed(timesteps, y))
        *skips, h = self.encode(x, embedding)
        maps: dict[str, Any] = {"down": [skip.to(x.dtype) for skip in skips], "middle": h.to(x.dtype)}
        maps["up"] = []
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding, None)
            maps["up"].append(h.to(x.dtype))
        return maps


class SuperResModel(SuperRes, UNetModel):  # type: ignore[misc]
    """A U-Net that enlarges ``low_res``; arguments as :class:`UNetModel`'s."""

    def __init__(self, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels * 2, *args, **kwargs)

    def get_feature_vectors(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the U-Net's, with ``low_res`` [B, in_channels, h, w]."""
        return super().get_feature_vectors(self.with_low_res(x, low_res), timesteps, **kwargs)
