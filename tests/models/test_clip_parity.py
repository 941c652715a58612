"""OpenAI CLIP against the original: names, features, logits, gradients, and half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glide_fast.models.clip import CLIP, CLIPConfig, VisionTransformerConfig
from glide_fast.models.resnet import ResNetConfig
from tests.golden import assert_close, data, entry, fill, normal, state_dict_shapes

FIXTURES = ("clip_vit", "clip_rn")


def config_of(name: str) -> CLIPConfig:
    """Our config for the fixture's constructor arguments."""
    kwargs = entry(name)["kwargs"]
    layers, width = kwargs["vision_layers"], kwargs["vision_width"]
    vision = (
        ResNetConfig(width=width, layers=tuple(layers))
        if isinstance(layers, list)
        else VisionTransformerConfig(width=width, layers=layers, patch_size=kwargs["vision_patch_size"])
    )
    return CLIPConfig(
        embedding=kwargs["embed_dim"],
        image_size=kwargs["image_resolution"],
        vision=vision,
        context=kwargs["context_length"],
        vocabulary=kwargs["vocab_size"],
        width=kwargs["transformer_width"],
        heads=kwargs["transformer_heads"],
        layers=kwargs["transformer_layers"],
    )


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[CLIP, torch.Tensor, torch.Tensor]:
    """The filled model, its pictures and its tokens."""
    seed, config = entry(name)["weights_seed"], config_of(name)
    model = CLIP(config, compute_dtype=dtype)
    fill(model, seed)
    image = normal("image", (2, 3, config.image_size, config.image_size), seed)
    return model.eval(), image, torch.from_numpy(data(name)["in.text"]).long()


@pytest.mark.parametrize("name", FIXTURES)
def test_names_and_shapes_are_upstreams(name: str) -> None:
    model = CLIP(config_of(name))
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == state_dict_shapes(name)


@pytest.mark.parametrize("name", FIXTURES)
def test_features_logits_and_gradients(name: str) -> None:
    model, image, text = build(name)
    seed = entry(name)["weights_seed"]
    image.requires_grad_()
    outputs = {"image_features": model.encode_image(image), "text_features": model.encode_text(text)}
    outputs["logits_per_image"], logits_per_text = model(image, text)
    for key, value in outputs.items():
        assert_close(value, name, key)
    assert_close(logits_per_text, name, "logits_per_text")
    loss = sum(
        (value * normal(f"projection.{key}", value.shape, seed)).sum() for key, value in outputs.items()
    )
    loss.backward()
    assert_close(image.grad, name, "grad_image")
    norms = [
        0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        for parameter in model.parameters()
    ]
    assert_close(np.array(norms), name, "param_grad_norms")


@pytest.mark.parametrize("name", FIXTURES)
def test_half_precision_is_near_the_originals(name: str) -> None:
    model, image, text = build(name, torch.float16)
    with torch.inference_mode():
        assert_close(model.encode_image(image).float(), name, "fp16.image_features")
        assert_close(model.encode_text(text).float(), name, "fp16.text_features")
