"""ADM's classifier: the encoder half of a U-Net on noised pictures, and a pool (arXiv 2105.05233, 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.layers import CONVOLUTIONS, GroupNorm, Linear, PointwiseConv, zeroed
from glide_fast.models.trunk import Trunk, UNetConfig

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
HIDDEN = 2048  # width of the perceptron behind the spatial pools


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A trunk whose ``out_channels`` are the classes, and how its maps become one vector.

    "adaptive" averages the last map; "attention" lets its mean ask all its pixels (CLIP's pool); "spatial"
    and "spatial_v2" feed the means of every map of the encoder to a perceptron.

    Raises:
        ValueError: an unknown pool, or "attention" without ``head_channels``.
    """

    trunk: UNetConfig
    pool: Pool = "attention"

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            raise ValueError(f"unknown pool {self.pool!r}; known: {', '.join(get_args(Pool))}")
        if self.pool == "attention" and self.trunk.head_channels is None:
            raise ValueError("pool 'attention' needs trunk.head_channels, the width of its heads; give it")


class AttentionPool(nn.Module):
    """The mean pixel asks, all pixels answer: [B, C, *space] -> [B, out]."""

    def __init__(self, pixels: int, channels: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(channels**-0.5 * torch.randn(channels, pixels + 1))
        self.qkv_proj = PointwiseConv(channels, 3 * channels)
        self.c_proj = PointwiseConv(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding.T.to(
            x.dtype
        )
        query, key, value = torch.unflatten(self.qkv_proj(tokens), 2, (3, self.heads, -1)).unbind(2)
        attended = ops.attention(query, key, value)[:, :1].flatten(2)
        return self.c_proj(attended)[:, 0]  # type: ignore[no-any-return]


class EncoderUNet(Trunk):
    """Class logits of noised pictures."""

    def __init__(self, config: EncoderConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        trunk = config.trunk
        super().__init__(trunk, compute_dtype=compute_dtype)
        self.pool = config.pool
        channels, classes = self.skip_channels[-1], trunk.out_channels
        features = sum(self.skip_channels) + channels
        layers: dict[str, nn.Module]
        if config.pool == "adaptive":
            last = zeroed(CONVOLUTIONS[trunk.dims](channels, classes, 1))
            layers = {"0": GroupNorm(channels, trunk.norm_groups), "3": last}
        elif config.pool == "attention":
            pixels = (trunk.image_size // trunk.stride) ** trunk.dims
            pool = AttentionPool(pixels, channels, channels // (trunk.head_channels or channels), classes)
            layers = {"0": GroupNorm(channels, trunk.norm_groups), "2": pool}
        elif config.pool == "spatial":
            layers = {"0": Linear(features, HIDDEN), "2": Linear(HIDDEN, classes)}
        else:
            layers = {"0": Linear(features, HIDDEN), "1": GroupNorm(HIDDEN), "3": Linear(HIDDEN, classes)}
        self.out = nn.ModuleDict(layers)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Noised pictures x [B, 3, H, W] at timesteps [B or 1] -> logits [B, classes] in the dtype of ``x``.

        Raises:
            ValueError: the picture size, or the number of timesteps, does not fit.
        """
        self.check_inputs(x, timesteps)
        maps = self.encode(x, F.silu(self.embed(timesteps)))
        if self.pool in ("adaptive", "attention"):
            last = self.out["0"](maps[-1].to(x.dtype), activation="silu")
            if self.pool == "attention":
                return self.out["2"](last)  # type: ignore[no-any-return]
            average = last.flatten(2).mean(2).view(*last.shape[:2], *[1] * self.config.dims)
            return self.out["3"](average).flatten(1)  # type: ignore[no-any-return]
        means = torch.cat([each.to(x.dtype).flatten(2).mean(2) for each in maps], dim=1)
        hidden = self.out["0"](means)
        if self.pool == "spatial":
            return self.out["2"](F.relu(hidden))  # type: ignore[no-any-return]
        normal = self.out["1"](hidden[:, :, None], activation="silu")[:, :, 0]
        return self.out["3"](normal)  # type: ignore[no-any-return]
