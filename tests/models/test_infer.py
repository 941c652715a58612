"""Configs read off names and shapes: of everything published, of the fixtures, and of odd shapes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.models import (
    PRESETS,
    CLIPConfig,
    EncoderConfig,
    ModelConfig,
    NoisyCLIPConfig,
    TextConfig,
    UNetConfig,
    preset,
)
from glide_fast.models.configs import Config, describe
from glide_fast.models.infer import infer_config
from glide_fast.models.presets import PUBLISHED
from tests.golden import PARITY

UPSTREAM = json.loads((PARITY / "state_dicts.json").read_text(encoding="utf-8"))
TOWERS = ("glide_clip.image_encoder", "glide_clip.text_encoder", "glide_clip_text_direct")
SHAPE = UNetConfig(image_size=16, channels=32, channel_mult=(1, 2), res_blocks=1, attention_strides=(2,))
TEXT = TextConfig(tokenizer="embedded", vocabulary=11, context=5, width=64, layers=2, heads=1)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def empty(entries: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in entries.items()}


def quietly(state: dict[str, Tensor]) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer_config(state, "a.pt")


def without_dropout(config: Config) -> Config:
    if isinstance(config, ModelConfig):
        return replace(config, unet=replace(config.unet, dropout=0.0))
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_model_is_recognised_and_nothing_is_assumed(name: str) -> None:
    state = describe(PRESETS[name]).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = infer_config(state, "a.pt")
    assert without_dropout(config) == without_dropout(PRESETS[name])


def test_every_published_kind_is_there() -> None:
    kinds = {type(row.config) for row in PUBLISHED.values()}
    assert kinds == {ModelConfig, EncoderConfig, CLIPConfig, NoisyCLIPConfig}


@pytest.mark.parametrize("name", [name for name in UPSTREAM if name not in TOWERS])
def test_the_originals_small_models_are_understood(name: str) -> None:
    expected = {key: tuple(shape) for key, shape, _ in UPSTREAM[name]}
    config = quietly(empty(expected))
    assert shapes(describe(config).state_dict()) == expected


def test_the_towers_of_a_noise_aware_clip_are_understood_together() -> None:
    expected = {
        f"{tower.split('.')[1]}.{key}": tuple(shape)
        for tower in TOWERS[:2]
        for key, shape, _ in UPSTREAM[tower]
    }
    config = quietly(empty(expected))
    assert isinstance(config, NoisyCLIPConfig)
    assert config.image_size == 32
    assert shapes(describe(config).state_dict()) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dims": 1},
        {"dims": 3, "resblock_updown": False},
        {"resblock_updown": False, "learned_resample": True},
        {"resblock_updown": False, "learned_resample": False},
        {"channel_mult": (1, 1, 1, 1), "res_blocks": 2, "attention_strides": (8,), "channels": 64},
        {"channel_mult": (1, 1, 1, 1, 1, 1), "res_blocks": 1, "attention_strides": (), "channels": 64},
        {"channel_mult": (0.5, 1, 1, 1.5), "channels": 64, "attention_strides": (4, 8)},
        {"channel_mult": (2,), "res_blocks": 3, "attention_strides": (1,)},
        {"channel_mult": (1, 2, 3), "res_blocks": 4, "attention_strides": (1, 2, 4), "channels": 64},
        {"scale_shift_norm": False},
        {"low_res": True},
        {"inpaint": True},
        {"inpaint": True, "low_res": True},
        {"out_channels": 3, "low_res": True},
        {"image_channels": 1, "out_channels": 2},
        {"image_channels": 4, "out_channels": 4},
        {"classes": 7},
        {"text": TEXT},
        {"text": replace(TEXT, final_norm=False, padding_embedding=False), "inpaint": True},
        {"channels": 16, "norm_groups": 16},
    ],
    ids=str,
)
def test_every_field_that_shapes_show_is_read(changes: dict[str, Any]) -> None:
    unet = replace(SHAPE, head_channels=None, **changes)
    config = quietly(describe(ModelConfig(unet=unet)).state_dict())
    assert isinstance(config, ModelConfig)
    visible = replace(
        config.unet,
        image_size=unet.image_size,
        head_channels=None,
        learned_resample=config.unet.learned_resample if unet.resblock_updown else unet.learned_resample,
    )
    assert visible == replace(unet, learned_resample=visible.learned_resample)
    if not unet.resblock_updown:
        assert config.unet.learned_resample == unet.learned_resample
    learned = unet.out_channels == 2 * unet.image_channels
    assert config.variance == ("learned_range" if learned else "fixed_large")


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("dims", [1, 2])
def test_classifiers_with_every_pool(pool: Any, dims: Any) -> None:
    trunk = replace(SHAPE, channels=64, channel_mult=(1, 2, 2), out_channels=5, dims=dims, image_size=32)
    given = EncoderConfig(trunk=trunk, pool=pool)
    config = quietly(describe(given).state_dict())
    assert config == given  # image size and all: 32 px is also the default of three levels


def test_the_image_size_of_an_attention_pool_is_read() -> None:
    given = EncoderConfig(trunk=replace(SHAPE, channels=64, out_channels=5, image_size=48), pool="attention")
    assert quietly(describe(given).state_dict()) == given


def test_what_was_assumed_is_said() -> None:
    state = describe(ModelConfig(unet=replace(SHAPE, channels=64, text=TEXT))).state_dict()
    with pytest.warns(UserWarning, match="shapes do not tell everything") as caught:
        infer_config(state, "a.pt")
    (warning,) = caught
    assert str(warning.message) == (
        "a.pt: shapes do not tell everything; assumed image_size 16, head_channels 64, "
        "attention_order by_head, norm_groups 32, text.tokenizer embedded, text.heads 1, "
        "schedule cosine, steps 1000, prediction epsilon, variance learned_range, rescale_timesteps False; "
        "give config= (or --model, for a published one) if that is wrong"
    )


def test_a_classifier_whose_levels_can_be_counted_in_two_ways_is_said_to_be_assumed() -> None:
    trunk = replace(SHAPE, channel_mult=(1, 1, 1), res_blocks=3, attention_strides=(), out_channels=5)
    state = describe(EncoderConfig(trunk=replace(trunk, head_channels=32), pool="adaptive")).state_dict()
    with pytest.warns(UserWarning, match=r"assumed .*channel_mult \(1, 1, 1, 1, 1, 1\), res_blocks 1"):
        infer_config(state, "a.pt")


def test_clips_need_no_assumption() -> None:
    small = replace(preset("clip-rn50", CLIPConfig), width=128, heads=2, vocabulary=99, context=11, layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert infer_config(describe(small).state_dict(), "a.pt") == small


def test_a_preset_needs_equal_shapes() -> None:
    config = preset("glide-base")
    other = replace(config, unet=replace(config.unet, res_blocks=2))
    with pytest.warns(UserWarning, match="assumed image_size 64"):
        infer_config(describe(other).state_dict(), "a.pt")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"weight": (1,)}, "its names, such as weight, are those of no U-Net, classifier or CLIP here"),
        ({}, "its names, such as none, are those"),
        ({"blocks.input.w_t": (10, 4)}, "one tower of a noise-aware CLIP; give both files together"),
        ({"visual.conv1.weight": (64, 3, 4, 4)}, r"ln_final\.weight is missing; give config="),
    ],
)
def test_what_is_not_understood_is_named(entries: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.pt: its config cannot be inferred.*{reason}"):
        infer_config(empty(entries), "a.pt")


def test_a_layout_of_no_unet_is_refused() -> None:
    state = describe(ModelConfig(unet=SHAPE)).state_dict()
    del state["output_blocks.1.2.in_layers.0.weight"]
    with pytest.raises(ValueError, match="its 4 encoder stages are laid out as in no U-Net of the family"):
        infer_config(state, "a.pt")
