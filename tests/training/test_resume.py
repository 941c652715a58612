"""A run that was stopped and resumed is the unbroken run; what cannot be resumed is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glide_fast.models import load_model
from glide_fast.training.config import OptimizerConfig, TrainConfig
from glide_fast.training.loop import Trainer, train
from tests.training.tiny import assert_identical, finished, log_without_speed, snapshot, tiny_config

KINDS = [
    (task, timesteps) for task in ("base", "upsampler") for timesteps in ("uniform", "loss_second_moment")
]


def stop_after(trainer: Trainer, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process the signal during the given step of the run."""
    take_step = trainer.step

    def step_with_signal() -> dict[str, float]:
        if trainer.state.step == step - 1:
            os.kill(os.getpid(), number)
        return take_step()

    trainer.step = step_with_signal  # type: ignore[method-assign]


@pytest.mark.parametrize(("task", "timesteps"), KINDS)
def test_a_resumed_run_equals_the_unbroken_run(
    pictures: Path, tmp_path: Path, task: str, timesteps: str
) -> None:
    config = tiny_config(pictures, task=task, timesteps=timesteps)
    unbroken = Trainer(config, tmp_path / "unbroken")
    unbroken.run()

    stopped = Trainer(config, tmp_path / "stopped")
    stop_after(stopped, 7)
    stopped.run()
    assert stopped.state.step == 7
    resumed = Trainer(config, tmp_path / "stopped")
    assert resumed.state.step == 7
    resumed.run()

    assert resumed.state.step == unbroken.state.step == 12
    assert_identical(snapshot(resumed), snapshot(unbroken))
    assert log_without_speed(tmp_path / "stopped") == log_without_speed(tmp_path / "unbroken")
    assert finished(tmp_path / "stopped") == finished(tmp_path / "unbroken")


def test_the_learned_timestep_sampler_is_resumed_with_its_weights(pictures: Path, tmp_path: Path) -> None:
    model = replace(tiny_config(pictures).model, steps=3)
    config = tiny_config(pictures, model=model, timesteps="loss_second_moment", batch=10, steps=10)
    unbroken = Trainer(config, tmp_path / "unbroken")
    unbroken.run()
    weights = unbroken.state.timesteps.state_dict()
    assert weights["seen"].tolist() == [10, 10, 10]

    stopped = Trainer(config, tmp_path / "stopped")
    stop_after(stopped, 8)
    stopped.run()
    resumed = Trainer(config, tmp_path / "stopped")
    resumed.run()
    assert_identical(snapshot(resumed), snapshot(unbroken))


def test_the_tensors_compared_include_dropout(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, steps=2)
    unet = replace(config.model.unet, dropout=0.0)
    plain = replace(config, model=replace(config.model, unet=unet))
    with_dropout, without = Trainer(config, tmp_path / "a"), Trainer(plain, tmp_path / "b")
    with_dropout.run()
    without.run()
    assert not torch.equal(
        snapshot(with_dropout)["model.out.2.weight"], snapshot(without)["model.out.2.weight"]
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_at_hand_and_saves(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer = Trainer(tiny_config(pictures), tmp_path)
    stop_after(trainer, 3, number)
    trainer.run()
    assert trainer.state.step == 3
    assert Trainer(tiny_config(pictures), tmp_path).state.step == 3
    load_model(tmp_path / "model.safetensors")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def _usual_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_usual_interrupt")
def test_a_second_signal_ends_the_run_at_once(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    take_step = trainer.step

    def step_with_signals() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return take_step()

    trainer.step = step_with_signals  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.state.saved(tmp_path) is None


@pytest.fixture(scope="module")
def saved(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 4 steps."""
    directory = tmp_path_factory.mktemp("saved")
    train(tiny_config(pictures, steps=4), directory)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of that directory to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbled(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def with_one_wrong_bit(path: Path) -> None:
    weight = torch.load(path, weights_only=True)["model"]["token_embedding.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 0x40
    path.write_bytes(content)


def of_another_program(path: Path) -> None:
    torch.save({"model": {}}, path)


def a_bare_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    "damage", [truncated, emptied, garbled, with_one_wrong_bit, of_another_program, a_bare_tensor]
)
def test_a_broken_checkpoint_is_refused_by_name(
    pictures: Path, run: Path, damage: Callable[[Path], None]
) -> None:
    damage(run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not (a readable|the) checkpoint"):
        Trainer(tiny_config(pictures), run)


def test_a_refused_checkpoint_and_its_log_stay_as_they_were(pictures: Path, run: Path) -> None:
    truncated(run / "checkpoint.pt")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Trainer(tiny_config(pictures), run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_checkpoint_of_another_shape_names_the_first_entry(pictures: Path, run: Path) -> None:
    values = torch.load(run / "checkpoint.pt", weights_only=True)
    del values["ema"]["positional_embedding"]
    torch.save(values, run / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"average.*positional_embedding.*is missing"):
        Trainer(tiny_config(pictures), run)


def test_a_temporary_file_left_by_a_kill_does_no_harm(pictures: Path, run: Path) -> None:
    for name in (".checkpoint.pt.x1.pt", ".log.jsonl.x2.jsonl", ".model.safetensors.x3.safetensors"):
        (run / name).write_bytes(b"half a fi")
    trainer = Trainer(tiny_config(pictures, steps=5), run)
    assert trainer.state.step == 4
    trainer.run()
    assert trainer.state.step == 5


def test_a_checkpoint_without_unlogged_steps_is_resumed(pictures: Path, run: Path) -> None:
    values = torch.load(run / "checkpoint.pt", weights_only=True)
    del values["unlogged"]
    torch.save(values, run / "checkpoint.pt")
    trainer = Trainer(tiny_config(pictures), run)
    assert (trainer.state.step, trainer.state.unlogged) == (4, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed was 0 and is now 5"),
        ({"batch": 8}, "batch was 4 and is now 8"),
        ({"caption_drop": 0.5, "seed": 5}, r"caption_drop was 0\.2 and is now 0\.5"),
        ({"optimizer": OptimizerConfig(clip=2.0)}, r"optimizer\.clip was 1\.0 and is now 2\.0"),
    ],
)
def test_another_config_names_the_first_field_that_differs(
    pictures: Path, run: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"another config: {message}; use another run directory"):
        Trainer(tiny_config(pictures, **changes), run)


def test_a_nested_field_that_differs_is_named_with_its_path(pictures: Path, run: Path) -> None:
    config = tiny_config(pictures)
    unet = replace(config.model.unet, dropout=0.3)
    with pytest.raises(ValueError, match=r"model\.unet\.dropout was 0\.1 and is now 0\.3"):
        Trainer(replace(config, model=replace(config.model, unet=unet)), run)
    optimizer = replace(config.optimizer, ema=0.5, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"optimizer\.ema was 0\.99 and is now 0\.5"):
        Trainer(replace(config, optimizer=optimizer), run)


def free_changes(config: TrainConfig) -> TrainConfig:
    optimizer = replace(config.optimizer, learning_rate=3e-3, decay_steps=2)
    samples = replace(config.samples, prompts=("cat",), every=3)
    return replace(config, steps=6, save_every=2, weighting="v", optimizer=optimizer, samples=samples)


def test_length_learning_rate_weighting_saving_and_samples_may_change(pictures: Path, run: Path) -> None:
    config = free_changes(tiny_config(pictures, steps=4))
    trainer = Trainer(config, run)
    trainer.run()
    assert trainer.state.step == 6
    assert json.loads((run / "config.json").read_text())["optimizer"]["learning_rate"] == 3e-3
    rates = {group["lr"] for group in trainer.state.optimizer.param_groups}
    assert rates == {3e-3 * 1 / 2}  # the last of two decaying steps


def test_the_log_forgets_what_came_after_the_checkpoint(pictures: Path, run: Path) -> None:
    lines = [{"step": step, "mse": 1.0, "vlb": 1.0} for step in (2, 4, 6, 8)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"step": 10, "ms')
    Trainer(tiny_config(pictures), run)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [2, 4]


def test_a_finished_run_is_left_alone(pictures: Path, run: Path) -> None:
    before = (run / "checkpoint.pt").read_bytes()
    train(tiny_config(pictures, steps=4), run)
    assert (run / "checkpoint.pt").read_bytes() == before
