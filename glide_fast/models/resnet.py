"""CLIP's ResNet tower: three-layer stem, anti-aliased strides, attention pooling (arXiv 2103.00020, 2.4)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.models.layers import Conv2d, Linear

EXPANSION = 4
STRIDE = 32  # pixels of the picture a pixel of the last map


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Blocks of the four stages, and the width of the first; attention pooling has heads of 64 channels."""

    width: int
    layers: tuple[int, int, int, int]


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that computes in the dtype of its parameters (float32) and answers in that of its input."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Bottleneck(nn.Module):
    """1×1, 3×3, average pool instead of a stride, 1×1; the skip path is pooled the same way."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * planes
        self.conv1, self.bn1 = Conv2d(channels, planes, 1, bias=False), BatchNorm2d(planes)
        self.conv2, self.bn2 = Conv2d(planes, planes, 3, padding=1, bias=False), BatchNorm2d(planes)
        self.conv3, self.bn3 = Conv2d(planes, out, 1, bias=False), BatchNorm2d(out)
        self.stride = stride
        self.downsample = (
            nn.Sequential(OrderedDict({"0": Conv2d(channels, out, 1, bias=False), "1": BatchNorm2d(out)}))
            if stride > 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4·planes, H/stride, W/stride]
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(F.avg_pool2d(h, self.stride)))
        skip = x if self.downsample is None else self.downsample(F.avg_pool2d(x, self.stride))
        return F.relu(h + skip)


class AttentionPool(nn.Module):
    """The mean pixel asks, all pixels answer: [B, C, H, W] -> [B, out]."""

    def __init__(self, pixels: int, channels: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(channels**-0.5 * torch.randn(pixels + 1, channels))
        self.k_proj, self.q_proj = Linear(channels, channels), Linear(channels, channels)
        self.v_proj, self.c_proj = Linear(channels, channels), Linear(channels, out)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        x = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + self.positional_embedding.to(x.dtype)
        query, key, value = (
            layer(each).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, each in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, N, 1, D]
        return self.c_proj(attended.flatten(1))  # type: ignore[no-any-return]


class ResNetTower(nn.Module):
    """Normalised pictures [B, 3, H, W] -> embeddings [B, embedding]."""

    def __init__(self, config: ResNetConfig, image_size: int, embedding: int) -> None:
        super().__init__()
        if image_size % STRIDE:
            raise ValueError(
                f"picture size {image_size} is not divisible by {STRIDE}; use a multiple of {STRIDE}"
            )
        width = config.width
        self.conv1, self.bn1 = (
            Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False),
            BatchNorm2d(width // 2),
        )
        self.conv2, self.bn2 = (
            Conv2d(width // 2, width // 2, 3, padding=1, bias=False),
            BatchNorm2d(width // 2),
        )
        self.conv3, self.bn3 = Conv2d(width // 2, width, 3, padding=1, bias=False), BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(config.layers):
            planes = width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Bottleneck(channels, planes, 2 if stage and not block else 1))
                channels = EXPANSION * planes
            self.add_module(f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool((image_size // STRIDE) ** 2, channels, channels // 64, embedding)
        for name, parameter in self.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.attnpool(x)  # type: ignore[no-any-return]
