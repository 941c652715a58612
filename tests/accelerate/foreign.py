"""Models such as other people have them: upstream's attribute names and module types, none of our code.

Three dialects differ in what their names do not tell: ``glide`` has the SiLU inside its norms and text in its
attention, ``guided`` checkpoints and has two orders of the projection, ``improved`` attends to heads that are
part of the batch. All in plain PyTorch.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.accelerate.foreign_text import QKVAttention as TextQKVAttention
from tests.accelerate.foreign_text import attend

Dialect = Literal["glide", "guided", "improved"]
GROUPS = 8


class GroupNorm32(nn.GroupNorm):
    """Float32 statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class SwishNorm(GroupNorm32):
    """Float32 statistics and a swish inside, as a number: 0 none, 1 SiLU, else its steepness."""

    def __init__(self, groups: int, channels: int, swish: float) -> None:
        super().__init__(groups, channels)
        self.swish = swish

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.sigmoid(self.swish * y) if self.swish else y


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Resize(nn.Module):
    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        sides = (1, 2, 2)[-(x.ndim - 2) :] if x.ndim == 5 else (2,) * (x.ndim - 2)
        if self.up:
            return F.interpolate(x, scale_factor=[float(side) for side in sides], mode="nearest")
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3](x, sides)


class Checkpoint(torch.autograd.Function):
    """Recomputes a function of inputs and parameters when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, function: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.inputs, ctx.parameters = function, tensors[:count], tensors[count:]
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [each.detach().requires_grad_() for each in ctx.inputs]
        with torch.enable_grad():
            output = ctx.function(*[each.view_as(each) for each in inputs])
        return None, None, *torch.autograd.grad(output, [*inputs, *ctx.parameters], grads, allow_unused=True)


def norm_of(dialect: Dialect, channels: int, *, swish: bool) -> list[nn.Module]:
    """A norm and what follows it."""
    if dialect == "glide":
        return [SwishNorm(GROUPS, channels, float(swish)), nn.Identity()]
    return [GroupNorm32(GROUPS, channels), nn.SiLU() if dialect == "guided" else Swish()]


class ResBlock(nn.Module):
    def __init__(
        self,
        dialect: Dialect,
        channels: int,
        embedding: int,
        out: int | None = None,
        *,
        film: bool = False,
        resample: Literal["up", "down"] | None = None,
        dims: int = 2,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        out = out or channels
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.use_scale_shift_norm, self.use_checkpoint = film, checkpoint
        self.in_layers = nn.Sequential(
            *norm_of(dialect, channels, swish=True), conv(channels, out, 3, padding=1)
        )
        self.updown = resample is not None
        self.h_upd = Resize(resample == "up") if resample else nn.Identity()
        self.x_upd = Resize(resample == "up") if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if film else out))
        head = norm_of(dialect, out, swish=not film)
        if dialect == "glide" and film:
            head[1] = nn.SiLU()
        self.out_layers = nn.Sequential(*head, nn.Dropout(dropout), conv(out, out, 3, padding=1))
        nn.init.zeros_(self.out_layers[3].weight)
        self.skip_connection = nn.Identity() if out == channels else conv(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self.use_checkpoint:
            return self._forward(x, emb)
        return Checkpoint.apply(self._forward, 2, x, emb, *self.parameters())

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h, x = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x))), self.x_upd(x)
        else:
            h = self.in_layers(x)
        extra = self.emb_layers(emb).type(h.dtype)
        extra = extra.reshape(*extra.shape, *[1] * (h.ndim - 2))
        if self.use_scale_shift_norm:
            scale, shift = extra.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + extra)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    """A head's query, key and value lie together."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        by_head = qkv.reshape(batch * self.n_heads, width // self.n_heads, length)
        return attend(*by_head.chunk(3, dim=1)).reshape(batch, -1, length)


class QKVAttention(nn.Module):
    """All queries, then all keys, then all values."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        flat = (batch * self.n_heads, width // 3 // self.n_heads, length)
        return attend(*(part.reshape(flat) for part in qkv.chunk(3, dim=1))).reshape(batch, -1, length)


class HeadlessAttention(nn.Module):
    """Heads are part of the batch."""

    def forward(self, qkv: Tensor) -> Tensor:
        return attend(*qkv.chunk(3, dim=1))


class AttentionBlock(nn.Module):
    def __init__(
        self, dialect: Dialect, channels: int, heads: int, *, text: int | None = None, new_order: bool = False
    ) -> None:
        super().__init__()
        self.dialect, self.num_heads = dialect, heads
        self.norm = norm_of(dialect, channels, swish=False)[0]
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        cores = {"guided": QKVAttention if new_order else QKVAttentionLegacy, "glide": TextQKVAttention}
        self.attention = HeadlessAttention() if dialect == "improved" else cores[dialect](heads)
        if text is not None:
            self.encoder_kv = nn.Conv1d(text, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, encoder_out: Tensor | None = None) -> Tensor:
        if self.dialect == "guided":
            return Checkpoint.apply(self._forward, 1, x, *self.parameters())
        return self._forward(x, encoder_out)

    def _forward(self, x: Tensor, encoder_out: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.dialect == "improved":
            h = self.attention(qkv.reshape(len(x) * self.num_heads, -1, qkv.shape[-1]))
        elif encoder_out is None:
            h = self.attention(qkv)
        else:
            h = self.attention(qkv, self.encoder_kv(encoder_out))
        return x + self.proj_out(h.reshape(len(x), -1, qkv.shape[-1])).reshape(x.shape)


class Stage(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, text) if isinstance(layer, AttentionBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Two levels with upstream's numbering; ``half()`` leaves norms, embeddings and ``out`` in float32."""

    def __init__(
        self,
        dialect: Dialect = "guided",
        channels: int = 16,
        *,
        heads: int = 2,
        film: bool = True,
        text: int | None = None,
        new_order: bool = False,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        wide, embedding = 2 * channels, 4 * channels
        self.channels, self.dtype = channels, torch.float32
        self.time_embed = nn.Sequential(
            nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )

        def block(inside: int, out: int, resample: Any = None) -> ResBlock:
            options = {"film": film, "resample": resample, "dropout": dropout, "checkpoint": checkpoint}
            return ResBlock(dialect, inside, embedding, out, **options)

        def attention() -> AttentionBlock:
            return AttentionBlock(dialect, wide, heads, text=text, new_order=new_order)

        stem = nn.Conv2d(3, channels, 3, padding=1)
        first = [Stage(stem), Stage(block(channels, channels)), Stage(block(channels, channels, "down"))]
        self.input_blocks = nn.ModuleList([*first, Stage(block(channels, wide), attention())])
        self.middle_block = Stage(block(wide, wide), attention(), block(wide, wide))
        last = [Stage(block(2 * wide, wide), attention())]
        last += [Stage(block(wide + channels, wide), attention(), block(wide, wide, "up"))]
        last += [Stage(block(wide + channels, channels)), Stage(block(2 * channels, channels))]
        self.output_blocks = nn.ModuleList(last)
        self.out = nn.Sequential(
            *norm_of(dialect, channels, swish=True), nn.Conv2d(channels, 6, 3, padding=1)
        )

    def torso_to(self, dtype: torch.dtype) -> UNet:
        """Convolutions of the torso compute in ``dtype``."""
        self.dtype = dtype
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for layer in part.modules():
                if isinstance(layer, nn.Conv1d | nn.Conv2d):
                    layer.to(dtype)
        return self

    def embed(self, timesteps: Tensor) -> Tensor:
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor | None = None) -> Tensor:
        emb, h, maps = self.embed(timesteps), x.to(self.dtype), []
        text = None if text is None else text.to(self.dtype)
        for stage in self.input_blocks:
            h = stage(h, emb, text)
            maps.append(h)
        h = self.middle_block(h, emb, text)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, maps.pop()], dim=1), emb, text)
        return self.out(h.to(x.dtype))
