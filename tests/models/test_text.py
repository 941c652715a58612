"""The text side of a model: embeddings, padding, the transformer and its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glide_fast.models.layer_norm import LayerNorm
from glide_fast.models.transformer import Transformer
from tests.models.tiny import TEXT, noise, prompt, tiny


@torch.inference_mode()
def test_padding_positions_use_the_padding_embedding_whatever_their_token() -> None:
    model = tiny()
    tokens, mask = prompt()["tokens"], prompt()["mask"]
    other = torch.where(mask, tokens, (tokens + 1) % 11)
    first, second = model.text(tokens, mask), model.text(other, mask)
    assert torch.equal(first.sequence, second.sequence)
    assert torch.equal(first.pooled, second.pooled)
    model.padding_embedding[4].add_(1.0)
    assert not torch.allclose(model.text(tokens, mask).sequence, first.sequence)


@torch.inference_mode()
def test_the_padding_embedding_is_not_read_where_a_token_is() -> None:
    model = tiny()
    tokens, mask = prompt()["tokens"], torch.ones(2, 5, dtype=torch.bool)
    before = model.text(tokens, mask)
    model.padding_embedding.add_(1.0)
    assert torch.equal(model.text(tokens, mask).sequence, before.sequence)


@torch.inference_mode()
def test_without_a_padding_embedding_the_mask_is_not_needed() -> None:
    model = tiny(text=replace(TEXT, padding_embedding=False))
    assert "padding_embedding" not in model.state_dict()
    given = prompt()
    assert torch.equal(model.text(given["tokens"]).sequence, model.text(**given).sequence)


@torch.inference_mode()
def test_the_pooled_text_is_the_projected_last_position() -> None:
    model = tiny()
    text = model.text(**prompt())
    assert text.sequence.shape == (2, 5, 32)
    torch.testing.assert_close(text.pooled, model.transformer_proj(text.sequence[:, 4]))


def test_without_a_final_norm_the_sequence_is_the_transformers() -> None:
    names = tiny(text=replace(TEXT, final_norm=False)).state_dict().keys()
    assert not any(name.startswith("final_ln") for name in names)
    assert any(name.startswith("final_ln") for name in tiny().state_dict())


@torch.inference_mode()
def test_tokens_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens have length 6, the model's context is 5; pad or cut to it"):
        tiny().text(noise(2, 6).long())


def test_a_width_that_the_heads_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="text width 30 is not divisible by 4 heads; use a divisor of 30"):
        Transformer(30, 1, 4)


def test_a_layer_norm_computes_in_float32_and_answers_in_its_inputs_dtype() -> None:
    norm = LayerNorm(64)
    x = (noise(3, 64) + 30).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.layer_norm(x.float(), (64,)), rtol=1e-2, atol=1e-2)
    assert torch.equal(out, torch.layer_norm(x.float(), (64,)).bfloat16())


@pytest.mark.parametrize("layers", [1, 8])
def test_the_start_is_the_originals(layers: int) -> None:
    torch.manual_seed(0)
    transformer = Transformer(256, layers, 4)
    residual = (2 * layers) ** -0.5
    expected = {
        "attn.c_qkv": 256**-0.5,
        "attn.c_proj": residual * 256**-0.5,
        "mlp.c_fc": 256**-0.5,
        "mlp.c_proj": residual * 1024**-0.5,
    }
    for name, deviation in expected.items():
        layer = transformer.resblocks[0].get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
        assert not layer.bias.any()
