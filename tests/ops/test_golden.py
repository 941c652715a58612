"""The ops against the original code's numbers (tests/parity/layers.npz)."""

from __future__ import annotations

import pytest
from torch import Tensor

from glide_fast.ops import attention, group_norm
from tests.golden import assert_close, entry, normal, weight

SEED, HEADS = entry("layers")["weights_seed"], entry("layers")["n_heads"]


def per_head(projection: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, N * parts * D, T], interleaved a head -> `parts` views [B, T, N, D]."""
    return projection.transpose(1, 2).unflatten(2, (heads, parts, -1)).unbind(3)


def channels_first(attended: Tensor) -> Tensor:
    """[B, T, N, D] -> [B, N * D, T]."""
    return attended.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("swish", ["0.0", "0.5", "1.0", "1.702"])
def test_group_norm_with_swish(swish: str) -> None:
    x = normal("groupnorm", (2, 64, 5, 4), SEED)
    gain, bias = weight("weight", (64,), SEED), weight("bias", (64,), SEED)
    if swish == "0.0":
        y = group_norm(x, gain, bias)
    else:  # y * sigmoid(s * y) = silu(s * y) / s
        factor = float(swish)
        y = group_norm(x, gain * factor, bias * factor, activation="silu") / factor
    assert_close(y, "layers", f"groupnorm_swish_{swish}")


@pytest.mark.parametrize("key", ["glide_attention", "guided_attention_legacy"])
def test_attention_interleaved_by_head(key: str) -> None:
    qkv = per_head(normal("qkv", (2, 96, 20), SEED), HEADS, 3)
    assert_close(channels_first(attention(*qkv)), "layers", key)


def test_attention_with_the_text_in_front() -> None:
    qkv = per_head(normal("qkv", (2, 96, 20), SEED), HEADS, 3)
    text_key, text_value = per_head(normal("encoder_kv", (2, 64, 7), SEED), HEADS, 2)
    y = attention(*qkv, text_key=text_key, text_value=text_value)
    assert_close(channels_first(y), "layers", "glide_attention_encoder")


@pytest.mark.parametrize(("key", "heads"), [("guided_attention_new", HEADS), ("improved_attention", 1)])
def test_attention_with_all_queries_before_all_keys(key: str, heads: int) -> None:
    qkv = normal("qkv", (2, 96, 20), SEED).transpose(1, 2).unflatten(2, (3, heads, -1)).unbind(2)
    assert_close(channels_first(attention(*qkv)), "layers", key)


def test_attention_of_the_text_encoder() -> None:
    qkv = normal("xf_qkv", (2, 20, 96), SEED).unflatten(2, (HEADS, 3, -1)).unbind(3)
    assert_close(attention(*qkv).flatten(2), "layers", "glide_xf_attention")
