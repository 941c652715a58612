"""CLIP: pictures and texts in one space (Radford et al. 2021, arXiv 2103.00020), with OpenAI's names.

The picture tower is a vision transformer or a ResNet; the text tower is a causal transformer. Weights follow
the activations' dtype at use; norms compute in that of their parameters, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.branch import (
    Block,
    Branch,
    attention_at,
    beside,
    last_block_at,
    patch_tokens,
    rows_at,
    through,
)
from glide_fast.models.layer_norm import LayerNorm, normed
from glide_fast.models.layers import Conv2d, Linear, is_watched, pixels_as_tokens
from glide_fast.models.resnet import ResNetConfig, ResNetTower
from glide_fast.models.transformer import self_attention

VISION_HEAD_CHANNELS = 64
LARGEST_LOGIT_SCALE = 100.0
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], subtracted before the picture tower
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """A vision transformer over patches of ``patch_size`` pixels, with heads of 64 channels."""

    width: int
    layers: int
    patch_size: int


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers; ``embedding`` is the width of the space they share."""

    embedding: int
    image_size: int
    vision: VisionTransformerConfig | ResNetConfig
    width: int
    layers: int
    heads: int
    context: int = 77
    vocabulary: int = 49408


class ClipAttention(Branch):
    """Multi-head self-attention with PyTorch's parameter names (queries, keys, values stacked).

    Tokens come as [T, B, C] where ``batch_first`` is set to False, as in PyTorch.
    """

    batch_first: bool = True

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        query, key, value = self._project(x)
        if not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        attended = self_attention(query, key, value, causal=self.causal)
        attended = attended if self.batch_first else attended.transpose(0, 1)
        return through(self.out_proj, attended, residual=residual)

    def at(self, x: Tensor, places: Tensor, residual: Tensor) -> Tensor:
        """x [B, T, C] in this order always, places int64 [B], residual [B, C] -> [B, C] of these tokens."""
        query, key, value = self._project(x)
        attended = attention_at(rows_at(query, places), key, value, places, causal=self.causal)
        return through(self.out_proj, attended, residual=residual)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [..., N, D] each."""
        projected = ops.linear(x, self.in_proj_weight.to(x.dtype), self.in_proj_bias.to(x.dtype))
        return torch.unflatten(projected, 2, (3, self.heads, -1)).unbind(2)


class ClipPerceptron(Branch):
    """Two layers around QuickGELU, x sigmoid(1.702 x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        return through(self.c_proj, through(self.c_fc, x, activation="quick_gelu"), residual=residual)


class ClipBlock(Block):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attn = ClipAttention(width, heads, causal=causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = ClipPerceptron(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        inner, x = normed(self.ln_1, x)
        x = beside(x, self.attn, inner)
        inner, x = normed(self.ln_2, x)
        return beside(x, self.mlp, inner)

    def at(self, x: Tensor, places: Tensor) -> Tensor:  # [B, T, C], int64 [B] -> [B, C]
        """The rows of self(x) at these places; x has the batch first always."""
        inner, x = normed(self.ln_1, x)
        rows = self.attn.at(inner, places, residual=rows_at(x, places))
        inner, rows = normed(self.ln_2, rows)
        return beside(rows, self.mlp, inner)


class ClipTransformer(nn.Module):
    """A stack of blocks, initialised as in the paper's code (normal, narrower for deeper stacks)."""

    batch_first: bool = True

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"CLIP width {width} is not divisible by {heads} heads; use a divisor of {width}"
            )
        self.resblocks = nn.ModuleList(ClipBlock(width, heads, causal=causal) for _ in range(layers))
        deep = (2 * layers) ** -0.5
        stds = {"in_proj_weight": 1.0, "out_proj.weight": deep, "c_fc.weight": 2**-0.5, "c_proj.weight": deep}
        for name, parameter in self.resblocks.named_parameters():
            for ending, std in stds.items():
                if name.endswith(ending):
                    nn.init.normal_(parameter, std=std * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        for block in self.resblocks:
            x = block(x)
        return x

    def sequence_first(self) -> None:
        """From now on take and return tokens as [T, B, C], each block too."""
        for module in self.modules():
            if isinstance(module, (ClipAttention, ClipTransformer)):
                module.batch_first = False

    def at(self, x: Tensor, places: Tensor) -> Tensor:
        """x [B, T, C], places int64 [B] -> [B, C] of these tokens, whatever order the blocks take them in."""
        *blocks, last = self.resblocks
        x = x if self.batch_first else x.transpose(0, 1)
        for block in blocks:
            x = block(x)
        return last_block_at(last, x, places, batch_first=self.batch_first)


class VisionTransformer(nn.Module):
    """Patches and a class token through a transformer; the class token, projected, is the embedding."""

    def __init__(self, config: VisionTransformerConfig, image_size: int, embedding: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        if image_size % patch:
            raise ValueError(
                f"picture size {image_size} is not divisible by patches of {patch}; use a multiple"
            )
        if width % VISION_HEAD_CHANNELS:
            raise ValueError(
                f"vision width {width} is not divisible by {VISION_HEAD_CHANNELS}; use a multiple"
            )
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(scale * torch.randn(width, embedding))
        self.conv1 = Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre = LayerNorm(width)
        self.transformer = ClipTransformer(width, config.layers, width // VISION_HEAD_CHANNELS, causal=False)
        self.ln_post = LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, embedding]
        patches = self._patches(image)
        token = self.class_embedding.to(image.dtype).expand(len(image), 1, -1)
        x = torch.cat([token, patches], dim=1) + self.positional_embedding.to(image.dtype)
        first = torch.zeros(len(image), dtype=torch.long, device=image.device)
        x = self.transformer.at(self.ln_pre(x), first)
        return self.ln_post(x) @ self.proj.to(image.dtype)  # type: ignore[no-any-return]

    def _patches(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, patches, C]
        if type(self.conv1) is Conv2d and not is_watched(self.conv1):
            return patch_tokens(image, self.conv1.weight.to(image.dtype))
        return pixels_as_tokens(self.conv1(image))


class CLIP(nn.Module):
    """Both towers and the temperature; ``compute_dtype`` is that of the activations."""

    def __init__(self, config: CLIPConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        width = config.width
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embedding))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.visual = (
            VisionTransformer(config.vision, config.image_size, config.embedding)
            if isinstance(config.vision, VisionTransformerConfig)
            else ResNetTower(config.vision, config.image_size, config.embedding)
        )
        self.transformer = ClipTransformer(width, config.layers, config.heads, causal=True)
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.ln_final = LayerNorm(width)

    def encode_image(self, image: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, embedding], not of unit length.

        Raises:
            ValueError: the pictures are not of the model's size.
        """
        size = self.config.image_size
        if image.shape[1:] != (3, size, size):
            raise ValueError(f"pictures are {tuple(image.shape)}; this CLIP reads [B, 3, {size}, {size}]")
        return self.visual(image.to(self.compute_dtype))  # type: ignore[no-any-return]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [B, context], whose largest id marks the end of the text, -> [B, embedding].

        Raises:
            ValueError: the tokens are not of the model's context length.
        """
        if tokens.shape[-1] != self.config.context:
            raise ValueError(f"tokens have length {tokens.shape[-1]}, the context is {self.config.context}")
        x = self.token_embedding(tokens).to(self.compute_dtype)
        x = x + self.positional_embedding.to(self.compute_dtype)
        ends = self.ln_final(self.transformer.at(x, tokens.argmax(dim=-1)))
        return ends @ self.text_projection.to(self.compute_dtype)  # type: ignore[no-any-return]

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities: per picture [images, texts], and the same per text [texts, images]."""
        images, texts = (
            F.normalize(each, dim=1) for each in (self.encode_image(image), self.encode_text(tokens))
        )
        logits = self.logit_scale.exp() * images @ texts.T
        return logits, logits.T
