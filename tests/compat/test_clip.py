"""OpenAI's CLIP under its own names: construction, half precision, files, pictures, addresses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glide_fast.compat import clip
from glide_fast.compat.clip import clip as loading
from glide_fast.compat.clip.clip import Preprocess
from glide_fast.compat.clip.model import CLIP, build_model
from tests.golden import assert_close, data, entry, fill, normal, state_dict_shapes

FIXTURES = ("clip_vit", "clip_rn")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build(name: str) -> tuple[CLIP, torch.Tensor, torch.Tensor]:
    """The filled model, built with positional arguments in the original's order, its pictures, its tokens."""
    kwargs, seed = entry(name)["kwargs"], entry(name)["weights_seed"]
    model = CLIP(*kwargs.values())
    fill(model, seed)
    size = kwargs["image_resolution"]
    tokens = clip.tokenize(entry(name)["prompts"], kwargs["context_length"], truncate=True)
    assert np.array_equal(tokens, data(name)["in.text"])
    return model.eval(), normal("image", (2, 3, size, size), seed), tokens


@pytest.mark.parametrize("name", FIXTURES)
def test_features_logits_gradients_and_names(name: str) -> None:
    model, image, tokens = build(name)
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == state_dict_shapes(name)
    image.requires_grad_()
    outputs = {"image_features": model.encode_image(image), "text_features": model.encode_text(tokens)}
    outputs["logits_per_image"], logits_per_text = model(image, tokens)
    for key, value in outputs.items():
        assert_close(value, name, key)
    assert_close(logits_per_text, name, "logits_per_text")
    seed = entry(name)["weights_seed"]
    sum(
        (value * normal(f"projection.{key}", value.shape, seed)).sum() for key, value in outputs.items()
    ).backward()  # type: ignore[union-attr]
    assert_close(image.grad, name, "grad_image")  # type: ignore[arg-type]
    norms = [0.0 if p.grad is None else p.grad.double().norm().item() for p in model.parameters()]
    assert_close(norms, name, "param_grad_norms")


def test_callers_may_run_the_transformers_themselves() -> None:
    model, image, tokens = build("clip_vit")
    ends = torch.arange(len(tokens)), tokens.argmax(dim=-1)
    with torch.no_grad():
        x = model.token_embedding(tokens).type(model.dtype) + model.positional_embedding
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        texts = model.ln_final(x)[ends] @ model.text_projection
        assert_close(texts, "clip_vit", "text_features")
        visual = model.visual
        x = visual.conv1(image).flatten(2).permute(0, 2, 1)
        token = visual.class_embedding + torch.zeros(len(x), 1, x.shape[-1])
        x = visual.ln_pre(torch.cat([token, x], dim=1) + visual.positional_embedding).permute(1, 0, 2)
        for block in visual.transformer.resblocks:
            x = block(x)
        assert_close(visual.ln_post(x[0]) @ visual.proj, "clip_vit", "image_features")


@pytest.mark.parametrize("name", FIXTURES)
def test_build_model_halves_the_originals_weights_and_infers_its_settings(name: str) -> None:
    model, image, tokens = build(name)
    state = model.state_dict() | {"input_resolution": torch.tensor(7), "vocab_size": torch.tensor(9)}
    half = build_model(state)
    assert not half.training
    assert half.dtype == torch.float16
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in half.state_dict().items()}
    assert dtypes == {
        key: value.removeprefix("torch.") for key, value in json.loads(str(data(name)["fp16.dtypes"])).items()
    }
    assert json.loads(str(data(name)["fp16.inferred"])) == {
        "context_length": half.context_length,
        "vocab_size": half.vocab_size,
        "transformer_heads": half.config.heads,
        "input_resolution": half.visual.input_resolution,
        "output_dim": half.visual.output_dim,
    }
    with torch.inference_mode():
        assert_close(half.encode_image(image).float(), name, "fp16.image_features")
        assert_close(half.encode_text(tokens).float(), name, "fp16.text_features")
        assert half.float().encode_image(image).dtype == torch.float32


@pytest.mark.parametrize("name", FIXTURES)
def test_load_reads_plain_and_scripted_files(name: str, tmp_path: Path) -> None:
    model, image, tokens = build(name)
    plain, scripted = tmp_path / "plain.pt", tmp_path / "scripted.pt"
    torch.save(model.state_dict(), plain)
    holder = torch.nn.Module()
    for key, value in model.state_dict().items():
        _put(holder, key.split("."), value)
    torch.jit.script(holder).save(str(scripted))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        expected = model(image, tokens)[0]
        for path in (plain, scripted):
            loaded, preprocess = clip.load(str(path), device="cpu")
            assert loaded.dtype == torch.float32
            assert not loaded.training
            assert preprocess.size == entry(name)["kwargs"]["image_resolution"]
            # the published weights are float16, and loading rounds to it
            torch.testing.assert_close(loaded(image, tokens)[0], expected, rtol=0.02, atol=0.02)
    with pytest.warns(UserWarning, match=r"jit=True has no effect"):
        clip.load(str(plain), device="cpu", jit=True)


def _put(module: torch.nn.Module, path: list[str], value: torch.Tensor) -> None:
    """Put a tensor where its dotted name says."""
    for part in path[:-1]:
        if part not in dict(module.named_children()):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(path[-1], value)


def test_published_models_have_their_digests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert clip.available_models()[:2] == ["RN50", "RN101"]
    assert len(clip.available_models()) == 9
    model, _, _ = build("clip_vit")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    asked = []

    def fetch(url: str, *, sha256: str, folder: Path) -> Path:
        asked.append((url, sha256, folder))
        return tmp_path / "model.pt"

    monkeypatch.setattr(loading, "fetch", fetch)
    for name in clip.available_models():
        clip.load(name, "cpu", download_root=str(tmp_path))
    for (url, digest, folder), name in zip(asked, clip.available_models(), strict=True):
        assert url.endswith(f"{digest}/{name.replace('/', '-').replace('@', '-')}.pt")
        assert len(digest) == 64
        assert folder == tmp_path


def test_files_and_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ViT-Z/1 not found; available models = \['RN50'"):
        clip.load("ViT-Z/1")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not one of CLIP's: it has no 'visual.conv1.weight'"):
        clip.load(str(tmp_path / "other.pt"), device="cpu")
    with pytest.raises(ValueError, match=r"give vision_patch_size"):
        CLIP(32, 32, 2, 64, None, 77, 100, 64, 1, 1)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (61, 37), (16, 16)])
def test_preprocessing_of_levels(shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, size = Image.fromarray(levels), 32
    width, height = image.size
    scale = size / min(width, height)
    wide, high = (size, int(height * scale + 1e-9)) if width <= height else (int(width * scale + 1e-9), size)
    resized = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    top, left = round((high - size) / 2.0), round((wide - size) / 2.0)
    cut = resized[top : top + size, left : left + size].astype(np.float32) / 255
    expected = (cut - np.float32(MEAN)) / np.float32(DEVIATION)
    np.testing.assert_allclose(Preprocess(size)(image), expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)


def test_preprocessing_of_other_modes() -> None:
    grey = Image.new("L", (40, 32), 128)
    rgba = Image.new("RGBA", (32, 40), (255, 0, 0, 10))
    for image, levels in ((grey, (128, 128, 128)), (rgba, (255, 0, 0))):
        tensor = Preprocess(32)(image)
        assert tensor.dtype == torch.float32
        expected = (torch.tensor(levels) / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        torch.testing.assert_close(tensor, expected[:, None, None].expand(3, 32, 32))
