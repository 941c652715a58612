"""The models that ship with the package, and the README's example on them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glide_fast.config import load_toml
from glide_fast.data.emoji import load_emoji, split
from glide_fast.data.images import load_image
from glide_fast.evaluation import clip_captions, clip_features, r_precision
from glide_fast.evaluation.extractors import EMBEDDED_JUDGE
from glide_fast.evaluation.study import GUIDE
from glide_fast.models import NoisyCLIP, load_model, load_network
from glide_fast.sampling import PerImageNoise
from glide_fast.sampling.editing import inpaint
from glide_fast.sampling.pipeline import (
    ASSETS,
    EMBEDDED_INPAINTING,
    StageOptions,
    TextToImage,
    sample_stage,
)
from glide_fast.training import TrainConfig

ROOT = Path(__file__).parent.parent
FILES = {
    "emoji_base": ASSETS / "emoji_base.safetensors",
    "emoji_upsampler": ASSETS / "emoji_upsampler.safetensors",
    "emoji_inpaint": EMBEDDED_INPAINTING[0],
}
CLIPS = {"emoji_clip": GUIDE, "emoji_judge": EMBEDDED_JUDGE}


@pytest.mark.parametrize("name", FILES)
def test_the_model_is_the_one_its_recipe_describes(name: str) -> None:
    recipe = load_toml(TrainConfig, ROOT / "configs" / f"{name}.toml")
    assert load_model(FILES[name]).config == recipe.model


def test_the_weights_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in (FILES | CLIPS).values()) <= 60 * 2**20


def test_prompts_become_pictures_with_white_corners_and_colours() -> None:
    model = TextToImage.embedded()
    assert model.guidance == 1.25
    pictures = model(
        ["grinning face", "red heart"],
        seeds=[0, 1],
        base_options=StageOptions(steps=20),
        upsampler_options=StageOptions(steps=10, guidance=1.0),
    )
    assert pictures.shape == (2, 64, 64, 3)
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    assert corners.mean() > 200
    face, heart = pictures[:, 16:48, 16:48].astype(float).mean((1, 2))
    assert face[2] < face[1] - 30  # yellow: little blue
    assert heart[0] > heart[1]  # red more than green


def test_the_inpainting_model_completes_a_heart_in_its_colour() -> None:
    """The hidden half of a red heart on white becomes red where the heart goes on, white in the corners."""
    options = StageOptions(steps=20), StageOptions(steps=10, guidance=1.0)
    heart = TextToImage.embedded()(
        ["red heart"], seeds=[1], base_options=options[0], upsampler_options=options[1]
    )[0]
    known = np.zeros((64, 64), dtype=np.bool_)
    known[:, :32] = True
    painted = inpaint(
        TextToImage.embedded_inpainting(),
        heart,
        known,
        ["red heart"],
        seeds=[0],
        base_options=options[0],
        upsampler_options=options[1],
    )[0]
    np.testing.assert_array_equal(painted[known], heart[known])
    middle = painted[20:40, 34:46].astype(float).mean((0, 1))
    assert middle[0] > middle[1] + 60
    assert painted[[0, -1], [-1, -1]].astype(float).mean() > 200


@pytest.mark.parametrize("name", CLIPS)
def test_the_clips_know_the_captions_of_clean_pictures(name: str) -> None:
    """The guide and the judge are small, are their recipes', and find most captions among a hundred."""
    pytest.importorskip("emoji", reason="the package emoji (extra 'train') is not installed")
    try:
        data, _ = split(load_emoji(32))
    except FileNotFoundError as error:
        pytest.skip(f"the emoji font is not installed: {error}")
    assert CLIPS[name].stat().st_size <= 15 * 2**20
    clip = load_network(CLIPS[name], NoisyCLIP)
    recipe = load_toml(TrainConfig, ROOT / "configs" / f"{name}.toml")
    assert recipe.clip is not None
    assert clip.config == replace(recipe.clip, logit_scale=clip.config.logit_scale)
    shown = data.select(range(0, len(data), 20))
    pictures, texts = clip_features(clip)(shown.images), clip_captions(clip, shown.captions)
    assert r_precision(pictures, texts).share > 0.8


def test_dpm_solver_in_20_steps_is_closer_to_1000_steps_than_ddim() -> None:
    base = TextToImage.embedded().base

    def draw(sampler: str, steps: str) -> torch.Tensor:
        options = StageOptions(sampler=sampler, steps=steps, guidance=1.0)
        return sample_stage(base, ["rocket", "pizza"], noise=PerImageNoise([2, 3]), options=options)

    limit = draw("ddim", "1000")
    ddim, dpm = (
        (draw(sampler, "20") - limit).square().mean((1, 2, 3)).sqrt() for sampler in ("ddim", "dpm++2m")
    )
    assert (dpm < 0.9 * ddim).all()  # RMS 0.071 and 0.043 against 0.050 and 0.031
    assert dpm.max() < 0.1


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(example[1], "README.md", "exec"), {})
    assert load_image(tmp_path / "pictures.png").shape == (68, 134, 3)


def test_the_readmes_grid_is_a_grid_of_eight() -> None:
    with Image.open(ROOT / "docs" / "demo.png") as grid:
        assert grid.size == (4 * 66 + 2, 2 * 66 + 2)
        assert np.asarray(grid).std() > 20
