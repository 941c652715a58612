"""Runs so small that they can be trained, killed and resumed in a test: 8 px pictures, one level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glide_fast.data.images import save_png
from glide_fast.models import ModelConfig, TextConfig, UNetConfig
from glide_fast.models.encoder import EncoderConfig
from glide_fast.models.noisy_clip import NoisyCLIPConfig
from glide_fast.text.tokenizer import embedded_tokenizer
from glide_fast.training.config import DataConfig, NoiseConfig, OptimizerConfig, SampleConfig, TrainConfig
from glide_fast.training.log import read_log
from glide_fast.training.loop import Trainer

CAPTIONS = ("red apple", "dog face", "rocket", "sun", "key", "pizza", "cat", "house", "fire", "bicycle")
SIZE, CLASSES = 8, 3
TASKS = ("base", "upsampler", "inpaint", "adm", "classifier", "clip")
TINY_CLIP = NoisyCLIPConfig(
    embedding=16,
    image_size=SIZE,
    patch_size=4,
    image_heads=2,
    image_head_channels=16,
    image_layers=1,
    text_heads=2,
    text_head_channels=16,
    text_layers=1,
    context=6,
    vocabulary=embedded_tokenizer().size,
    timesteps=20,
    tokenizer="embedded",
)


def paint_folder(folder: Path) -> Path:
    """A data set of one picture a caption, a smooth pattern of its own, in three folders."""
    ramp = np.linspace(0, 1, SIZE)
    for number, caption in enumerate(CAPTIONS):
        phase = np.array([0.0, 2.0, 4.0]) + number
        waves = np.sin(3 * ramp[:, None, None] + phase) * np.cos(
            2 * ramp[None, :, None] * (number % 3) + phase
        )
        name = folder / f"class-{number % CLASSES}" / f"{number}.png"
        save_png(name, ((waves + 1) * 127.5).round().astype(np.uint8))
        name.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def tiny_unet(**changes: Any) -> UNetConfig:
    text = TextConfig(
        tokenizer="embedded", vocabulary=embedded_tokenizer().size, context=6, width=32, layers=1, heads=2
    )
    shape = UNetConfig(
        image_size=SIZE,
        channels=32,
        channel_mult=(1,),
        res_blocks=1,
        attention_strides=(1,),
        head_channels=32,
        text=text,
    )
    return replace(shape, **changes)


def tiny_network(task: str) -> dict[str, Any]:
    """The fields of a config that describe the network of a task, and the samples it draws."""
    if task == "clip":
        return {"clip": TINY_CLIP, "noise": NoiseConfig(steps=20)}
    if task == "classifier":
        trunk = tiny_unet(text=None, out_channels=CLASSES)
        return {"classifier": EncoderConfig(trunk=trunk), "noise": NoiseConfig(steps=20)}
    if task == "adm":
        unet = tiny_unet(text=None, classes=CLASSES, dropout=0.1)
        samples = SampleConfig(count=4, every=100, steps=2)
        return {"model": ModelConfig(unet=unet, steps=20), "samples": samples}
    unet = tiny_unet(low_res=task.endswith("upsampler"), inpaint=task.startswith("inpaint"), dropout=0.1)
    samples = SampleConfig(prompts=CAPTIONS[:2], every=100, steps=2)
    return {"model": ModelConfig(unet=unet, steps=20), "samples": samples}


def tiny_config(folder: Path, *, task: str = "base", **changes: Any) -> TrainConfig:
    """A run of 12 steps with dropout; ``changes`` replace fields of the config."""
    values: dict[str, Any] = {
        "task": task,
        **tiny_network(task),
        "data": DataConfig(source=str(folder)),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=4, ema=0.99),
        "steps": 12,
        "batch": 4,
        "save_every": 100,
    }
    return TrainConfig(**(values | changes))


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of every tensor that the next step depends on, by name."""
    state = trainer.state
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    tensors |= {f"timesteps.{name}": tensor for name, tensor in state.timesteps.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Every tensor equals its namesake, bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, the first is {different[0]}"


def log_without_speed(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's log without the only field that depends on the clock."""
    records = read_log(directory / "log.jsonl")
    return [
        {name: value for name, value in record.items() if name != "images_per_second"} for record in records
    ]


def finished(directory: Path) -> dict[str, bytes]:
    """The files of a run that hold no timings, by name; temporary ones left out."""
    names = ["model.safetensors", "loss.png", "config.json"]
    files = [directory / name for name in names] + sorted((directory / "samples").glob("step-*.png"))
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def awake(trainer: Trainer) -> Trainer:
    """With output layers that do not start at zero, so that every layer learns from the first step on."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return trainer
