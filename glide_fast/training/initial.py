"""The weights that a new run starts from: those of a model file that holds what the recipe describes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from glide_fast.config import to_dict
from glide_fast.models.checkpoint import read_weights
from glide_fast.models.configs import kind_of
from glide_fast.training.config import TrainConfig
from glide_fast.training.state import first_difference

STEM = "input_blocks.0.0.weight"
NOT_OF_THE_SHAPE = ("clip.logit_scale",)  # what training changes in a config


def load_weights(model: nn.Module, config: TrainConfig, path: Path) -> None:
    """Start ``model``, which is the recipe's, from the weights of a model file.

    An inpainting model may start from one that does not inpaint: its new input channels get weights of zero,
    so that at first it paints exactly what that model does (GLIDE, arXiv 2112.10741, section 3.4).

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it has another config; names the field.
    """
    weights = read_weights(path)
    kinds = kind_of(weights.config), kind_of(config.network)
    if kinds[0] != kinds[1]:
        raise ValueError(f"{path} holds a {kinds[0]}, and task {config.task!r} trains a {kinds[1]}")
    found, wanted = to_dict(weights.config), to_dict(config.network)
    unet = found.get("unet", {})
    widened = config.task.startswith("inpaint") and unet.get("inpaint") is False
    if widened:
        found = {**found, "unet": {**unet, "inpaint": True}}
    difference = first_difference(found, wanted, f"{config.section}.", free=NOT_OF_THE_SHAPE)
    if difference is not None:
        raise ValueError(f"{path} is another model: {difference}; give the one this recipe describes")
    state = weights.state
    if widened:
        state = {**state, STEM: widen(state[STEM], config.diffusion_model.unet.image_channels)}
    problems = model.load_state_dict({name: each.float() for name, each in state.items()}, strict=False)
    missing = [name for name in problems.missing_keys if name != "logit_scale"]  # learned anew
    if missing or problems.unexpected_keys:
        raise ValueError(f"{path} does not fit the model: {[*missing, *problems.unexpected_keys][0]}")


def widen(stem: Tensor, before: int) -> Tensor:
    """A stem [C, inputs, 3, 3] with four more inputs of weight zero behind the first ``before``."""
    new = stem.new_zeros(stem.shape[0], 4, *stem.shape[2:])
    return torch.cat([stem[:, :before], new, stem[:, before:]], dim=1)
