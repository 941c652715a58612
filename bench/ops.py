"""GroupNorm, attention and the text's perceptron at glide-base's shapes, against the original in PyTorch.

Each side has its own layout: [B, C, H, W] and [B, C, T] in memory for the original, channels-last for ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.suite import Case
from glide_fast.models.presets import preset
from glide_fast.ops import Resample, attention, group_norm, layer_norm, linear

NORM_FLOPS = 10  # a pixel and channel, nominally: statistics, normalisation, FiLM, SiLU


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim < 3 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _our_norm(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor, *, resample: Resample) -> Tensor:
    scale, shift = film.chunk(2, dim=1)
    return group_norm(x, weight, bias, scale=scale, shift=shift, activation="silu", resample=resample)


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor, *, resample: Resample) -> Tensor:
    scale, shift = film[:, :, None, None].chunk(2, dim=1)
    y = F.silu(F.group_norm(x, 32, weight, bias) * (1 + scale) + shift)
    if resample == "none":
        return y
    return F.interpolate(y, scale_factor=2, mode="nearest") if resample == "up" else F.avg_pool2d(y, 2)


def norm_case(channels: int, size: int, *, resample: Resample = "none") -> Case:
    """GroupNorm, FiLM, SiLU and resampling of one picture; its work is to read x and write y."""

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        parameters = 1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)
        return torch.randn(1, channels, size, size), *parameters, 0.1 * torch.randn(1, 2 * channels)

    moved = 4 * channels * size**2 * (1 + {"none": 1, "up": 4, "down": 0.25}[resample])
    return Case(
        name=f"GroupNorm FiLM SiLU{'' if resample == 'none' else f' {resample}'} {channels}x{size}x{size}",
        ours=partial(_our_norm, resample=resample),
        peer=partial(_plain_norm, resample=resample),
        inputs=inputs,
        work=moved,
        unit="GB/s",
        intensity=NORM_FLOPS * channels * size**2 / moved,
        layout=_channels_last,
    )


def _our_attention(qkv: Tensor, text: Tensor, *, heads: int) -> Tensor:
    query, key, value = torch.unflatten(qkv.transpose(1, 2), 2, (heads, 3, -1)).unbind(3)
    text_key, text_value = torch.unflatten(text.transpose(1, 2), 2, (heads, 2, -1)).unbind(3)
    y = attention(query, key, value, text_key=text_key, text_value=text_value)
    return y.flatten(2).transpose(1, 2)


def _plain_attention(qkv: Tensor, text: Tensor, *, heads: int) -> Tensor:
    query, key, value = torch.unflatten(qkv, 1, (heads, 3, -1)).unbind(2)  # [B, N, D, T]
    text_key, text_value = torch.unflatten(text, 1, (heads, 2, -1)).unbind(2)
    keys, values = torch.cat([text_key, key], dim=3), torch.cat([text_value, value], dim=3)
    root = query.shape[2] ** -0.25
    weights = torch.einsum("bnct,bncs->bnts", query * root, keys * root).softmax(dim=3)
    return torch.einsum("bnts,bncs->bnct", weights, values).flatten(1, 2)


def attention_case(channels: int, size: int, *, heads: int, text: int) -> Case:
    """Attention of one picture's pixels to the text and to each other; its work is the two products."""

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return torch.randn(1, 3 * channels, size**2), torch.randn(1, 2 * channels, text)

    work = 4 * channels * size**2 * (size**2 + text)
    return Case(
        name=f"attention {heads} heads {size}x{size} + {text}",
        ours=partial(_our_attention, heads=heads),
        peer=partial(_plain_attention, heads=heads),
        inputs=inputs,
        work=work,
        unit="GFLOP/s",
        intensity=work / (4 * channels * (4 * size**2 + 2 * text)),
        layout=_channels_last,
    )


def _our_perceptron(x: Tensor, weight: Tensor, bias: Tensor, first: Tensor, last: Tensor) -> Tensor:
    hidden = linear(layer_norm(x, weight, bias), first, activation="gelu")
    return linear(hidden, last, residual=x)


def _plain_perceptron(x: Tensor, weight: Tensor, bias: Tensor, first: Tensor, last: Tensor) -> Tensor:
    normal = F.layer_norm(x, weight.shape, weight, bias)
    return x + F.linear(F.gelu(F.linear(normal, first)), last)


def perceptron_case(width: int, tokens: int) -> Case:
    """x + MLP(LayerNorm(x)) of a text transformer's block; its work is the two products."""

    def inputs() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        parameters = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)
        weights = torch.randn(4 * width, width) / width**0.5, torch.randn(width, 4 * width) / (2 * width**0.5)
        return torch.randn(2, tokens, width), *parameters, *weights

    work = 2 * 2 * tokens * 8 * width**2
    return Case(
        name=f"LayerNorm and perceptron {tokens}x{width}",
        ours=_our_perceptron,
        peer=_plain_perceptron,
        inputs=inputs,
        work=work,
        unit="GFLOP/s",
        intensity=work / (4 * (8 * width**2 + 4 * tokens * width)),
    )


def with_backward(case: Case) -> Case:
    """Forward and backward: a norm also reads x and a gradient and writes x's; products become 3 to 3.5."""
    factor = 2.5 if case.unit == "GB/s" else 3.0 if "perceptron" in case.name else 3.5
    return replace(case, name=f"{case.name} + backward", backward=True, work=factor * case.work)


def cases() -> Iterable[Case]:
    """Every level of glide-base, its resampling, its attention; each forward, then with backward."""
    unet = preset("glide-base").unet
    text, head = unet.text.context if unet.text else 0, unet.head_channels or unet.channels
    maps = [
        (int(unet.channels * mult), unet.image_size >> level) for level, mult in enumerate(unet.channel_mult)
    ]
    chosen = [norm_case(*shape) for shape in maps]
    chosen += [norm_case(*maps[0], resample="down"), norm_case(*maps[1], resample="up")]
    if unet.text is not None:
        chosen.append(perceptron_case(unet.text.width, text))
    for channels, size in maps:
        if unet.image_size // size in unet.attention_strides:
            chosen.append(attention_case(channels, size, heads=channels // head, text=text))
    for case in chosen:
        yield from (case, with_backward(case))
