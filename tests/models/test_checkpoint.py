"""Model files: whole, self-describing, and refused with the reason when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glide_fast.models import ModelConfig, UNet, load_model, save_model
from glide_fast.models import checkpoint as checkpoint_module
from glide_fast.models.checkpoint import METADATA_KEY, check_fits
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


def test_a_file_without_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny().state_dict(), path)
    with pytest.raises(
        ValueError, match="has no 'glide_fast' entry in its metadata, so its config is unknown"
    ):
        load_model(path)


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
