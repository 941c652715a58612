"""The presets describe the released GLIDE checkpoints entry by entry."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from glide_fast.diffusion import Schedule
from glide_fast.models import PRESETS, ModelConfig, UNet, preset
from glide_fast.text.tokenizer import get_tokenizer
from tests.golden import PARITY

RELEASED = {
    "glide-base": "glide.base",
    "glide-upsample": "glide.upsample",
    "glide-base-inpaint": "glide.base-inpaint",
    "glide-upsample-inpaint": "glide.upsample-inpaint",
}


def build(config: ModelConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config.unet)


def test_every_released_model_has_a_preset() -> None:
    assert PRESETS.keys() == RELEASED.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_has_the_names_and_shapes_of_the_checkpoint_in_its_order(name: str) -> None:
    with np.load(PARITY / "checkpoints.npz") as released:
        expected = json.loads(str(released[RELEASED[name]]))
    ours = [[key, list(tensor.shape)] for key, tensor in build(preset(name)).state_dict().items()]
    assert ours == expected


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_has_a_known_tokenizer_and_schedule(name: str) -> None:
    config = preset(name)
    assert config.unet.text is not None
    assert get_tokenizer(config.unet.text.tokenizer).size == config.unet.text.vocabulary
    assert Schedule.create(config.schedule, config.steps, "").betas.shape == (1000,)


def test_upsamplers_learned_on_another_schedule_than_base_models() -> None:
    schedules = {name: preset(name).schedule for name in PRESETS}
    assert schedules == {name: "linear" if "upsample" in name else "cosine" for name in PRESETS}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown model 'glide'; the known ones are glide-base, glide-upsample"
    ):
        preset("glide")
