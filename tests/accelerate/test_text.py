"""Foreign transformers: GLIDE's text blocks, CLIP's blocks and its attention pool."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import glide_fast
from glide_fast.accelerate import report
from glide_fast.models.transformer import TransformerBlock
from tests.accelerate.compare import assert_same_training, kinds, noise, plain_and_served, randomised
from tests.accelerate.foreign_text import (
    AttentionPool2d,
    QuickGELU,
    ResidualAttentionBlock,
    TextBlock,
    causal,
)

WIDTH, HEADS = 32, 2


@pytest.mark.parametrize("masked", [False, True])
def test_clip_blocks(masked: bool) -> None:
    block = ResidualAttentionBlock(WIDTH, HEADS, causal(7) if masked else None)
    randomised(block)
    assert_same_training(block, (noise(7, 2, WIDTH),))
    glide_fast.accelerate(block)
    assert kinds(block) == {"ResidualAttentionBlock": 1, "Sequential": 1}
    assert {entry.note for entry in report(block).left} == {"PyTorch's own computes it"}


def test_a_mask_that_is_exchanged_later_is_seen() -> None:
    block = ResidualAttentionBlock(WIDTH, HEADS, causal(7))
    randomised(block)
    plain, served = plain_and_served(block)
    for mask in (None, causal(7).T.contiguous()):
        plain.attn_mask = served.attn_mask = mask
        x = noise(7, 2, WIDTH)
        torch.testing.assert_close(served(x), plain(x), rtol=0, atol=2e-5)


def test_shorter_texts_see_the_end_of_the_mask() -> None:
    class SlicingBlock(ResidualAttentionBlock):
        def attention(self, x: torch.Tensor) -> torch.Tensor:
            mask = self.attn_mask[-len(x) :, -len(x) :]
            return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    plain, served = plain_and_served(randomised(SlicingBlock(WIDTH, HEADS, causal(7))))
    assert kinds(served) == {"SlicingBlock": 1, "Sequential": 1}
    torch.testing.assert_close(served(noise(4, 2, WIDTH)), plain(noise(4, 2, WIDTH)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clip_blocks_with_half_precision_weights(dtype: torch.dtype) -> None:
    block = ResidualAttentionBlock(WIDTH, HEADS, causal(7))
    randomised(block)
    x = noise(7, 2, WIDTH)
    exact = block(x)
    for part in block.modules():
        if isinstance(part, nn.Linear | nn.MultiheadAttention):
            part.to(dtype)
    plain, served = plain_and_served(block)
    x = x.to(dtype)
    assert served(x).dtype == dtype
    assert (served(x) - exact).abs().mean() <= 1.5 * (plain(x) - exact).abs().mean()


def test_text_blocks() -> None:
    block = TextBlock(WIDTH, HEADS)
    randomised(block)
    assert_same_training(block, (noise(2, 5, WIDTH),))
    glide_fast.accelerate(block)
    assert kinds(block) == {"QKVMultiheadAttention": 1, "MLP": 1}
    ours = TransformerBlock(WIDTH, HEADS)
    ours.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(noise(2, 5, WIDTH)), ours(noise(2, 5, WIDTH)), rtol=1e-5, atol=1e-5)


def test_attention_pool() -> None:
    pool = AttentionPool2d(3, WIDTH, HEADS, 12)
    randomised(pool)
    assert_same_training(pool, (noise(2, WIDTH, 3, 3),))
    glide_fast.accelerate(pool)
    assert kinds(pool) == {"AttentionPool2d": 1}
    assert not report(pool).left


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU(approximate="tanh"), QuickGELU(), nn.ReLU()], ids=str
)
def test_perceptrons_are_known_by_what_they_compute(activation: nn.Module) -> None:
    exact = isinstance(activation, QuickGELU) or getattr(activation, "approximate", "") == "none"
    perceptron = nn.Sequential(nn.Linear(16, 64), activation, nn.Linear(64, 16))
    randomised(perceptron)
    model = nn.Sequential(perceptron, nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()))
    assert_same_training(model, (noise(40, 16),))
    glide_fast.accelerate(model)
    assert any("two linear layers" in entry.note for entry in report(model).served) == exact


def test_perceptrons_in_mixed_precision() -> None:
    perceptron = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    plain, served = plain_and_served(randomised(perceptron))
    x = noise(40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert served(x).dtype == torch.bfloat16
        torch.testing.assert_close(served(x), plain(x))


def test_the_weights_of_foreign_transformers_are_packed() -> None:
    _, served = plain_and_served(randomised(ResidualAttentionBlock(WIDTH, HEADS, causal(40))))
    x = noise(40, 2, WIDTH)
    with torch.no_grad():
        before = served(x)
        assert glide_fast.ops.packed.kept_bytes() > 0
        for parameter in served.parameters():
            parameter.mul_(1.5)
        after = served(x)
        glide_fast.restore(served)
        assert float((after - before).abs().max()) > 0.1
        torch.testing.assert_close(served(x), after, rtol=1e-4, atol=1e-4)
