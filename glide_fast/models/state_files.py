"""Files of named tensors: safetensors, PyTorch's own format, TorchScript archives. None may run code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glide_fast.models.torchscript import is_torchscript, read_torchscript

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which trainers file the weights
_PARALLEL = "module."  # what DistributedDataParallel puts before every name


class StateFile(NamedTuple):
    """The tensors of a file by name, on the CPU, and its text metadata (safetensors only)."""

    state: dict[str, Tensor]
    metadata: dict[str, str]


def read_state(path: Path) -> StateFile:
    """Read a file of weights; by its suffix it is PyTorch's (.pt, .pth, .ckpt, .bin), else safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of that format, is damaged, or holds more than a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    if path.suffix.lower() in TORCH_SUFFIXES:
        return StateFile(_read_torch(path), {})
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return StateFile(state, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code when read ({reason}); "
            "save the model's state_dict() alone, with the program that wrote the file"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a readable PyTorch file: {error}") from None
    return unwrap(values, str(path))


def unwrap(values: object, source: str) -> dict[str, Tensor]:
    """The state dict inside what a trainer saved: {"state_dict": …}, {"model": …}, names with "module.".

    Raises:
        ValueError: no state dict is found; ``source`` and what is there instead are named.
    """
    while not _is_state(values):
        found = values if isinstance(values, Mapping) else {}
        inner = next((found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            what = f"entries {', '.join(map(str, found))}"[:200] if found else type(values).__name__
            raise ValueError(
                f"{source} holds no state dict but {what}; save model.state_dict(), or it as 'state_dict'"
            )
        values = inner
    state = dict(values)
    if all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    return state


def _is_state(values: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(values, Mapping)
        and len(values) > 0
        and all(isinstance(value, Tensor) for value in values.values())
    )
