"""GLIDE's text transformer as the original code computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.layers import wide
from glide_fast.models.conditioning import TextConfig


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm by way of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).to(x.dtype)


class PlainSelfAttention(nn.Module):
    """Queries, keys and values interleaved a head; the full matrix, softmax in float32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        head = width // self.heads
        query, key, value = self.c_qkv(x).view(batch, tokens, self.heads, 3 * head).split(head, dim=-1)
        scale = head**-0.25
        scores = torch.einsum("bthc,bshc->bhts", query * scale, key * scale)
        weights = wide(scores).softmax(dim=-1).to(scores.dtype)
        return self.c_proj(torch.einsum("bhts,bshc->bthc", weights, value).reshape(x.shape))  # type: ignore[no-any-return]


class PlainPerceptron(nn.Module):
    """Two layers around GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class PlainTextBlock(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = PlainSelfAttention(width, heads)
        self.ln_1 = PlainLayerNorm(width)
        self.mlp = PlainPerceptron(width)
        self.ln_2 = PlainLayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class PlainTransformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(PlainTextBlock(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)  # type: ignore[no-any-return]


class PlainTextLayers(nn.Module):
    """What a U-Net with text has besides: embeddings, transformer, projection, at its top level."""

    def add_text_layers(self, config: TextConfig, embedding_channels: int) -> None:
        """Create them; the pooled text gets ``embedding_channels``."""
        width = config.width
        self.positional_embedding = nn.Parameter(torch.empty(config.context, width))
        if config.padding_embedding:
            self.padding_embedding = nn.Parameter(torch.empty(config.context, width))
        self.transformer = PlainTransformer(width, config.layers, config.heads)
        self.final_ln = PlainLayerNorm(width) if config.final_norm else nn.Identity()
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.transformer_proj = nn.Linear(width, embedding_channels)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask [B, S] -> pooled [B, E] and sequence [B, W, S]."""
        x = self.token_embedding(tokens) + self.positional_embedding[None]
        if hasattr(self, "padding_embedding"):
            x = torch.where(mask[..., None], x, self.padding_embedding[None])
        x = self.final_ln(self.transformer(x))
        return self.transformer_proj(x[:, -1]), x.permute(0, 2, 1)
