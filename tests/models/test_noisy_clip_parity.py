"""GLIDE's noise-aware CLIP against the original: names, embeddings, gradients, and the guidance gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glide_fast.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig, TextEncoder
from tests.golden import assert_close, data, entry, fill, normal, state_dict_shapes

NAME = "glide_clip"


def glide_clip() -> NoisyCLIP:
    """The fixture's model with its weights."""
    given = entry(NAME)["config"]
    config = NoisyCLIPConfig(
        embedding=given["n_embd"],
        image_size=given["image_size"],
        patch_size=given["patch_size"],
        image_heads=given["n_head_image"],
        image_head_channels=given["n_head_state_image"],
        image_layers=given["n_xf_blocks_image"],
        text_heads=given["n_head_text"],
        text_head_channels=given["n_head_state_text"],
        text_layers=given["n_xf_blocks_text"],
        context=given["max_text_len"],
        vocabulary=given["n_vocab"],
        timesteps=given["n_timesteps"],
        logit_scale=given["logit_scale"],
    )
    model = NoisyCLIP(config)
    seeds = entry(NAME)["weights_seed"]
    fill(model.image_encoder, seeds["image_encoder"])
    fill(model.text_encoder, seeds["text_encoder"])
    return model.eval()


def stored(name: str, key: str) -> Tensor:
    return torch.from_numpy(data(name)[key]).long()


def gradient_norms(model: nn.Module) -> np.ndarray:
    return np.array(
        [
            0.0 if parameter.grad is None else parameter.grad.double().norm().item()
            for parameter in model.parameters()
        ]
    )


@pytest.mark.parametrize("tower", ["image_encoder", "text_encoder"])
def test_names_and_shapes_are_upstreams(tower: str) -> None:
    state = getattr(glide_clip(), tower).state_dict()
    shapes = [(key, list(value.shape)) for key, value in state.items()]
    assert shapes == state_dict_shapes(f"{NAME}.{tower}")


def test_pictures() -> None:
    model = glide_clip()
    x, t = normal("x", (3, 3, 32, 32), 121).requires_grad_(), stored(NAME, "in.t")
    assert_close(model.image_encoder(x, t), NAME, "image_raw")
    embeddings = model.image_embeddings(x, t)
    assert_close(embeddings, NAME, "image_embeddings")
    (embeddings * normal("projection.image", embeddings.shape, 121)).sum().backward()
    assert_close(x.grad, NAME, "grad_x")
    assert_close(gradient_norms(model.image_encoder), NAME, "image_param_grad_norms")


def test_texts() -> None:
    model = glide_clip()
    tokens, lengths = stored(NAME, "in.tokens"), stored(NAME, "in.lens")
    assert_close(model.text_encoder(tokens, lengths), NAME, "text_raw")
    embeddings = model.text_embeddings(tokens, lengths)
    assert_close(embeddings, NAME, "text_embeddings")
    (embeddings * normal("projection.text", embeddings.shape, 121)).sum().backward()
    assert_close(gradient_norms(model.text_encoder), NAME, "text_param_grad_norms")


def test_what_lies_behind_the_end_of_a_text_does_not_matter() -> None:
    model = glide_clip()
    tokens, lengths = stored(NAME, "in.tokens"), stored(NAME, "in.lens")
    changed = tokens.clone()
    changed[0, int(lengths[0]) :] = 7
    torch.testing.assert_close(
        model.text_embeddings(tokens, lengths), model.text_embeddings(changed, lengths), rtol=0, atol=0
    )


def test_the_guidance_gradient_is_the_originals() -> None:
    model = glide_clip()
    x, t = normal("x", (3, 3, 32, 32), 121).requires_grad_(), stored(NAME, "in.t")
    texts = model.text_embeddings(stored(NAME, "in.tokens"), stored(NAME, "in.lens")).detach()
    model.similarity(x, t, texts).sum().backward()
    assert x.grad is not None
    assert_close(x.grad * entry(NAME)["grad_scale"], NAME, "cond_grad")
    assert math.isclose(model.logit_scale, float(data(NAME)["logit_scale"]), rel_tol=1e-6)


def test_a_text_encoder_of_another_shape() -> None:
    name = "glide_clip_text_direct"
    given = entry(name)["kwargs"]
    config = NoisyCLIPConfig(
        embedding=given["n_embd"],
        image_size=8,
        patch_size=4,
        image_heads=1,
        image_head_channels=8,
        image_layers=1,
        text_heads=given["n_head"],
        text_head_channels=given["n_head_state"],
        text_layers=given["n_xf_blocks"],
        context=given["max_text_len"],
        vocabulary=given["n_bpe_vocab"],
    )
    model = TextEncoder(config)
    fill(model, entry(name)["weights_seed"])
    output = model(stored(name, "in.tokens"), stored(name, "in.lens"))
    assert_close(output, name, "out")
    (output * normal("projection", output.shape, 125)).sum().backward()
    assert_close(gradient_norms(model), name, "param_grad_norms")
