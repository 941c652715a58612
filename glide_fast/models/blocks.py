"""The blocks every U-Net of the family is made of: the residual block and the attention block.

Submodules that upstream numbers (``in_layers.0``, ``emb_layers.1`` …) keep those numbers as names, so that
published checkpoints load without renaming.

Sources: DDPM (arXiv 2006.11239), Improved DDPM (2102.09672), ADM (2105.05233), GLIDE (2112.10741).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.fused import (
    activated_convolution,
    activated_convolution_beside,
    convolution_beside,
    dropped,
)
from glide_fast.models.layers import (
    CONVOLUTIONS,
    Conv2d,
    GroupNorm,
    Linear,
    PointwiseConv,
    Resample,
    is_watched,
    pixels_as_tokens,
    resample_nearest,
    zeroed,
)
from glide_fast.ops import packed
from glide_fast.ops.sources import joined, stay_apart


class ResBlock(nn.Module):
    """Two GroupNorm-SiLU-convolution layers around the timestep, with a residual path (ADM, section 3).

    The embedding enters between them: as FiLM scale and shift of the second norm (``scale_shift_norm``) or
    added.
    ``resample`` moves the up- or downsampling of a level into the block.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dims: int = 2,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        norm_groups: int = 32,
        resample: Resample = "none",
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample: Resample = resample
        convolution = CONVOLUTIONS[dims]
        self.in_layers = nn.ModuleDict(
            {"0": GroupNorm(channels, norm_groups), "2": convolution(channels, out_channels, 3, padding=1)}
        )
        modulation = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.ModuleDict({"1": Linear(embedding_channels, modulation)})
        self.out_layers = nn.ModuleDict(
            {
                "0": GroupNorm(out_channels, norm_groups),
                "2": nn.Dropout(dropout),
                "3": zeroed(convolution(out_channels, out_channels, 3, padding=1)),
            }
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else convolution(channels, out_channels, 1)
        )

    @property
    def modulation_widths(self) -> list[int]:
        """The channels of what the embedding is projected to: of scale and shift, or of what is added."""
        projection, parts = self.emb_layers["1"].out_features, 2 if self.scale_shift_norm else 1
        return [int(projection) // parts] * parts  # type: ignore[arg-type]  # a Linear's

    def forward(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]], skip: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], embedding [B or 1, E] with its SiLU already applied -> [B, out, H', W'].

        The embedding may come as what each block makes of it, this one's scale and shift [B or 1, out], or
        only what is added, among them.
        ``skip`` [B, S, H, W] are the last S of the block's channels, where they come apart from x.
        """
        if skip is not None and torch.is_grad_enabled() and not stay_apart(x):
            x, skip = joined(x, skip, 1), None
        return self._paths(x, embedding, skip)[0]

    def with_input(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The block's output, and x for another reader.

        In training the gradient of what that reader makes of it joins the block's own of x, which saves
        autograd a sum of two maps.
        """
        return self._paths(x, embedding, None)

    def _paths(
        self, x: Tensor, embedding: Tensor | Mapping[nn.Module, Sequence[Tensor]], skip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(embedding, Mapping):
            parts = embedding[self]
        else:
            projection = self.emb_layers["1"](embedding).to(x.dtype)
            parts = torch.split(projection, self.modulation_widths, dim=1)
        modulation = [each.to(x.dtype).expand(len(x), -1) for each in parts]
        film = (modulation[0], modulation[1]) if self.scale_shift_norm else None
        norm, convolution = self.in_layers.values()
        shift = modulation[0] if film is None else None
        h, x, other = activated_convolution_beside(norm, convolution, x, skip, shift, self.resample)
        skip = None if skip is None else other
        norm, dropout, convolution = self.out_layers.values()
        residual = None if self._projects else self._residual(x, skip)
        if dropout.p and self.training:
            h = convolution_beside(residual, convolution, dropped(norm, dropout, h, film))
        else:
            h = activated_convolution(norm, convolution, h, film=film, residual=residual)
        y = self._residual(x, skip, summand=h) if self._projects else h
        return y, other

    @property
    def _projects(self) -> bool:
        """Whether the other path ends in a 1x1 convolution, which adds this path's map as it writes."""
        return _is_pointwise(self.skip_connection) and self.resample != "up"

    def _residual(self, x: Tensor, skip: Tensor | None, summand: Tensor | None = None) -> Tensor:
        """The other path. A map that is to be doubled stays small; a pixel's copies are what is added.

        ``summand`` [B, out, H', W'] is what a 1x1 convolution adds to its output.
        """
        layer: Any = self.skip_connection
        if self.resample != "up" or x.dim() == 5:
            x = resample_nearest(x, self.resample)
            skip = None if skip is None else resample_nearest(skip, self.resample)
        if _is_pointwise(layer):
            tokens = pixels_as_tokens(x)
            second = None if skip is None else pixels_as_tokens(skip)
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            residual = None if summand is None else pixels_as_tokens(summand)
            y = ops.linear(tokens, layer.weight.to(x.dtype), bias, second=second, residual=residual)
            return torch.unflatten(y.transpose(1, 2), 2, x.shape[2:])
        return layer(joined(x, skip, 1))  # type: ignore[no-any-return]


def _is_pointwise(layer: nn.Module) -> bool:
    return type(layer) is Conv2d and layer.kernel_size == (1, 1)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a map, which attend to the text as well where there is one."""

    def __init__(
        self,
        channels: int,
        heads: int,
        text_channels: int | None = None,
        *,
        order: ops.AttentionOrder = "by_head",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"channels {channels} are not divisible by {heads} heads; use a divisor of {channels}"
            )
        self.heads = heads
        self.order = order
        self.norm = GroupNorm(channels, norm_groups)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.encoder_kv = None if text_channels is None else PointwiseConv(text_channels, 2 * channels)
        self.proj_out = zeroed(PointwiseConv(channels, channels))

    def forward(self, x: Tensor, text: Tensor | Mapping[nn.Module, Tensor] | None = None) -> Tensor:
        """x [B, C, H, W], text [B, S, text_channels] -> [B, C, H, W].

        The text may come as what each block projects it to, this block's [B, S, 2·C] among them.
        """
        normal, x = self._normalised(x)
        tokens = pixels_as_tokens(normal)
        read = None
        if self.encoder_kv is not None and text is not None:
            read = self._projected(self.encoder_kv, text)
        attended = ops.projected_attention(self.qkv(tokens), self.heads, text=read, order=self.order)
        y: Tensor = self.proj_out(attended.flatten(2), residual=pixels_as_tokens(x))
        return y.transpose(1, 2).view_as(x)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x for the path beside attention."""
        norm = self.norm
        if type(norm) is not GroupNorm or is_watched(norm):
            return norm(x), x
        return ops.group_norm_beside(x, norm.weight, norm.bias, groups=norm.groups)

    def _projected(self, layer: PointwiseConv, text: Tensor | Mapping[nn.Module, Tensor]) -> Tensor:
        if isinstance(text, Mapping):
            return text[self]
        return packed.projected(layer.weight, text, functools.partial(layer, text))
