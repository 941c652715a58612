"""The presets describe the published checkpoints entry by entry."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models import (
    PRESETS,
    CLIPConfig,
    EncoderConfig,
    ModelConfig,
    NoisyCLIP,
    NoisyCLIPConfig,
    preset,
)
from glide_fast.models.configs import Network, describe
from glide_fast.models.presets import PUBLISHED
from glide_fast.text.tokenizer import get_tokenizer
from tests.golden import PARITY, entry

RELEASED = {
    "glide-base": "glide.base",
    "glide-upsample": "glide.upsample",
    "glide-base-inpaint": "glide.base-inpaint",
    "glide-upsample-inpaint": "glide.upsample-inpaint",
    "guided-64x64-diffusion": "guided.64x64_diffusion",
    "guided-256x256-diffusion": "guided.256x256_diffusion",
    "guided-64-256-upsampler": "guided.64_256_upsampler",
    "guided-64x64-classifier": "guided.64x64_classifier",
    "improved-imagenet64-uncond": "improved.imagenet64_uncond_100M_1500K",
    "improved-upsample-cond": "improved.upsample_cond_500K",
    "clip-vit-b-32": "clip.ViT-B/32",
    "clip-rn50": "clip.RN50",
}
PARAMETERS = {
    "glide-base": 385_030_726,
    "glide-upsample": 398_361_286,
    "glide-base-inpaint": 385_037_638,
    "glide-upsample-inpaint": 398_368_198,
    "glide-clip": 158_123_264,
    "glide-3.5b-base": 3_554_414_086,
    "glide-1.5b-upsample": 1_540_932_998,
    "glide-clip-vit-l": 440_439_040,
    "guided-64x64-diffusion": 295_904_454,
    "guided-128x128-diffusion": 421_529_606,
    "guided-256x256-diffusion": 553_838_086,
    "guided-256x256-diffusion-uncond": 552_814_086,
    "guided-512x512-diffusion": 558_997_638,
    "guided-64-256-upsampler": 311_795_910,
    "guided-128-512-upsampler": 308_835_270,
    "guided-64x64-classifier": 65_438_568,
    "guided-128x128-classifier": 42_568_040,
    "guided-256x256-classifier": 54_096_360,
    "guided-512x512-classifier": 54_448_360,
    "guided-lsun-bedroom": 552_814_086,
    "guided-lsun-cat": 552_814_086,
    "guided-lsun-horse": 552_814_086,
    "guided-lsun-horse-nodropout": 552_814_086,
    "improved-imagenet64-uncond": 121_063_942,
    "improved-imagenet64-uncond-vlb": 121_063_942,
    "improved-imagenet64-cond": 273_049_350,
    "improved-upsample-cond": 279_792_390,
    "improved-cifar10-uncond": 52_546_438,
    "improved-cifar10-uncond-vlb": 52_546_438,
    "improved-lsun-bedroom": 113_676_678,
    "improved-lsun-bedroom-bs64": 113_676_678,
    "clip-rn50": 102_007_137,
    "clip-rn101": 119_688_033,
    "clip-rn50x4": 178_300_601,
    "clip-rn50x16": 290_979_217,
    "clip-rn50x64": 623_258_305,
    "clip-vit-b-32": 151_277_313,
    "clip-vit-b-16": 149_620_737,
    "clip-vit-l-14": 427_616_513,
    "clip-vit-l-14-336px": 427_944_193,
}
DIFFUSIONS = [name for name, config in PRESETS.items() if isinstance(config, ModelConfig)]


@functools.cache
def released() -> dict[str, list[tuple[str, list[int]]]]:
    with np.load(PARITY / "checkpoints.npz") as arrays:
        return {key: json.loads(str(arrays[key])) for key in arrays.files}


def entries(network: Any) -> list[list[Any]]:
    return [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()]


def parameters(network: Network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_every_released_checkpoint_has_a_preset() -> None:
    towers = {"glide.clip/image-enc", "glide.clip/text-enc"}
    assert {*RELEASED.values(), *towers} == released().keys()


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_has_the_names_and_shapes_of_the_checkpoint_in_its_order(name: str) -> None:
    assert entries(describe(PRESETS[name])) == released()[RELEASED[name]]


def test_the_noise_aware_clip_has_both_checkpoints() -> None:
    network = describe(PRESETS["glide-clip"])
    assert isinstance(network, NoisyCLIP)
    assert entries(network.image_encoder) == released()["glide.clip/image-enc"]
    assert entries(network.text_encoder) == released()["glide.clip/text-enc"]


def test_every_preset_has_the_parameters_that_were_published_or_counted() -> None:
    assert {name: parameters(describe(config)) for name, config in PRESETS.items()} == PARAMETERS


def test_the_papers_upsampler_with_as_many_text_blocks_as_its_base_model() -> None:
    config = preset("glide-1.5b-upsample")
    assert config.unet.text is not None
    deeper = replace(config, unet=replace(config.unet, text=replace(config.unet.text, layers=24)))
    assert parameters(describe(deeper)) == 1_641_702_790


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_preset_can_be_sampled(name: str) -> None:
    config = preset(name)
    diffusion = GaussianDiffusion(
        schedule=Schedule.create(config.schedule, config.steps, ""),
        mean_type=config.prediction,
        variance_type=config.variance,
        rescale_timesteps=config.rescale_timesteps,
    )
    channels = config.unet.image_channels * (2 if diffusion.learns_variance else 1)
    assert config.unet.out_channels == channels
    if config.unet.text is not None:
        assert get_tokenizer(config.unet.text.tokenizer).size == config.unet.text.vocabulary


SCHEDULES = {"squaredcos_cap_v2": "cosine"}


@pytest.mark.parametrize("name", [name for name in RELEASED if name in DIFFUSIONS])
def test_a_preset_is_trained_as_the_released_models_options_say(name: str) -> None:
    config, options = preset(name), entry("checkpoints")["models"][RELEASED[name]]["kwargs"]
    unet = config.unet
    assert unet.image_size == options.get("image_size", options.get("large_size"))
    assert unet.dropout == options["dropout"]
    assert unet.head_channels == (None if options.get("num_head_channels", -1) == -1 else 64)
    assert unet.head_channels or unet.heads == options["num_heads"]
    assert (unet.attention_order == "by_role") == options.get("use_new_attention_order", False)
    if not name.startswith("improved"):  # whose options are its defaults; the READMEs say otherwise
        assert config.schedule == SCHEDULES.get(options["noise_schedule"], options["noise_schedule"])
        assert config.steps == options["diffusion_steps"]
        assert config.rescale_timesteps == options.get("rescale_timesteps", False)


@pytest.mark.parametrize(
    ("name", "diffusion"),
    [
        ("glide-3.5b-base", ("cosine", 1000, False)),
        ("guided-64x64-diffusion", ("cosine", 1000, False)),
        ("guided-512x512-diffusion", ("linear", 1000, False)),
        ("improved-imagenet64-uncond", ("cosine", 4000, True)),
        ("improved-imagenet64-cond", ("cosine", 4000, False)),
        ("improved-upsample-cond", ("linear", 4000, False)),
        ("improved-cifar10-uncond-vlb", ("cosine", 4000, True)),
        ("improved-lsun-bedroom", ("linear", 1000, False)),
    ],
)
def test_a_preset_has_the_diffusion_of_its_readme(name: str, diffusion: tuple[str, int, bool]) -> None:
    config = preset(name)
    assert (config.schedule, config.steps, config.rescale_timesteps) == diffusion


def test_files_have_addresses_and_clips_have_the_hash_that_is_in_theirs() -> None:
    for name, row in PUBLISHED.items():
        for file in row.files:
            assert re.fullmatch(r"https://openaipublic\.[a-z.]+/.*/[\w-]+\.pt", file.url)
            assert file.sha256 == (file.url.split("/")[-2] if name.startswith("clip-") else None)
    unpublished = {name for name, row in PUBLISHED.items() if not row.files}
    assert unpublished == {"glide-3.5b-base", "glide-1.5b-upsample", "glide-clip-vit-l"}


def test_a_preset_is_asked_for_by_kind() -> None:
    assert preset("clip-rn50", CLIPConfig).embedding == 1024
    assert preset("glide-clip", NoisyCLIPConfig).vocabulary == 65536
    assert preset("guided-64x64-classifier", EncoderConfig).trunk.out_channels == 1000
    with pytest.raises(
        ValueError, match=r"'clip-rn50' has a CLIPConfig, not a ModelConfig; ask for preset\("
    ):
        preset("clip-rn50")


def test_an_unknown_name_lists_those_spelled_alike() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'glide_base'; `glide-fast models` .* glide-base"):
        preset("glide_base")
