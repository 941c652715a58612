"""GLIDE's noise-aware CLIP through the original's constructors: embeddings, gradients, guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from glide_fast.compat.glide_text2im.clip.encoders import ImageEncoder, TextEncoder
from glide_fast.compat.glide_text2im.clip.model_creation import (
    CLIPModel,
    create_clip_model,
    default_config_path,
)
from tests.golden import assert_close, data, entry, fill, input_of, normal, state_dict_shapes

NAME = "glide_clip"


def build(folder: Path) -> CLIPModel:
    """The fixture's model with its weights, from a YAML file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(entry(NAME)["config"]), encoding="utf-8")
    model = create_clip_model(config_path=str(path), device=torch.device("cpu"))
    for tower, seed in entry(NAME)["weights_seed"].items():
        fill(getattr(model, tower), seed)
    return model


def norms(model: nn.Module) -> list[float]:
    return [0.0 if p.grad is None else p.grad.double().norm().item() for p in model.parameters()]


def test_pictures_texts_and_their_gradients(tmp_path: Path) -> None:
    model = build(tmp_path)
    for tower in ("image_encoder", "text_encoder"):
        state = getattr(model, tower).state_dict()
        shapes = [(key, list(value.shape)) for key, value in state.items()]
        assert shapes == state_dict_shapes(f"{NAME}.{tower}")
    assert model.config == entry(NAME)["config"]
    assert_close(model.logit_scale, NAME, "logit_scale")
    assert_close(model.logit_scale.exp(), NAME, "exp_logit_scale")

    x, t = input_of(NAME, "x").requires_grad_(), input_of(NAME, "t").long()
    assert_close(model.image_encoder((x + 1) * 127.5, t), NAME, "image_raw")
    assert_close(model.image_encoder((x + 1) * 127.5, t, return_probe_features=True), NAME, "image_probe")
    pictures = model.image_embeddings(x, t)
    assert_close(pictures, NAME, "image_embeddings")
    (pictures * normal("projection.image", pictures.shape, 121)).sum().backward()
    assert_close(x.grad, NAME, "grad_x")  # type: ignore[arg-type]
    assert_close(norms(model.image_encoder), NAME, "image_param_grad_norms")

    tokens, lengths = model.encode_prompts(entry(NAME)["prompts"])
    assert torch.equal(tokens, input_of(NAME, "tokens").long())
    assert torch.equal(lengths, input_of(NAME, "lens").long())
    assert_close(model.text_encoder(tokens, lengths), NAME, "text_raw")
    assert_close(model.text_encoder(tokens, lengths, return_probe_features=True), NAME, "text_probe")
    texts = model.text_embeddings(entry(NAME)["prompts"])
    assert_close(texts, NAME, "text_embeddings")
    (texts * normal("projection.text", texts.shape, 121)).sum().backward()
    assert_close(norms(model.text_encoder), NAME, "text_param_grad_norms")


def test_guidance_and_settable_towers(tmp_path: Path) -> None:
    model = build(tmp_path)
    x, t = input_of(NAME, "x"), input_of(NAME, "t").long()
    guide = model.cond_fn(entry(NAME)["prompts"], entry(NAME)["grad_scale"])
    with torch.no_grad():
        assert_close(guide(x, t), NAME, "cond_grad")
        assert_close(guide(x, t, grad_scale=-2.0, tokens=None, mask=None)[:1], NAME, "cond_grad_override")

    class Levels(nn.Module):
        def forward(self, image: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :4] + timesteps[:, None]

    model.image_encoder = Levels()
    expected = nn.functional.normalize(((x + 1) * 127.5).flatten(1)[:, :4] + t[:, None])
    torch.testing.assert_close(model.image_embeddings(x, t), expected)


def test_a_text_encoder_built_directly() -> None:
    name = "glide_clip_text_direct"
    model = fill(TextEncoder(**entry(name)["kwargs"]), entry(name)["weights_seed"])
    output = model(input_of(name, "tokens").long(), input_of(name, "lens").long())
    assert_close(output, name, "out")
    (output * normal("projection", output.shape, 125)).sum().backward()
    assert_close(norms(model), name, "param_grad_norms")


def test_a_picture_encoder_without_timesteps() -> None:
    model = ImageEncoder(8, 4, 6, 2, 1, n_head_state=4, device="cpu")
    assert next(iter(model.state_dict())) == "blocks.input.pred_state"
    levels = normal("x", (2, 3, 8, 8), 0).mul(50).add(127)
    first, second = model(levels), model(levels.flip(0))
    torch.testing.assert_close(first, second.flip(0))
    with pytest.raises(ValueError, match=r"knows no timesteps"):
        model(levels, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"give timesteps"):
        ImageEncoder(8, 4, 6, 2, 1, n_head_state=4, n_timestep=10, device="cpu")(levels)


def test_the_published_model_builds_without_memory() -> None:
    described = entry("checkpoints")["models"]
    with torch.device("meta"):
        model = create_clip_model()
    assert model.device == create_clip_model(device="meta").device == torch.device("meta")
    for tower, name in (("image_encoder", "glide.clip/image-enc"), ("text_encoder", "glide.clip/text-enc")):
        state = getattr(model, tower).state_dict()
        assert model.config == described[name]["kwargs"]
        assert len(state) == described[name]["entries"]
        assert sum(value.numel() for value in state.values()) == described[name]["elements"]
        assert {value.device.type for value in state.values()} == {"meta"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_embd: 3", "has no 'n_vocab'"),
        ("[1, 2", "is not valid YAML"),
        ("word", "does not describe GLIDE's CLIP"),
    ],
)
def test_files_that_describe_no_model_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"wrong.yaml.*{message}"):
        create_clip_model(config_path=str(path))
    assert Path(default_config_path()).is_file()
    assert data(NAME)["logit_scale"] > 4
