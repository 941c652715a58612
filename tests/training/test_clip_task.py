"""The noise-aware CLIP's task: contrastive loss, learned scale, file that loads and guides."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glide_fast.data.folder import load_folder
from glide_fast.models.checkpoint import load_network
from glide_fast.models.noisy_clip import NoisyCLIP
from glide_fast.sampling.gradients import noisy_clip_gradient
from glide_fast.text.framing import framed
from glide_fast.training.config import NoiseConfig, OptimizerConfig
from glide_fast.training.draws import Draws
from glide_fast.training.loop import Trainer, train
from glide_fast.training.tasks.clip import FIRST_SCALE, ClipTask, LearningCLIP
from tests.training.tiny import (
    CAPTIONS,
    SIZE,
    TINY_CLIP,
    assert_identical,
    log_without_speed,
    snapshot,
    tiny_config,
)

B = len(CAPTIONS)


def prepared(pictures: Path) -> tuple[ClipTask, LearningCLIP, tuple[torch.Tensor, ...]]:
    """A task, a network, and the inputs of its loss: batch, steps, noise."""
    task = ClipTask(tiny_config(pictures, task="clip"), None)
    torch.manual_seed(0)
    network = task.network()
    assert isinstance(network, LearningCLIP)
    draws = Draws.of_step(0, 0, B, slice(None))
    batch = task.batch(load_folder(pictures, SIZE), draws)
    return task, network, (batch, torch.arange(B), draws.normal(3, SIZE, SIZE))  # type: ignore[return-value]


def test_the_loss_is_the_symmetric_cross_entropy_of_the_published_modules(pictures: Path) -> None:
    task, network, (batch, t, noise) = prepared(pictures)
    found = task.loss(network, batch, t, noise)  # type: ignore[arg-type]
    published = NoisyCLIP(TINY_CLIP)
    published.load_state_dict({k: v for k, v in network.state_dict().items() if k != "logit_scale"})
    x_t = task.diffusion.q_sample(batch.x_start, t, noise)  # type: ignore[attr-defined]
    images = published.image_embeddings(x_t, t)
    names = sorted(CAPTIONS, key=lambda caption: load_folder(pictures, SIZE).captions.index(caption))
    texts = published.text_embeddings(*framed("embedded", names, TINY_CLIP.context))
    logits = images @ texts.T * FIRST_SCALE
    expected = (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2
    assert found["loss"].mean().item() == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(1) == torch.arange(B)).float()
    assert torch.equal(found["accuracy"], right)


def test_every_parameter_learns(pictures: Path) -> None:
    task, network, inputs = prepared(pictures)
    task.loss(network, *inputs)["loss"].mean().backward()  # type: ignore[arg-type]
    without = [name for name, each in network.named_parameters() if each.grad is None]
    assert not without
    assert network.logit_scale.grad is not None
    assert float(network.logit_scale.grad) != 0


def test_the_scale_is_limited(pictures: Path) -> None:
    task, network, (batch, t, noise) = prepared(pictures)
    losses = []
    for scale in (100.0, 500.0):
        network.logit_scale.data.fill_(math.log(scale))
        losses.append(task.loss(network, batch, t, noise)["loss"])  # type: ignore[arg-type]
    torch.testing.assert_close(losses[0], losses[1])
    assert task.export(network.state_dict())[0].logit_scale == 100.0  # type: ignore[union-attr]


def test_it_learns_captions_and_its_file_guides(pictures: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema=0.9)
    config = tiny_config(pictures, task="clip", batch=B, steps=60, optimizer=optimizer)
    trainer = Trainer(config, tmp_path)
    losses = [trainer.step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * math.log(B) < losses[0]  # log(B): a guess
    trainer.save()
    clip = load_network(tmp_path / "model.safetensors", NoisyCLIP)
    assert clip.config == replace(TINY_CLIP, logit_scale=clip.config.logit_scale)
    scale = float(trainer.state.ema.state_dict()["logit_scale"].exp())
    assert clip.config.logit_scale == pytest.approx(scale, abs=1e-4)
    text = clip.text_embeddings(*framed("embedded", CAPTIONS[:2], clip.config.context))
    x, t = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 9])
    gradient = noisy_clip_gradient(clip, text)(x, t)
    assert gradient.shape == x.shape
    better = clip.similarity(x + 0.01 * gradient / gradient.norm(), t, text)
    assert (better > clip.similarity(x, t, text)).all()


def test_a_resumed_run_equals_the_unbroken_run(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, task="clip", steps=12)
    train(config, tmp_path / "unbroken")
    train(replace(config, steps=7), tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert_identical(
        snapshot(Trainer(config, tmp_path / "stopped")), snapshot(Trainer(config, tmp_path / "unbroken"))
    )
    assert log_without_speed(tmp_path / "stopped") == log_without_speed(tmp_path / "unbroken")


def test_bfloat16_is_close(pictures: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(tiny_config(pictures, task="clip", compute_dtype=dtype), tmp_path / dtype)
        losses[dtype] = trainer.step()["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_activations_may_be_computed_again(pictures: Path, tmp_path: Path) -> None:
    records = [
        Trainer(
            tiny_config(pictures, task="clip", checkpoint_activations=again), tmp_path / str(again)
        ).step()
        for again in (False, True)
    ]
    assert records[0] == records[1]


def test_a_batch_in_parts_is_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match="accumulate 2 must be 1 for task 'clip'"):
        tiny_config(pictures, task="clip", accumulate=2)


def test_a_vocabulary_too_small_and_timesteps_of_another_schedule_are_refused(
    pictures: Path, tmp_path: Path
) -> None:
    config = tiny_config(pictures, task="clip")
    with pytest.raises(ValueError, match=r"clip\.vocabulary 100 is smaller than tokenizer 'embedded'; use"):
        Trainer(replace(config, clip=replace(TINY_CLIP, vocabulary=100)), tmp_path)
    with pytest.raises(ValueError, match=r"clip\.timesteps 20 must be noise\.steps 30"):
        Trainer(replace(config, noise=NoiseConfig(steps=30)), tmp_path)


def test_framed_texts_end_with_their_end_token_and_clips_start_with_its_start() -> None:
    tokens, lengths = framed("clip", ["a cat", ""], 6)
    assert tokens.tolist() == [[49406, 320, 2368, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0]]
    assert lengths.tolist() == [4, 2]
    tokens, lengths = framed("clip", ["a cat " * 5], 6)
    assert lengths.tolist() == [6]
    assert tokens[0, [0, 5]].tolist() == [49406, 49407]
    tokens, lengths = framed("embedded", ["red apple", ""], 4)
    assert lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="tokenizer 'klingon' is unknown; choose one of clip, "):
        framed("klingon", [""], 4)
    with pytest.raises(ValueError, match="context 2 must be at least 3"):
        framed("clip", [""], 2)
