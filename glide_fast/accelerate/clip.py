"""CLIP's transformer block, built on ``nn.MultiheadAttention``, and its attention pool (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.accelerate.perceptron import affine
from glide_fast.accelerate.plan import Noise, Plan, types_of


@dataclass(frozen=True, kw_only=True)
class ClipAttentionPlan(Plan):
    """The block's method ``attention``: tokens [T, B, C], seen through ``attn_mask`` where there is one."""

    @property
    def title(self) -> str:
        return "self-attention of a transformer block"

    def inner(self, module: Any) -> tuple[nn.Module, ...]:
        return (module.attn,)

    def products(self, module: Any) -> list[Tensor]:
        return [module.attn.in_proj_weight, module.attn.out_proj.weight]

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        tokens = 6 if module.attn_mask is None else module.attn_mask.shape[-1]
        return [(noise(tokens, 2, module.attn.embed_dim),)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return isinstance(inputs[0], Tensor) and inputs[0].ndim == 3

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        x, attn, mask = inputs[0], module.attn, module.attn_mask
        projected = affine(x, attn.in_proj_weight, attn.in_proj_bias)  # [T, B, 3C]
        query, key, value = torch.unflatten(projected.transpose(0, 1), 2, (3, attn.num_heads, -1)).unbind(2)
        if mask is None:
            attended = ops.attention(query, key, value)  # [B, T, N, D]
        elif _is_causal(mask):
            attended = ops.causal_attention(query, key, value)
        else:
            mask = mask[..., -len(x) :, -len(x) :].to(dtype=x.dtype, device=x.device)
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # [B, N, T, D]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        return affine(attended.transpose(0, 1).flatten(2), attn.out_proj.weight, attn.out_proj.bias)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask hides exactly what is behind each token; one on a GPU is not asked: that would wait."""
    if mask.device.type != "cpu" or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    return (
        torch.equal(mask, torch.full_like(mask, -torch.inf).triu_(1)) if mask.is_floating_point() else False
    )


@dataclass(frozen=True, kw_only=True)
class ClipPoolPlan(Plan):
    """The pool: the mean pixel asks, all pixels answer, [B, C, H, W] -> [B, out]."""

    @property
    def title(self) -> str:
        return "attention pool, one query"

    def examples(self, module: Any, noise: Noise) -> list[tuple[Tensor, ...]]:
        positions, channels = module.positional_embedding.shape
        return [(noise(2, channels, positions - 1, 1),)]

    def fits(self, inputs: Sequence[Any]) -> bool:
        return isinstance(inputs[0], Tensor) and inputs[0].ndim == 4

    def serve(self, module: Any, inputs: Sequence[Any]) -> Tensor:
        heads = module.num_heads
        pixels = inputs[0].flatten(2).transpose(1, 2)
        tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1)
        tokens = tokens + module.positional_embedding.to(tokens.dtype)
        query, key, value = (
            torch.unflatten(F.linear(each, layer.weight, layer.bias), 2, (heads, -1)).transpose(1, 2)
            for layer, each in (
                (module.q_proj, tokens[:, :1]),
                (module.k_proj, tokens),
                (module.v_proj, tokens),
            )
        )
        attended = F.scaled_dot_product_attention(query, key, value).flatten(1)  # [B, C]
        return F.linear(attended, module.c_proj.weight, module.c_proj.bias)


def propose_clip_attention(module: Any) -> list[Plan]:
    """Plans for a module with a method ``attention`` around its ``attn``."""
    attn, mask = getattr(module, "attn", None), getattr(module, "attn_mask", None)
    if not isinstance(attn, nn.MultiheadAttention) or not hasattr(module, "attn_mask"):
        return []
    plain = type(attn).forward is nn.MultiheadAttention.forward and attn.in_proj_weight is not None
    if not plain or attn.bias_k is not None or attn.add_zero_attn or attn.dropout or attn.batch_first:
        return []
    if not callable(getattr(type(module), "attention", None)) or not isinstance(mask, Tensor | None):
        return []
    return [ClipAttentionPlan(method="attention", inner_types=types_of([attn]))]


def propose_clip_pool(module: Any) -> list[Plan]:
    """Plans for a module with four projections, positions and a number of heads."""
    names = ("q_proj", "k_proj", "v_proj", "c_proj")
    positions = getattr(module, "positional_embedding", None)
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return []
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return []
    return [ClipPoolPlan()] if isinstance(getattr(module, "num_heads", None), int) else []
