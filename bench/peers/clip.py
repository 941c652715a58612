"""OpenAI's CLIP (vision transformer) and GLIDE's noise-aware CLIP as the original code computes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.layers import wide
from bench.peers.text import PlainLayerNorm
from glide_fast.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPConfig, VisionTransformerConfig
from glide_fast.models.noisy_clip import NoisyCLIPConfig

HEAD = 64  # channels of a head of CLIP
BLOCK = 32  # the noise-aware CLIP pads its tokens to a multiple of it
HIDDEN_SCORE = -1e10


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PlainClipBlock(nn.Module):
    """PyTorch's multi-head attention on [T, B, C], and a perceptron around QuickGELU."""

    def __init__(self, width: int, heads: int, context: int | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = PlainLayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = PlainLayerNorm(width)
        hidden = None if context is None else torch.full((context, context), -torch.inf, device="cpu").triu(1)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.ln_1(x)
        x = x + self.attn(normal, normal, normal, need_weights=False, attn_mask=self.hidden)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(PlainClipBlock(width, heads, context) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)  # type: ignore[no-any-return]


class PlainVision(nn.Module):
    """Patches and a class token through a transformer."""

    def __init__(self, config: VisionTransformerConfig, image_size: int, embedding: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.empty(width, embedding))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = PlainLayerNorm(width)
        self.transformer = _Transformer(width, config.layers, width // HEAD)
        self.ln_post = PlainLayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).permute(0, 2, 1)
        token = self.class_embedding + torch.zeros_like(patches[:, :1])
        x = self.ln_pre(torch.cat([token, patches], dim=1) + self.positional_embedding)
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]


class PlainCLIP(nn.Module):
    """Both towers: forward gives the embeddings of pictures and of texts."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        if not isinstance(config.vision, VisionTransformerConfig):
            raise ValueError("the plain CLIP has a vision transformer; measure a preset clip-vit-…")
        width = config.width
        self.positional_embedding = nn.Parameter(torch.empty(config.context, width))
        self.text_projection = nn.Parameter(torch.empty(width, config.embedding))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.visual = PlainVision(config.vision, config.image_size, config.embedding)
        self.transformer = _Transformer(width, config.layers, config.heads, config.context)
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.ln_final = PlainLayerNorm(width)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W], tokens [B, context] -> two of [B, embedding]."""
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.transformer(x)
        x = self.ln_final(x)
        ends = x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=-1)]
        return self.visual(image), ends @ self.text_projection


class _Projection(nn.Module):
    def __init__(self, channels: int, out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out, channels))
        self.b = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class _Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.empty(channels))
        self.b = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), self.g.shape, self.g, self.b).to(x.dtype)


class _NoisyAttention(nn.Module):
    """Dense attention over tokens padded to a multiple of 32, the padding hidden by scores of -1e10."""

    hidden: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.padding = -context % BLOCK
        self.ln = _Norm(width)
        self.f_q, self.f_v, self.f_c = (_Projection(width, width) for _ in range(3))
        self.f_k = _Projection(width, width, bias=False)
        hidden = torch.zeros(context + self.padding, device="cpu")
        hidden[context:] = HIDDEN_SCORE
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, self.ln(x)
        query, key, value = (
            torch.unflatten(F.pad(f(x), (0, 0, 0, self.padding)), 2, (self.heads, -1)).transpose(1, 2)
            for f in (self.f_q, self.f_k, self.f_v)
        )
        scale = query.shape[-1] ** -0.25
        scores = torch.einsum("bhtd,bhsd->bhts", query * scale, key * scale) + self.hidden
        weights = wide(scores).softmax(dim=-1).to(scores.dtype)
        attended = torch.einsum("bhts,bhsd->bhtd", weights, value).transpose(1, 2)
        return self.f_c(attended[:, : self.context].reshape(shape))  # type: ignore[no-any-return]


class _NoisyPerceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = _Norm(width)
        self.f_1 = _Projection(width, 4 * width)
        self.f_2 = _Projection(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.f_2(F.gelu(self.f_1(self.ln(x))))  # type: ignore[no-any-return]


class _NoisyBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.f_attn = _NoisyAttention(width, heads, context)
        self.f_mlp = _NoisyPerceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f_attn(x)
        return x + self.f_mlp(x)  # type: ignore[no-any-return]


class _NoisyInput(nn.Module):
    def __init__(self, config: NoisyCLIPConfig, width: int) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.w_t = nn.Parameter(torch.empty(config.timesteps, width))
        self.patch_proj = nn.Parameter(torch.empty(width, 3, self.patch, self.patch))
        self.w_pos = nn.Parameter(torch.empty((config.image_size // self.patch) ** 2 + 1, width))
        self.ln = _Norm(width)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        mean, deviation = (255 * x.new_tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        normal = ((x + 1) * 127.5 - mean) / deviation
        patches = F.conv2d(normal, self.patch_proj, stride=self.patch).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.w_t[timesteps][:, None], patches], dim=1)
        return self.ln(tokens + self.w_pos)  # type: ignore[no-any-return]


class _NoisyOutput(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.ln = _Norm(width)
        self.f = _Projection(width, embedding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.ln(x))  # type: ignore[no-any-return]


class PlainNoisyPictures(nn.Module):
    """The picture tower of the noise-aware CLIP, and its likeness to given texts."""

    def __init__(self, config: NoisyCLIPConfig) -> None:
        super().__init__()
        width = config.image_heads * config.image_head_channels
        context = (config.image_size // config.patch_size) ** 2 + 1
        self.layers = [f"block_{index}" for index in range(config.image_layers)]
        blocks = {name: _NoisyBlock(width, config.image_heads, context) for name in self.layers}
        first, last = _NoisyInput(config, width), _NoisyOutput(width, config.embedding)
        self.blocks = nn.ModuleDict({"input": first, **blocks, "output": last})
        self.scale = math.exp(math.log(config.logit_scale))

    def forward(self, x: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        """x [B, 3, H, W], timesteps int64 [B], unit vectors of texts [B, embedding] -> likeness [B]."""
        h = self.blocks["input"](x, timesteps)
        for name in self.layers:
            h = self.blocks[name](h)
        pictures: Tensor = self.blocks["output"](h[:, 0])
        pictures = pictures / torch.linalg.norm(pictures, dim=-1, keepdim=True)
        return self.scale * (pictures * texts).sum(dim=-1)
