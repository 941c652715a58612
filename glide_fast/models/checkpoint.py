"""Model files: safetensors that carry their own config, and whatever else holds the weights of such a model.

A file that :func:`save_model` wrote says what it is. Of any other (a published ``.pt``, a trainer's
checkpoint, a TorchScript archive, plain safetensors) the config is given, or inferred from names and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from glide_fast.config import from_json, to_json
from glide_fast.download import fetch
from glide_fast.files import replacing
from glide_fast.models.clip import CLIP, CLIPConfig
from glide_fast.models.configs import KINDS, Config, ModelConfig, Network, describe, kind_of
from glide_fast.models.encoder import EncoderUNet
from glide_fast.models.infer import infer_config
from glide_fast.models.noisy_clip import NoisyCLIP
from glide_fast.models.presets import published
from glide_fast.models.state_files import TORCH_SUFFIXES, read_state
from glide_fast.models.unet import UNet

METADATA_KEY = "glide_fast"
KIND_KEY = "glide_fast.kind"  # absent in files of diffusion models

Source: TypeAlias = str | Path | Sequence[Path]
AnyNetwork = TypeVar("AnyNetwork", UNet, EncoderUNet, CLIP, NoisyCLIP)

_EXTRA = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's CLIP archives
_TOWERS = {"blocks.input.w_t": "image_encoder.", "blocks.input.w_voc": "text_encoder."}


class LoadedModel(NamedTuple):
    """A network and what must be known to sample from it."""

    network: UNet
    config: ModelConfig


class Weights(NamedTuple):
    """A state dict, what it belongs to, and where it is from."""

    state: dict[str, Tensor]
    config: Config
    source: str


def save_model(
    path: Path, config: Config, state: dict[str, Tensor], dtype: torch.dtype | None = torch.float16
) -> None:
    """Write the weights as safetensors of ``dtype`` (None: each as it is) with the config in the metadata.

    Raises:
        ValueError: a weight is too large for the dtype.
    """
    tensors = {name: _cast(name, tensor.detach(), dtype).contiguous() for name, tensor in state.items()}
    metadata = {METADATA_KEY: to_json(config)}
    if not isinstance(config, ModelConfig):
        metadata[KIND_KEY] = kind_of(config)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def is_name(source: str) -> bool:
    """Whether this is meant as the name of a preset: no file, and without the suffix of one."""
    path = Path(source)
    return not path.exists() and path.suffix.lower() not in (".safetensors", *TORCH_SUFFIXES)


def files_of(source: Source) -> list[Path]:
    """The local files of a source; those of a preset are downloaded unless they are in the cache.

    Raises:
        ValueError: there is no preset of this name, or it has no published weights.
        ConnectionError, OSError: the download fails.
    """
    if not isinstance(source, str):
        return [source] if isinstance(source, Path) else list(source)
    if not is_name(source):
        return [Path(source)]
    files = published(source).files
    if not files:
        raise ValueError(f"the weights of {source} were never published; give a file of your own")
    return [fetch(file.url, sha256=file.sha256) for file in files]


def read_weights(source: Source, config: Config | None = None) -> Weights:
    """Weights with their config: that given, else the file's own, else that of the preset or the shapes.

    Args:
        source: a file, the name of a preset, whose files are downloaded unless they are in the cache, or the
            two files of a noise-aware CLIP.

    Warns:
        UserWarning: the config was inferred, and something in it assumed.

    Raises:
        FileNotFoundError, ConnectionError, OSError: there is no such file, or the download fails.
        ValueError: no such preset, a file that cannot be read, or weights that do not fit the config (the
            first entry that differs is named).
    """
    paths = files_of(source)
    if config is None and isinstance(source, str) and is_name(source):
        config = published(source).config
    name = " and ".join(map(str, paths))
    state: dict[str, Tensor] = {}
    for path in paths:
        part = read_state(path)
        if config is None and METADATA_KEY in part.metadata:
            config = _config_in(part.metadata, path)
        prefix = next((_TOWERS[entry] for entry in _TOWERS if entry in part.state), "")
        state |= {prefix + entry: tensor for entry, tensor in part.state.items()}
    if config is None:
        config = infer_config(state, name)
    if isinstance(config, CLIPConfig):
        state = {entry: tensor for entry, tensor in state.items() if entry not in _EXTRA}
    check_fits(describe(config), state, name)
    return Weights(state, config, name)


def load_network(
    source: Source,
    kind: type[AnyNetwork],
    *,
    config: Config | None = None,
    dtype: torch.dtype = torch.float32,
) -> AnyNetwork:
    """A network of the ``kind`` expected, in eval mode, with weights of ``dtype``.

    Args:
        source, config: as for :func:`read_weights`.

    Raises:
        as :func:`read_weights`; ValueError also if the file holds another kind of network.
    """
    return _network(read_weights(source, config), kind, dtype)


def load_model(
    source: Source, *, config: ModelConfig | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A diffusion model in eval mode, with weights of ``dtype``.

    Args:
        source: a .safetensors or .pt file, or the name of a preset; as for :func:`read_weights`.
        config: what the file holds, if it does not say so itself and inferring is not enough.

    Raises:
        as :func:`read_weights`; ValueError also if the file holds another kind of network.
    """
    weights = read_weights(source, config)
    network = _network(weights, UNet, dtype)
    return LoadedModel(network, cast(ModelConfig, weights.config))  # no other kind describes a U-Net


def convert(
    source: Source, path: Path, *, config: Config | None = None, dtype: torch.dtype | None = None
) -> Config:
    """Write weights from anywhere as safetensors that carry their config, which is returned.

    Args:
        source, config: as for :func:`read_weights`.
        dtype: of the floating-point weights; None keeps that of each.

    Raises:
        as :func:`read_weights` and :func:`save_model`.
    """
    weights = read_weights(source, config)
    save_model(path, weights.config, weights.state, dtype)
    return weights.config


def _network(weights: Weights, kind: type[AnyNetwork], dtype: torch.dtype) -> AnyNetwork:
    model: Network = describe(weights.config)
    if not isinstance(model, kind):
        actual = type(model).__name__
        raise ValueError(
            f"{weights.source} holds a {actual}, not a {kind.__name__}; load_network(…, {actual}) reads it"
        )
    state = weights.state
    for name in list(state):  # one by one, so that there are never two whole copies
        tensor = state.pop(name)
        state[name] = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _config_in(metadata: dict[str, str], path: Path) -> Config:
    kind = metadata.get(KIND_KEY, "diffusion")
    if kind not in KINDS:
        raise ValueError(f"{path} holds a {kind!r}; this version knows {', '.join(KINDS)}")
    return from_json(KINDS[kind], metadata[METADATA_KEY], f"the metadata of {path}")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not converted.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise ValueError(f"{name} reaches {largest:g}, too large for {dtype}; use float32 or bfloat16")
    return converted


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
