"""What a run leaves in its directory: config, log, curve, samples, checkpoint and model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glide_fast.config import from_json
from glide_fast.data.images import load_image
from glide_fast.models import load_model
from glide_fast.training.config import OptimizerConfig, SampleConfig, TrainConfig
from glide_fast.training.log import RunLog, plot_losses, read_log
from glide_fast.training.loop import Trainer, train
from tests.training.tiny import SIZE, tiny_config

FIELDS = ["step", "loss", "mse", "vlb", "grad_norm", "images_per_second"]


def run_config(pictures: Path) -> TrainConfig:
    samples = SampleConfig(prompts=("sun", "cat", "moon"), every=8, steps=2)
    return tiny_config(pictures, steps=21, save_every=6, samples=samples)


@pytest.fixture(scope="module")
def directory(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of 21 steps."""
    path = tmp_path_factory.mktemp("runs") / "a" / "b"
    train(run_config(pictures), path)
    return path


def test_the_directory_holds_the_files_of_a_run_and_nothing_else(directory: Path) -> None:
    files = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    samples = [f"samples/step-{step:06d}.png" for step in (8, 16, 21)]
    names = ["checkpoint.pt", "config.json", "log.jsonl", "loss.png", "model.safetensors"]
    assert files == names + samples


def test_the_config_is_the_one_of_the_run(pictures: Path, directory: Path) -> None:
    text = (directory / "config.json").read_text(encoding="utf-8")
    assert from_json(TrainConfig, text, "config.json") == run_config(pictures)


def test_every_tenth_step_is_logged_as_json_with_finite_numbers(directory: Path) -> None:
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20]
    for record in records:
        assert list(record) == FIELDS
        assert all(math.isfinite(value) for value in record.values())
        assert record["loss"] == pytest.approx(record["mse"] + record["vlb"], abs=2e-6)
        assert record["images_per_second"] > 0


def test_a_log_line_is_the_mean_over_its_steps(pictures: Path, tmp_path: Path, directory: Path) -> None:
    trainer = Trainer(run_config(pictures), tmp_path)
    steps = [trainer.step() for _ in range(20)]
    for record, part in zip(read_log(directory / "log.jsonl"), (steps[:10], steps[10:]), strict=True):
        for name in ("loss", "mse", "vlb", "grad_norm"):
            assert record[name] == pytest.approx(np.mean([step[name] for step in part]), abs=1e-6)


def test_samples_are_grids_of_one_picture_a_prompt(directory: Path) -> None:
    sheet = load_image(directory / "samples" / "step-000021.png")
    assert sheet.shape == (SIZE + 4, 3 * (SIZE + 2) + 2, 3)


def test_the_loss_curve_is_a_picture(directory: Path) -> None:
    with Image.open(directory / "loss.png") as curve:
        assert curve.format == "PNG"
        assert np.asarray(curve.convert("L")).min() < 128


def test_the_model_file_is_the_average_in_float16_with_its_config(pictures: Path, directory: Path) -> None:
    config = run_config(pictures)
    model, model_config = load_model(directory / "model.safetensors")
    assert model_config == config.model
    average = Trainer(config, directory).state.ema.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name].half().float())


def test_samples_are_drawn_from_the_average(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, optimizer=OptimizerConfig(ema=0.0)), tmp_path)
    torch.manual_seed(0)
    for tensor in trainer.state.ema.state_dict().values():
        tensor.normal_(std=0.1)
    trainer.draw_samples()
    with_average = load_image(tmp_path / "samples" / "step-000000.png")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer.draw_samples()
    assert np.array_equal(load_image(tmp_path / "samples" / "step-000000.png"), with_average)
    trainer.state.ema.update(trainer.model, 0)
    trainer.draw_samples()
    assert not np.array_equal(load_image(tmp_path / "samples" / "step-000000.png"), with_average)


def test_without_prompts_no_samples_are_drawn(pictures: Path, tmp_path: Path) -> None:
    train(tiny_config(pictures, steps=1, samples=SampleConfig()), tmp_path)
    assert not (tmp_path / "samples").exists()


def test_drawing_samples_and_saving_do_not_change_the_run(pictures: Path, tmp_path: Path) -> None:
    disturbed, plain = (Trainer(tiny_config(pictures), tmp_path / name) for name in "ab")
    for _ in range(2):
        disturbed.draw_samples()
        disturbed.save()
        assert disturbed.step() == plain.step()


def test_missing_matplotlib_is_told_before_anything_is_done(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glide-fast\[train\]'"):
        train(tiny_config(pictures), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_log_resumed_at_a_step_keeps_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0)
    for step in (10, 20, 30):
        log.append({"step": step})
    RunLog(path, 20).append({"step": 21})
    assert read_log(path) == [{"step": 10}, {"step": 20}, {"step": 21}]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10}\n{"step": 2')
    assert read_log(path) == [{"step": 10}]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_curve_of_one_record_can_be_drawn(tmp_path: Path) -> None:
    plot_losses([{"step": 10, "mse": 0.5, "vlb": 0.0}], tmp_path / "loss.png")
    assert load_image(tmp_path / "loss.png").shape[2] == 3


def test_a_new_run_can_start_from_a_models_weights(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, steps=2)
    train(config, tmp_path / "first")
    model = tmp_path / "first" / "model.safetensors"
    trainer = Trainer(replace(config, seed=1), tmp_path / "second", model)
    for name, value in load_model(model).network.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)
    for name, value in trainer.state.ema.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)


def test_another_models_weights_are_refused_by_field(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, steps=1)
    train(config, tmp_path / "first")
    other = replace(config, model=replace(config.model, prediction="x_start"))
    with pytest.raises(
        ValueError, match=r"another model: model\.prediction was 'epsilon' and is now 'x_start'"
    ):
        Trainer(other, tmp_path / "second", tmp_path / "first" / "model.safetensors")
