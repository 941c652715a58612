"""The recipes that ship: parsed, of the documented size, planned; those for a laptop run at a small size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glide_fast.config import load_toml
from glide_fast.data.emoji_captions import held_out_captions, list_emoji
from glide_fast.models.configs import ModelConfig, describe
from glide_fast.models.presets import PRESETS
from glide_fast.text.tokenizer import embedded_tokenizer
from glide_fast.training.config import SampleConfig, TrainConfig
from glide_fast.training.loop import Trainer
from glide_fast.training.tasks import TASKS
from tests.test_cli import run

RECIPES = Path(__file__).parents[2] / "configs"
PARAMETERS = {
    "adm_classifier256": 54_096_360,
    "adm_classifier64": 65_438_568,
    "adm_imagenet256_uncond": 552_814_086,
    "adm_imagenet64": 295_904_454,
    "emoji_adm": 7_234_182,
    "emoji_base": 9_380_614,
    "emoji_classifier": 1_785_638,
    "emoji_inpaint": 9_381_766,
    "emoji_clip": 4_161_216,
    "emoji_judge": 4_161_216,
    "emoji_upsampler": 1_757_734,
    "glide_base_3.5b": 3_554_414_086,
    "glide_clip_vit_l": 440_439_040,
    "glide_inpaint_3.5b": 3_554_432_518,
    "glide_upsampler_1.5b": 1_540_932_998,
}
PUBLISHED = {
    "adm_classifier256": "guided-256x256-classifier",
    "adm_classifier64": "guided-64x64-classifier",
    "adm_imagenet256_uncond": "guided-256x256-diffusion-uncond",
    "adm_imagenet64": "guided-64x64-diffusion",
    "glide_base_3.5b": "glide-3.5b-base",
    "glide_clip_vit_l": "glide-clip-vit-l",
    "glide_upsampler_1.5b": "glide-1.5b-upsample",
}
LAPTOP = [name for name in PARAMETERS if name.startswith("emoji_")]
LONGEST = 60  # lines: one screen


def recipe(name: str) -> TrainConfig:
    return load_toml(TrainConfig, RECIPES / f"{name}.toml")


def reduced(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The recipe with a narrow network, small batches and few steps; everything else as it is."""
    if isinstance(config.network, ModelConfig):
        unet = config.network.unet
        text = unet.text and replace(unet.text, width=32, layers=1, heads=1)
        small = replace(
            unet, channels=32, channel_mult=(1,) * len(unet.channel_mult), res_blocks=1, text=text
        )
        changes["model"] = replace(config.network, unet=small)
    elif config.clip is not None:
        changes["clip"] = replace(config.clip, image_layers=1, text_layers=1, image_heads=1, text_heads=1)
    elif config.classifier is not None:
        trunk = config.classifier.trunk
        small = replace(trunk, channels=32, channel_mult=(1,) * len(trunk.channel_mult), res_blocks=1)
        changes["classifier"] = replace(config.classifier, trunk=small)
    samples = replace(config.samples, prompts=config.samples.prompts[:2], count=min(2, config.samples.count))
    samples = replace(samples, steps=2)
    return replace(config, steps=3, batch=4, accumulate=1, samples=samples, **changes)


def test_there_is_a_count_for_every_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_is_one_screen(name: str) -> None:
    assert len((RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_describes_a_network_of_the_documented_size(name: str) -> None:
    network = describe(recipe(name).network)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_for_a_published_model_describes_it(name: str) -> None:
    assert recipe(name).network == PRESETS[PUBLISHED[name]]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_is_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = () if name in LAPTOP else ("--gpus", "64")
    run(monkeypatch, "plan", RECIPES / f"{name}.toml", *options)
    printed = capsys.readouterr().out
    assert f"{PARAMETERS[name] / 1e6:,.1f} M parameters" in printed
    assert "fits in 80.00 GB" in printed


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_fits_its_tokenizer_and_schedule(name: str) -> None:
    config = recipe(name)
    task = TASKS[config.task](replace(config, samples=SampleConfig()), None)
    assert task.diffusion.steps == (config.model.steps if config.model else config.noise.steps)


@pytest.mark.parametrize("name", LAPTOP)
def test_captions_fit_the_context_and_prompts_are_captions(name: str) -> None:
    pytest.importorskip("emoji")
    config = recipe(name)
    captions = {item.caption for item in list_emoji()} - set(held_out_captions())
    assert set(config.samples.prompts) <= captions
    task = TASKS[config.task](replace(config, samples=SampleConfig()), None)
    text = getattr(task, "text", None) or config.clip
    if text is not None:
        assert text.tokenizer == "embedded"
        encode = embedded_tokenizer().encode
        assert max(len(encode(caption)) for caption in captions) < text.context


@pytest.mark.parametrize("name", LAPTOP)
def test_a_laptop_recipe_runs_at_a_small_size(name: str, tmp_path: Path) -> None:
    pytest.importorskip("emoji")
    trainer = Trainer(reduced(recipe(name)), tmp_path)
    trainer.run()
    assert trainer.state.step == 3
    assert (tmp_path / "model.safetensors").exists()
    has_samples = bool(trainer.config.samples.prompts or trainer.config.samples.count)
    assert bool(list(tmp_path.glob("samples/*.png"))) == has_samples
    assert all(torch.isfinite(tensor).all() for tensor in trainer.state.ema.state_dict().values())
    assert math.isfinite(trainer.step()["loss"])
