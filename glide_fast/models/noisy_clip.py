"""GLIDE's noise-aware CLIP: a CLIP that reads pictures x_t at any timestep t (arXiv 2112.10741, section 2.4).

Two transformers with upstream's state-dict names; queries and keys have separate weights, keys no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glide_fast import ops
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


class Projection(nn.Module):
    """A linear layer with upstream's names ``w`` [out, in] and ``b``; weights follow the input's dtype.

    ``frozen_middle``: the middle third of the bias has no gradient. Upstream does so to the biases of queries
    and values, as if each were a joint bias of queries, keys and values; its training is reproduced with it.
    """

    def __init__(self, channels: int, out: int, *, bias: bool = True, frozen_middle: bool = False) -> None:
        super().__init__()
        self.frozen_middle = frozen_middle
        self.w = nn.Parameter(channels**-0.5 * torch.randn(out, channels))
        self.b = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # [..., channels] -> [..., out]
        bias = None if self.b is None else self.b.to(x.dtype)
        if bias is not None and self.frozen_middle:
            before, middle, after = torch.chunk(bias, 3)
            bias = torch.cat([before, middle.detach(), after])
        return ops.linear(x, self.w.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm with upstream's names ``g`` and ``b``, computed in their dtype (float32)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return F.layer_norm(x.to(self.g.dtype), self.g.shape, self.g, self.b).to(x.dtype)


class AttentionBranch(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = self.ln(x)
        query, key, value = (f(x).unflatten(2, (self.heads, -1)) for f in (self.f_q, self.f_k, self.f_v))
        return self.f_c(self_attention(query, key, value, causal=self.causal))  # type: ignore[no-any-return]


class PerceptronBranch(nn.Module):
    """Norm, and two layers around GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f_1 = Projection(width, 4 * width)
        self.f_2 = Projection(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        return self.f_2(F.gelu(self.f_1(self.ln(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(x), then x + perceptron(x)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.f_attn = AttentionBranch(width, heads, causal=causal)
        self.f_mlp = PerceptronBranch(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = x + self.f_attn(x)
        return x + self.f_mlp(x)  # type: ignore[no-any-return]


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
        self.patch_size = patch
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
        patches = F.conv2d(normal, self.patch_proj.to(x.dtype), stride=self.patch_size)
        first = self.pred_state.expand(len(x), -1) if timesteps is None else self.w_t[timesteps]
        tokens = torch.cat([first[:, None].to(x.dtype), patches.flatten(2).transpose(1, 2)], dim=1)
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

    def transform(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        """All the blocks between input and output."""
        again = self.recompute and torch.is_grad_enabled()
        for name in self.layers:
            block = self.blocks[name]
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x


class PictureEncoder(Tower):
    """Noised pictures -> embeddings, not of unit length."""

    def __init__(self, config: NoisyCLIPConfig) -> None:
        width = config.image_heads * config.image_head_channels
        first = PictureInput(config, width)
        super().__init__(first, width, config.image_heads, config.image_layers, config.embedding)

    def features(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """What becomes the embedding: the first token [B, C] behind the last block."""
        return self.transform(self.blocks["input"](x, timesteps))[:, 0]

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
        x = self.transform(self.blocks["input"](tokens))
        return x[torch.arange(len(x), device=x.device), lengths - 1]

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
