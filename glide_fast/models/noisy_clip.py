"""GLIDE's noise-aware CLIP: a CLIP that reads pictures x_t at any timestep t (arXiv 2112.10741, section 2.4).

Two transformers with upstream's state-dict names; queries and keys have separate weights, keys no bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glide_fast.models import branch
from glide_fast.models.branch import (
    Branch,
    Projection,
    attention_at,
    beside,
    last_block_at,
    patch_tokens,
    rows_at,
    through,
)
from glide_fast.models.layer_norm import Norm, normed
from glide_fast.models.transformer import self_attention

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures CLIP was trained on, in 0 .. 1
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class NoisyCLIPConfig:
    """Both towers; a head has ``*_head_channels`` channels, a timestep is one of ``timesteps`` (0: none).

    ``tokenizer`` is one that :func:`glide_fast.text.framing.framed` knows.
    """

    embedding: int
    image_size: int
    patch_size: int
    image_heads: int
    image_head_channels: int
    image_layers: int
    text_heads: int
    text_head_channels: int
    text_layers: int
    context: int = 77
    vocabulary: int = 65536
    timesteps: int = 1000
    logit_scale: float = 100.0
    tokenizer: str = "clip"


class AttentionBranch(Branch):
    """Norm and multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.ln = Norm(width)
        self.f_q = Projection(width, width, frozen_middle=True)
        self.f_k = Projection(width, width, bias=False)
        self.f_v = Projection(width, width, frozen_middle=True)
        self.f_c = Projection(width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        inner, same = normed(self.ln, x)
        query, key, value = (f(inner).unflatten(2, (self.heads, -1)) for f in (self.f_q, self.f_k, self.f_v))
        attended = self_attention(query, key, value, causal=self.causal)
        return through(self.f_c, attended, residual=same if residual is x else residual)

    def at(self, x: Tensor, places: Tensor) -> Tensor:  # [B, T, C], int64 [B] -> [B, C]
        """The rows of x + self(x) at these places."""
        normal, x = normed(self.ln, x)
        query = self.f_q(rows_at(normal, places)).unflatten(1, (self.heads, -1))
        key, value = (f(normal).unflatten(2, (self.heads, -1)) for f in (self.f_k, self.f_v))
        attended = attention_at(query, key, value, places, causal=self.causal)
        return through(self.f_c, attended, residual=rows_at(x, places))


class PerceptronBranch(Branch):
    """Norm, and two layers around GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f_1 = Projection(width, 4 * width)
        self.f_2 = Projection(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        inner, same = normed(self.ln, x)
        hidden = through(self.f_1, inner, activation="gelu")
        return through(self.f_2, hidden, residual=same if residual is x else residual)


class Block(branch.Block):
    """x + attention(x), then x + perceptron(x)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.f_attn = AttentionBranch(width, heads, causal=causal)
        self.f_mlp = PerceptronBranch(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = beside(x, self.f_attn, x)
        return beside(x, self.f_mlp, x)

    def at(self, x: Tensor, places: Tensor) -> Tensor:  # [B, T, C], int64 [B] -> [B, C]
        """The rows of self(x) at these places."""
        rows = self.f_attn.at(x, places)
        return beside(rows, self.f_mlp, rows)


class Output(nn.Module):
    """Norm and projection of the one token that speaks for the whole: [B, C] -> [B, embedding]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f = Projection(width, embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.ln(x))  # type: ignore[no-any-return]


class PictureInput(nn.Module):
    """Patches behind a token that is the timestep's, or the same for all where there are no timesteps."""

    def __init__(self, config: NoisyCLIPConfig, width: int) -> None:
        super().__init__()
        patch = config.patch_size
        self.timesteps = config.timesteps
        if config.timesteps:
            self.w_t = nn.Parameter(width**-0.5 * torch.randn(config.timesteps, width))
        else:
            self.pred_state = nn.Parameter(width**-0.5 * torch.randn(width))
        self.patch_proj = nn.Parameter((3 * patch * patch) ** -0.5 * torch.randn(width, 3, patch, patch))
        self.w_pos = nn.Parameter(width**-0.5 * torch.randn((config.image_size // patch) ** 2 + 1, width))
        self.ln = Norm(width)

    def forward(self, x: Tensor, timesteps: Tensor | None) -> Tensor:
        """x [B, 3, H, W] in [-1, 1], timesteps int64 [B] -> [B, 1 + patches, C]."""
        if timesteps is None and self.timesteps:
            raise ValueError("this CLIP reads noised pictures; give timesteps [B]")
        if timesteps is not None and not self.timesteps:
            raise ValueError("this CLIP knows no timesteps; leave them out")
        mean, deviation = (x.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_DEVIATION))
        normal = ((x + 1) / 2 - mean) / deviation
        patches = patch_tokens(normal, self.patch_proj.to(x.dtype))
        first = self.pred_state.expand(len(x), -1) if timesteps is None else self.w_t[timesteps]
        tokens = torch.cat([first[:, None].to(x.dtype), patches], dim=1)
        return self.ln(tokens + self.w_pos.to(x.dtype))  # type: ignore[no-any-return]


class TextInput(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: NoisyCLIPConfig, width: int) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(width**-0.5 * torch.randn(config.vocabulary, width))
        self.w_pos = nn.Parameter(width**-0.5 * torch.randn(config.context, width))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, C]
        return self.w_voc[tokens] + self.w_pos


class Tower(nn.Module):
    """``blocks``: input, block_0 …, output; subclasses choose the token that speaks.

    With ``recompute`` the blocks' activations are not kept for the backward pass but computed again in it.
    """

    recompute = False

    def __init__(self, first: nn.Module, width: int, heads: int, layers: int, embedding: int) -> None:
        super().__init__()
        causal = isinstance(first, TextInput)
        self.layers = [f"block_{index}" for index in range(layers)]
        blocks = {name: Block(width, heads, causal=causal) for name in self.layers}
        self.blocks = nn.ModuleDict({"input": first, **blocks, "output": Output(width, embedding)})

    def transform(self, x: Tensor, places: Tensor) -> Tensor:
        """All the blocks between input and output: x [B, T, C], int64 [B] -> [B, C] of these tokens."""
        *names, last = self.layers
        for name in names:
            x = self._call(self.blocks[name], x)
        return self._call(functools.partial(last_block_at, self.blocks[last]), x, places)

    def _call(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return function(*inputs)


class PictureEncoder(Tower):
    """Noised pictures -> embeddings, not of unit length."""

    def __init__(self, config: NoisyCLIPConfig) -> None:
        width = config.image_heads * config.image_head_channels
        first = PictureInput(config, width)
        super().__init__(first, width, config.image_heads, config.image_layers, config.embedding)

    def features(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """What becomes the embedding: the first token [B, C] behind the last block."""
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.transform(self.blocks["input"](x, timesteps), first)

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """x [B, 3, H, W] in [-1, 1], timesteps int64 [B] -> [B, embedding]."""
        return self.blocks["output"](self.features(x, timesteps))  # type: ignore[no-any-return]


class TextEncoder(Tower):
    """Texts -> embeddings, not of unit length."""

    def __init__(self, config: NoisyCLIPConfig) -> None:
        width = config.text_heads * config.text_head_channels
        first = TextInput(config, width)
        super().__init__(first, width, config.text_heads, config.text_layers, config.embedding)

    def features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What becomes the embedding: the last token [B, C] behind the last block."""
        return self.transform(self.blocks["input"](tokens), lengths - 1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens [B, context] and their number in each text [B] -> [B, embedding]."""
        return self.blocks["output"](self.features(tokens, lengths))  # type: ignore[no-any-return]


class NoisyCLIP(nn.Module):
    """Both towers; upstream keeps them in two files, ``image_encoder`` and ``text_encoder``."""

    def __init__(self, config: NoisyCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = PictureEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.logit_scale = math.log(config.logit_scale)

    def image_embeddings(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Unit vectors [B, embedding] of noised pictures x [B, 3, H, W] at timesteps int64 [B]."""
        return F.normalize(self.image_encoder(x, timesteps), dim=1)

    def text_embeddings(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors [B, embedding] of texts: tokens [B, context], of which ``lengths`` [B] count."""
        return F.normalize(self.text_encoder(tokens, lengths), dim=1)

    def similarity(self, x: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        """Scaled cosine of each picture with its own text [B]; its gradient by x guides a sampler."""
        pictures = self.image_embeddings(x, timesteps)
        return math.exp(self.logit_scale) * (pictures * text_embeddings).sum(1)
