"""Attention such as other people have it: GLIDE's for pictures and text, CLIP's ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, D, T] each -> [B, D, T], softmax in float32."""
    scores = torch.einsum("bct,bcs->bts", query * query.shape[1] ** -0.25, key * key.shape[1] ** -0.25)
    return torch.einsum("bts,bcs->bct", scores.float().softmax(dim=-1).to(value.dtype), value)


class QKVAttention(nn.Module):
    """GLIDE's: a head's query, key and value lie together, the text's keys and values come first."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        batch, width, length = qkv.shape
        query, key, value = qkv.reshape(batch * self.n_heads, width // self.n_heads, length).chunk(3, dim=1)
        if encoder_kv is not None:
            flat = encoder_kv.reshape(batch * self.n_heads, -1, encoder_kv.shape[-1])
            text_key, text_value = flat.chunk(2, dim=1)
            key, value = torch.cat([text_key, key], dim=-1), torch.cat([text_value, value], dim=-1)
        return attend(query, key, value).reshape(batch, -1, length)


class LayerNorm(nn.LayerNorm):
    """Computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QKVMultiheadAttention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:  # [B, T, 3C] by head
        split = qkv.view(*qkv.shape[:2], self.heads, -1).chunk(3, dim=-1)
        query, key, value = (each.transpose(1, 2) for each in split)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        return (scores.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)


class MultiheadAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attention = QKVMultiheadAttention(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.attention(self.c_qkv(x)))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """CLIP's block, tokens [T, B, C]."""

    def __init__(self, width: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": QuickGELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = LayerNorm(width)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:
        mask = None if self.attn_mask is None else self.attn_mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf")).triu_(1)


class AttentionPool2d(nn.Module):
    """CLIP's pool: every token asks, the first answer counts."""

    def __init__(self, side: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, out)
        self.num_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None].to(x.dtype)
        pooled, _ = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            training=self.training,
            need_weights=False,
        )
        return pooled[0]
