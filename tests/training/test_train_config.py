"""Training configs: every wrong field is named before any work starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from glide_fast.config import from_dict
from glide_fast.data.masks import MaskConfig
from glide_fast.training.config import DataConfig, LowResConfig, NoiseConfig, SampleConfig, TrainConfig
from tests.training.tiny import tiny_config


def test_all_wrong_fields_are_named_at_once() -> None:
    shape = {
        "image_size": 8,
        "channels": "many",
        "channel_mult": [1],
        "res_blocks": 1,
        "attention_strides": [],
    }
    values = {
        "task": "base",
        "batchsize": 4,
        "model": {"unet": shape | {"text": {"contxt": 6}}},
        "optimizer": {"learning_rate": None, "beta": [0.9, 0.99]},
    }
    with pytest.raises(ValueError, match=re.escape("a.toml does not describe a TrainConfig")) as caught:
        from_dict(TrainConfig, values, "a.toml")
    lines = str(caught.value).splitlines()[1:]
    named = [line.strip().split(":")[0] for line in lines]
    assert sorted(named) == [
        "batchsize",
        "model.unet.channels",
        "model.unet.text.contxt",
        "optimizer.beta",
        "optimizer.learning_rate",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"batch": 6, "accumulate": 4}, "batch 6 cannot be taken in accumulate = 4 parts"),
        ({"accumulate": 0}, "accumulate = 0"),
        ({"caption_drop": 1.0}, r"caption_drop 1\.0 must be in \[0, 1\)"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"save_every": 0}, "save_every 0 must be at least 1"),
        ({"samples": SampleConfig(count=-1)}, r"samples\.count -1 must be at least 0"),
        ({"data": DataConfig(window=0)}, r"data\.window 0 must be at least 1"),
        ({"samples": SampleConfig(every=0)}, r"samples\.every 0 must be at least 1"),
        (
            {"samples": SampleConfig(prompts=("sun",), steps=21)},
            r"samples\.steps 21 must lie in 2 \.\. .* 20",
        ),
        ({"samples": SampleConfig(prompts=("sun",), steps=1)}, r"samples\.steps 1 must lie in 2 \.\. "),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("pictures"), **changes)


def test_several_values_out_of_range_are_told_together() -> None:
    with pytest.raises(ValueError, match=r"batch 0.*caption_drop 2.*steps -1"):
        tiny_config(Path("pictures"), batch=0, caption_drop=2, steps=-1)


@pytest.mark.parametrize("task", ["base", "upsampler"])
def test_the_task_and_the_model_must_agree_on_low_res(task: str) -> None:
    other = {"base": "upsampler", "upsampler": "base"}[task]
    model = tiny_config(Path("pictures"), task=other).model
    with pytest.raises(ValueError, match=f"task '{task}' and model.unet.low_res = .* do not fit"):
        tiny_config(Path("pictures"), task=task, model=model)


@pytest.mark.parametrize("factor", [0, 1, 3])
def test_the_small_picture_must_divide_the_large_one(factor: int) -> None:
    with pytest.raises(ValueError, match=rf"low_res\.factor {factor} must be a divisor of .*image_size 8"):
        tiny_config(Path("pictures"), task="upsampler", low_res=LowResConfig(factor=factor))


def test_sections_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task 'base' hides no part of a picture; leave \[masks\] out"):
        tiny_config(Path("pictures"), masks=MaskConfig(boxes=0.5))
    with pytest.raises(
        ValueError, match=r"task 'base' noises pictures as \[model\] says; leave \[noise\] out"
    ):
        tiny_config(Path("pictures"), noise=NoiseConfig(steps=30))


def test_a_model_without_text_is_refused() -> None:
    values = {"task": "base", "model": {"unet": {"image_size": 8, "channels": 32, "channel_mult": [1]}}}
    values["model"]["unet"] |= {"res_blocks": 1, "attention_strides": []}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"needs a model with text; add \[model\.unet\.text\]"):
        from_dict(TrainConfig, values, "a.toml")
