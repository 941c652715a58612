"""Models as safetensors files that carry their own config, so that a file is all one needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glide_fast.config import from_json, to_json
from glide_fast.files import replacing
from glide_fast.models.trunk import UNetConfig
from glide_fast.models.unet import UNet

METADATA_KEY = "glide_fast"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network together with the noise schedule it was trained on, and what it predicts."""

    unet: UNetConfig
    schedule: str = "cosine"
    steps: int = 1000
    prediction: Literal["epsilon", "x_start"] = "epsilon"


class LoadedModel(NamedTuple):
    """A network and what must be known to sample from it."""

    network: UNet
    config: ModelConfig


def save_model(
    path: Path, config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype = torch.float16
) -> None:
    """Write the weights as safetensors of ``dtype`` with the config in the metadata."""
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: to_json(config)})


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Read a model written by :func:`save_model`, in eval mode, with weights of ``dtype``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, has no config, or its tensors do not fit the config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} has no {METADATA_KEY!r} entry in its metadata, so its config is unknown")
    config = from_json(ModelConfig, metadata[METADATA_KEY], f"the metadata of {path}")
    with torch.device("meta"):
        model = UNet(config.unet)
    check_fits(model, state, str(path))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return LoadedModel(model.eval().requires_grad_(False), config)


def check_fits(model: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raise ``ValueError`` naming the first entry in which ``state`` differs from what ``model`` has."""
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{source} does not fit the model: {name} {tuple(tensor.shape)} is missing")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source} does not fit the model: {name} is {tuple(state[name].shape)}, "
                f"the model has {tuple(tensor.shape)}"
            )
    surplus = [name for name in state if name not in expected]
    if surplus:
        raise ValueError(f"{source} does not fit the model: {surplus[0]} is not one of its entries")
