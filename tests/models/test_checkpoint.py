"""Model files: whole, self-describing, and refused with the reason when they do not fit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from glide_fast.config import to_dict
from glide_fast.download import cached_path
from glide_fast.models import (
    CLIP,
    CLIPConfig,
    EncoderConfig,
    EncoderUNet,
    ModelConfig,
    NoisyCLIP,
    NoisyCLIPConfig,
    UNet,
    convert,
    load_model,
    load_network,
    save_model,
)
from glide_fast.models import checkpoint as checkpoint_module
from glide_fast.models.checkpoint import KIND_KEY, METADATA_KEY, check_fits
from glide_fast.models.clip import VisionTransformerConfig
from glide_fast.models.configs import Config, build
from glide_fast.models.presets import PUBLISHED, Published, WeightFile
from glide_fast.models.resnet import ResNetConfig
from tests.golden import fill
from tests.models.tiny import noise, prompt, tiny

T = torch.tensor([3, 700])
CONFIG = ModelConfig(unet=tiny().config, schedule="linear", steps=100)


def save(path: Path, dtype: torch.dtype = torch.float16) -> UNet:
    model = tiny()
    save_model(path, CONFIG, model.state_dict(), dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_and_config_survive_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save(tmp_path / "model.safetensors", dtype)
    loaded, config = load_model(tmp_path / "model.safetensors")
    assert config == CONFIG
    assert loaded.config == CONFIG.unet
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float())


def test_the_loaded_model_gives_the_same_answer_and_is_ready_for_inference(tmp_path: Path) -> None:
    model = save(tmp_path / "model.safetensors", torch.float32)
    loaded, _ = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.inference_mode():
        expected = model(noise(2, 3, 8, 8), T, **prompt())
        assert torch.equal(loaded(noise(2, 3, 8, 8), T, **prompt()), expected)


def test_the_dtype_of_the_weights_can_be_chosen(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    loaded, _ = load_model(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


def test_channels_last_weights_are_saved_like_any_other(tmp_path: Path) -> None:
    model = tiny()
    state = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in model.state_dict().items()
    }
    save_model(tmp_path / "a.safetensors", CONFIG, model.state_dict())
    save_model(tmp_path / "b.safetensors", CONFIG, state)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    before = path.read_bytes()

    def fail(_tensors: object, name: Path, **_options: object) -> None:
        Path(name).write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save(path, torch.float32)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model file .*none\.safetensors"):
        load_model(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", bytes(range(256)) * 9])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(path)


def test_the_config_of_a_file_without_one_is_inferred_and_what_was_assumed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny().state_dict(), path)
    with pytest.warns(
        UserWarning, match=r"model\.safetensors: shapes do not tell everything; assumed image_"
    ):
        loaded = load_model(path)
    assert loaded.config.unet.channel_mult == CONFIG.unet.channel_mult
    assert load_model(path, config=CONFIG).config == CONFIG


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"the metadata of .*model\.safetensors is not valid JSON"),
        ("[]", r"the metadata of .*model\.safetensors does not describe a ModelConfig"),
        ('{"unet": {"shape": 1}}', r"unet\.shape: no such field"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny().state_dict(), path, metadata={METADATA_KEY: text})
    with pytest.raises(ValueError, match=reason):
        load_model(path)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, CONFIG, tiny(low_res=True).state_dict())
    problem = r"input_blocks\.0\.0\.weight is \(32, 6, 3, 3\), the model has \(32, 3, 3, 3\)"
    with pytest.raises(ValueError, match=rf"model\.safetensors does not fit the model: {problem}"):
        load_model(path)


def test_the_metadata_can_be_read_by_any_safetensors_reader(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert '"schedule": "linear"' in file.metadata()[METADATA_KEY]


def test_the_first_missing_entry_is_named_with_its_shape() -> None:
    state = tiny().state_dict()
    del state["time_embed.2.bias"], state["out.2.bias"]
    with pytest.raises(
        ValueError, match=r"a\.pt does not fit the model: time_embed\.2\.bias \(128,\) is missing"
    ):
        check_fits(tiny(), state, "a.pt")


def test_the_first_surplus_entry_is_named() -> None:
    state = tiny().state_dict() | {"extra": torch.zeros(1), "more": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"a\.pt does not fit the model: extra is not one of its entries"):
        check_fits(tiny(), state, "a.pt")


def test_a_state_that_fits_is_accepted() -> None:
    check_fits(tiny(), tiny().state_dict(), "a.pt")


CLASSIFIER = EncoderConfig(trunk=replace(tiny().config, text=None, out_channels=5, image_size=16))
CLIP_VIT = CLIPConfig(
    embedding=8,
    image_size=8,
    vision=VisionTransformerConfig(width=64, layers=1, patch_size=4),
    width=64,
    layers=1,
    heads=1,
    context=5,
    vocabulary=11,
)
CLIP_RESNET = replace(CLIP_VIT, image_size=32, vision=ResNetConfig(width=8, layers=(1, 1, 1, 1)))
NOISY_CLIP = NoisyCLIPConfig(
    embedding=8,
    image_size=8,
    patch_size=4,
    image_heads=3,
    image_head_channels=64,
    image_layers=1,
    text_heads=3,
    text_head_channels=64,
    text_layers=1,
    context=5,
    vocabulary=11,
)
KINDS: list[tuple[Config, Any]] = [
    (CONFIG, UNet),
    (CLASSIFIER, EncoderUNet),
    (CLIP_VIT, CLIP),
    (CLIP_RESNET, CLIP),
    (NOISY_CLIP, NoisyCLIP),
]


def network(config: Config) -> nn.Module:
    return fill(build(config), 5)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(("config", "kind"), KINDS)
def test_every_kind_of_network_survives_the_file(tmp_path: Path, config: Config, kind: Any) -> None:
    model = network(config)
    save_model(tmp_path / "a.safetensors", config, model.state_dict(), torch.float32)
    loaded = load_network(tmp_path / "a.safetensors", kind)
    assert type(loaded) is kind
    assert same(loaded.state_dict(), model.state_dict())
    assert checkpoint_module.read_weights(tmp_path / "a.safetensors").config == config


@pytest.mark.parametrize(("config", "kind"), KINDS)
@pytest.mark.parametrize("half", [False, True])
def test_a_bare_pt_is_loaded_and_converted_with_the_same_values(
    tmp_path: Path, config: Config, kind: Any, half: bool
) -> None:
    model = network(config)
    state = {
        name: tensor.half() if half and tensor.ndim > 1 else tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pt"
    )
    loaded = load_network(tmp_path / "a.pt", kind, config=config)
    as_floats = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    assert same(loaded.state_dict(), as_floats)
    assert convert(tmp_path / "a.pt", tmp_path / "b.safetensors", config=config) == config
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
        assert file.metadata().get(KIND_KEY, "diffusion") == checkpoint_module.kind_of(config)
    again = load_network(tmp_path / "b.safetensors", kind)
    assert same(again.state_dict(), as_floats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_converted_values_are_those_of_the_input_at_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = network(CLIP_RESNET)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", dtype=dtype)
    expected = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    assert expected["visual.bn1.num_batches_tracked"].dtype == torch.int64
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, expected)  # noqa: SIM118


def test_a_weight_that_overflows_the_dtype_is_named(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["out.2.bias"][1] = 70000
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"out\.2\.bias reaches 70000, too large for torch\.float16; use"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", config=CONFIG, dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_clip_is_loaded_without_its_extra_numbers(tmp_path: Path) -> None:
    model = network(CLIP_VIT).half()
    holder = hold(model.state_dict() | {"input_resolution": torch.tensor(8), "vocab_size": torch.tensor(11)})
    torch.jit.save(torch.jit.script(holder), str(tmp_path / "clip.pt"))  # type: ignore[no-untyped-call]
    loaded = load_network(str(tmp_path / "clip.pt"), CLIP)
    assert loaded.config == CLIP_VIT
    assert same(loaded.state_dict(), network(CLIP_VIT).half().float().state_dict())


class Holder(nn.Module):
    """A module that only has parameters and parts."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def hold(state: dict[str, Tensor]) -> Holder:
    """Modules that have this state dict."""
    root = Holder()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module.get_submodule(part)
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    return root


def test_the_two_files_of_a_noise_aware_clip_are_loaded_together(tmp_path: Path) -> None:
    model = network(NOISY_CLIP)
    paths = []
    for tower in ("text_encoder", "image_encoder"):
        paths.append(tmp_path / f"{tower}.pt")
        torch.save(model.get_submodule(tower).state_dict(), paths[-1])
    with pytest.warns(
        UserWarning, match="assumed image_head_channels 64, text_head_channels 64, logit_scale"
    ):
        loaded = load_network(paths, NoisyCLIP)
    assert loaded.config == NOISY_CLIP
    assert same(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"text_encoder\.pt: .* one tower of a noise-aware CLIP; give both"):
        load_network(paths[0], NoisyCLIP)


def test_another_kind_of_network_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "a.safetensors", CLIP_VIT, network(CLIP_VIT).state_dict())
    with pytest.raises(ValueError, match=r"holds a CLIP, not a UNet; load_network\(…, CLIP\) reads it"):
        load_model(tmp_path / "a.safetensors")


def test_a_kind_of_a_later_version_is_named(tmp_path: Path) -> None:
    metadata = {METADATA_KEY: "{}", KIND_KEY: "autoencoder"}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(
        ValueError, match="holds a 'autoencoder'; this version knows diffusion, classifier, clip"
    ):
        load_model(tmp_path / "a.safetensors")


def test_a_config_of_an_older_version_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = to_dict(CONFIG)
    del values["variance"], values["rescale_timesteps"]
    save_file(tiny().state_dict(), path, metadata={METADATA_KEY: json.dumps(values)})
    assert load_model(path).config == CONFIG


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt", config=CONFIG).network
    (tmp_path / "a.pt").write_bytes(bytes((tmp_path / "a.pt").stat().st_size))
    assert same(loaded.state_dict(), tiny().state_dict())


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UNet:
    """A preset "tiny" whose file is in the cache."""
    monkeypatch.setenv("GLIDE_FAST_CACHE", str(tmp_path / "cache"))
    url = "https://host.invalid/models/tiny.pt"
    path = cached_path(url)
    path.parent.mkdir(parents=True)
    torch.save(tiny().state_dict(), path)
    row = Published(CONFIG, (WeightFile(url, hashlib.sha256(path.read_bytes()).hexdigest()),))
    monkeypatch.setitem(PUBLISHED, "tiny", row)
    monkeypatch.chdir(tmp_path)
    return tiny()


def test_a_preset_is_loaded_by_its_name_from_the_cache(published: UNet) -> None:
    loaded = load_model("tiny")
    assert loaded.config == CONFIG
    assert same(loaded.network.state_dict(), published.state_dict())


def test_a_file_goes_before_a_preset_of_its_name(published: UNet, tmp_path: Path) -> None:
    save_model(tmp_path / "tiny", replace(CONFIG, steps=50), published.state_dict())
    assert load_model("tiny").config.steps == 50


@pytest.mark.usefixtures("published")
def test_names_that_cannot_be_loaded_are_explained() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'tinny'; `glide-fast models` lists .*tiny"):
        load_model("tinny")
    with pytest.raises(
        ValueError, match=r"the weights of glide-3\.5b-base were never published; give a file"
    ):
        load_model("glide-3.5b-base")
    with pytest.raises(FileNotFoundError, match=r"no model file tiny\.pt"):
        load_model("tiny.pt")
