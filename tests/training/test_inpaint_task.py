"""Inpainting: exactly the base model at the start, a mask for each picture, what it may start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.data.folder import load_folder
from glide_fast.data.masks import MaskConfig
from glide_fast.models import MaskedImage, load_model
from glide_fast.training.config import OptimizerConfig
from glide_fast.training.draws import Draws
from glide_fast.training.loop import Trainer, train
from glide_fast.training.tasks import InpaintTask
from tests.training.tiny import SIZE, assert_identical, log_without_speed, snapshot, tiny_config

PAIRS = [("base", "inpaint"), ("upsampler", "inpaint_upsampler")]
B = 6


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[1])
def pair(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A trained model without masks, and the task of its fine-tuning."""
    plain, inpaint = request.param
    directory = tmp_path_factory.mktemp(plain)
    train(tiny_config(pictures, task=plain, steps=4), directory)
    return directory / "model.safetensors", inpaint


def test_at_the_start_it_is_the_model_it_came_from(pair: tuple, pictures: Path, tmp_path: Path) -> None:
    file, task = pair
    base, _ = load_model(file)
    trainer = Trainer(tiny_config(pictures, task=task), tmp_path, file)
    model = trainer.model.eval()
    draws = Draws.of_step(0, 0, B, slice(None))
    batch = trainer.task.batch(load_folder(pictures, SIZE).select(range(B)), draws)
    x, t = draws.normal(3, SIZE, SIZE), torch.arange(B)
    told = {"tokens": batch.tokens, "mask": batch.mask, "low_res": batch.low_res}
    assert batch.known is not None
    with torch.no_grad():
        expected = base(x, t, **told)
        for known in (MaskedImage(batch.x_start, batch.known), None):
            torch.testing.assert_close(model(x, t, **told, known=known), expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_the_new_channels_learn(pair: tuple, pictures: Path, tmp_path: Path) -> None:
    file, task = pair
    trainer = Trainer(tiny_config(pictures, task=task), tmp_path, file)
    stem = trainer.model.get_parameter("input_blocks.0.0.weight")
    assert not stem[:, 3:7].any()
    assert stem[:, :3].any()
    trainer.step()
    assert stem.grad is not None
    assert (stem.grad[:, 3:7].abs().amax((0, 2, 3)) > 0).all()
    assert stem[:, 3:7].any()


def test_each_picture_has_a_mask_of_its_own_and_its_clean_pixels(pictures: Path) -> None:
    task = InpaintTask(tiny_config(pictures, task="inpaint"), load_folder(pictures, SIZE))
    chosen = load_folder(pictures, SIZE).select([0] * 200)
    batch = task.batch(chosen, Draws.of_step(0, 0, 200, slice(None)))
    assert batch.known is not None
    assert batch.known.shape == (200, 1, SIZE, SIZE)
    assert set(batch.known.unique().tolist()) == {0.0, 1.0}
    assert len({tuple(mask.flatten().tolist()) for mask in batch.known}) > 100
    known = task.conditions(batch)["known"]
    assert torch.equal(known.image, batch.x_start)
    assert torch.equal(batch.part(slice(3, 9)).known, batch.known[3:9])  # type: ignore[arg-type]


def test_it_learns_to_use_what_it_sees(pictures: Path, tmp_path: Path) -> None:
    losses = {}
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema=0.9)
    for name, masks in {
        "half": MaskConfig(nothing_known=0, boxes=0),
        "nothing": MaskConfig(nothing_known=1, boxes=0),
    }.items():
        config = tiny_config(pictures, task="inpaint", batch=16, steps=150, masks=masks, optimizer=optimizer)
        model = replace(config.model, prediction="x_start", unet=replace(config.model.unet, dropout=0.0))
        trainer = Trainer(replace(config, model=model), tmp_path / name)
        losses[name] = np.mean([trainer.step()["mse"] for _ in range(150)][-40:])
    assert losses["half"] < 0.8 * losses["nothing"]


def test_an_inpainting_model_goes_on_from_its_own_file_too(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, task="inpaint", steps=2)
    train(config, tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    trainer = Trainer(config, tmp_path / "second", file)
    weights = load_model(file).network.state_dict()
    assert_identical(trainer.model.state_dict(), weights)


def test_a_resumed_run_equals_the_unbroken_run(pair: tuple, pictures: Path, tmp_path: Path) -> None:
    file, task = pair
    config = tiny_config(pictures, task=task, steps=12)
    train(config, tmp_path / "unbroken", file)
    train(replace(config, steps=7), tmp_path / "stopped", file)
    train(config, tmp_path / "stopped", file)
    ended, unbroken = Trainer(config, tmp_path / "stopped"), Trainer(config, tmp_path / "unbroken")
    assert_identical(snapshot(ended), snapshot(unbroken))
    assert log_without_speed(tmp_path / "stopped") == log_without_speed(tmp_path / "unbroken")


def test_a_base_config_that_inpaints_is_refused(pictures: Path) -> None:
    config = tiny_config(pictures, task="inpaint")
    with pytest.raises(ValueError, match=r"task 'base' and model\.unet\.inpaint = True do not fit"):
        tiny_config(pictures, task="base", model=config.model)
    plain = tiny_config(pictures, task="base")
    with pytest.raises(ValueError, match=r"task 'inpaint' and model\.unet\.inpaint = False do not fit"):
        tiny_config(pictures, task="inpaint", model=plain.model)


def test_a_model_of_another_shape_or_kind_is_refused_as_a_start(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, task="base", steps=1)
    train(config, tmp_path / "base")
    wider = replace(
        config.model, unet=replace(config.model.unet, dropout=0.0, channel_mult=(2,), inpaint=True)
    )
    with pytest.raises(
        ValueError, match=r"is another model: model\.unet\.channel_mult was \[1\.0\] and is now \[2"
    ):
        Trainer(
            tiny_config(pictures, task="inpaint", model=wider),
            tmp_path / "a",
            tmp_path / "base" / "model.safetensors",
        )
    train(tiny_config(pictures, task="clip", steps=1), tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    with pytest.raises(ValueError, match="holds a noisy_clip, and task 'inpaint' trains a diffusion"):
        Trainer(tiny_config(pictures, task="inpaint"), tmp_path / "b", file)
    train(tiny_config(pictures, task="inpaint", steps=1), tmp_path / "c")
    with pytest.raises(ValueError, match=r"is another model: model\.unet\.inpaint was True and is now False"):
        Trainer(config, tmp_path / "d", tmp_path / "c" / "model.safetensors")
