"""What is learned from labels: ADM's classifier of noised pictures and class-conditional ADM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.folder import load_folder
from glide_fast.data.labels import EMOJI_CLASSES, labelled
from glide_fast.models import ModelConfig, load_model
from glide_fast.models.checkpoint import load_network
from glide_fast.models.encoder import EncoderUNet
from glide_fast.sampling.gradients import classifier_gradient
from glide_fast.training.config import OptimizerConfig, SampleConfig
from glide_fast.training.loop import Trainer, train
from tests.training.tiny import (
    CAPTIONS,
    CLASSES,
    SIZE,
    assert_identical,
    log_without_speed,
    snapshot,
    tiny_config,
    tiny_unet,
)

FAST = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema=0.9)


def pictures_of(captions: list[str], names: list[str]) -> CaptionedPictures:
    images = np.zeros((len(captions), 2, 2, 3), dtype=np.uint8)
    return CaptionedPictures(images=images, captions=captions, names=names)


def test_the_classes_of_emoji_are_their_skin_tones() -> None:
    captions = ["cat", "man, dark skin tone", "kiss, man and man, light skin tone, dark skin tone"]
    captions.append("baby, light skin tone")
    found, names = labelled(pictures_of(captions, list("abcd")), "emoji")
    assert found.labels is not None
    assert [names[label] for label in found.labels] == [names[0], "dark", names[0], "light"]
    assert names == EMOJI_CLASSES
    assert found.select([3, 0]).label_tensor().tolist() == [1, 0]


def test_the_classes_of_a_folder_are_its_sub_folders(pictures: Path) -> None:
    found, names = labelled(load_folder(pictures, SIZE), str(pictures))
    assert names == ("class-0", "class-1", "class-2")
    assert found.labels is not None
    expected = [f"class-{CAPTIONS.index(caption) % CLASSES}" for caption in found.captions]
    assert [names[label] for label in found.labels] == expected


def test_a_picture_in_no_sub_folder_is_named() -> None:
    with pytest.raises(ValueError, match=r"'b\.png' and 1 more pictures of 'here' have no class"):
        labelled(pictures_of(list("abc"), ["x/a.png", "b.png", "c.png"]), "here")


@pytest.mark.parametrize(
    ("task", "field"),
    [("classifier", r"classifier\.trunk\.out_channels 4"), ("adm", r"model\.unet\.classes 4")],
)
def test_another_number_of_classes_is_refused(pictures: Path, tmp_path: Path, task: str, field: str) -> None:
    config = tiny_config(pictures, task=task)
    if config.classifier is not None:
        trunk = replace(config.classifier.trunk, out_channels=4)
        config = replace(config, classifier=replace(config.classifier, trunk=trunk))
    elif config.model is not None:
        config = replace(config, model=replace(config.model, unet=replace(config.model.unet, classes=4)))
    with pytest.raises(ValueError, match=field + " is not the number of classes of .*; use 3: class-0, "):
        Trainer(config, tmp_path)


def test_the_classifier_loss_is_the_cross_entropy_on_noised_pictures(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, task="classifier"), tmp_path)
    seen: list[Any] = []
    take_loss = trainer._loss

    def watched(*inputs: Any) -> Any:
        seen.extend(inputs)
        return take_loss(*inputs)

    trainer._loss = watched  # type: ignore[method-assign]
    model = trainer.task.network()
    model.load_state_dict(trainer.model.state_dict())
    record = trainer.step()
    batch, t, noise = seen
    x_t = trainer.task.diffusion.q_sample(batch.x_start, t, noise)
    logits = model(x_t, t)
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)
    assert record["accuracy"] == pytest.approx((logits.argmax(1) == batch.labels).float().mean().item())
    assert len(set(t.tolist())) > 1


def test_a_classifier_learns_and_its_file_guides(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, task="classifier", batch=16, steps=80, optimizer=FAST), tmp_path)
    losses = [trainer.step()["loss"] for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.7 * np.log(CLASSES)
    trainer.save()
    classifier = load_network(tmp_path / "model.safetensors", EncoderUNet)
    data, _ = labelled(load_folder(pictures, SIZE), str(pictures))
    x = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    t = torch.zeros(len(x), dtype=torch.int64)
    assert (classifier(x, t).argmax(1) == data.label_tensor()).float().mean() > 0.8
    gradient = classifier_gradient(classifier, data.label_tensor())(x, t)
    assert gradient.shape == x.shape
    assert gradient.abs().sum() > 0


def test_a_class_conditional_model_learns_and_paints_its_classes(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, task="adm", batch=16, steps=60, optimizer=FAST)
    trainer = Trainer(config, tmp_path)
    losses = [trainer.step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    samples = trainer.task.samples(trainer.state.ema.state_dict())
    assert samples is not None
    assert samples.shape == (4, 3, SIZE, SIZE)
    again = trainer.task.samples(trainer.state.ema.state_dict())
    assert again is not None
    assert torch.equal(samples, again)
    trainer.save()
    assert load_model(tmp_path / "model.safetensors").config.unet.classes == CLASSES


def test_the_label_matters(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, task="adm", optimizer=FAST), tmp_path)
    for _ in range(3):
        trainer.step()
    model, x = trainer.model.eval(), torch.zeros(CLASSES, 3, SIZE, SIZE)
    out = model(x, torch.full((CLASSES,), 5), labels=torch.arange(CLASSES))
    assert not torch.allclose(out[0], out[1], atol=1e-5)


def test_an_unconditional_model_with_a_fixed_variance_learns(pictures: Path, tmp_path: Path) -> None:
    unet = tiny_unet(text=None, out_channels=3)
    model = ModelConfig(unet=unet, steps=20, variance="fixed_large")
    trainer = Trainer(tiny_config(pictures, task="adm", model=model, steps=2), tmp_path)
    trainer.run()
    record = trainer.step()
    assert record["loss"] == record["mse"]
    assert "vlb" not in record
    assert len(list(tmp_path.glob("samples/*.png"))) == 1


@pytest.mark.parametrize("task", ["adm", "classifier"])
def test_a_resumed_run_equals_the_unbroken_run(pictures: Path, tmp_path: Path, task: str) -> None:
    config = tiny_config(pictures, task=task, steps=12)
    train(config, tmp_path / "unbroken")
    train(replace(config, steps=7), tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    ended, unbroken = Trainer(config, tmp_path / "stopped"), Trainer(config, tmp_path / "unbroken")
    assert_identical(snapshot(ended), snapshot(unbroken))
    assert log_without_speed(tmp_path / "stopped") == log_without_speed(tmp_path / "unbroken")


def test_a_checkpoint_of_another_task_says_which(pictures: Path, tmp_path: Path) -> None:
    train(tiny_config(pictures, task="adm", steps=1), tmp_path)
    with pytest.raises(ValueError, match="another config: task was 'adm' and is now 'classifier'"):
        Trainer(tiny_config(pictures, task="classifier"), tmp_path)


def test_networks_and_samples_of_another_task_are_refused_together(pictures: Path) -> None:
    classifier = tiny_config(pictures, task="classifier")
    with pytest.raises(ValueError, match=r"add \[model\]; .*leave \[classifier\] out"):
        replace(classifier, task="adm")
    with pytest.raises(ValueError, match=r"task 'classifier' draws no pictures"):
        replace(classifier, samples=SampleConfig(count=3))
    with pytest.raises(ValueError, match=r"samples\.prompts are for models with text"):
        tiny_config(pictures, task="adm", samples=SampleConfig(prompts=("cat",)))
    with pytest.raises(ValueError, match=r"samples\.count 2 is for models without text"):
        tiny_config(pictures, task="base", samples=SampleConfig(count=2))
    with pytest.raises(ValueError, match="task 'adm' is for models without text"):
        tiny_config(pictures, task="adm", model=tiny_config(pictures).model, samples=SampleConfig())
