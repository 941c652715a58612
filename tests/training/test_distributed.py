"""Several processes are one run: the same losses, checkpoints for any number of them, and clean ends."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glide_fast.models import ModelConfig
from glide_fast.training.config import OptimizerConfig, TrainConfig
from glide_fast.training.distributed import World as OurWorld
from glide_fast.training.distributed import joined
from glide_fast.training.log import read_log
from glide_fast.training.loop import Trainer, train
from tests.training.tiny import TINY_CLIP, assert_identical, snapshot, tiny_config, tiny_unet
from tests.training.worlds import World, train_together

STEPS = 12


def config_for(pictures: Path, **changes: Any) -> TrainConfig:
    """A run without dropout, whose masks differ between processes."""
    network = {"model": ModelConfig(unet=tiny_unet(dropout=0.0), steps=20)}
    if changes.get("task") == "clip":
        network = {}
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=4, ema=0.9)
    values = {"batch": 8, "steps": STEPS, "optimizer": optimizer, "save_every": 4} | network | changes
    return tiny_config(pictures, **values)


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_log(directory / "log.jsonl")]


def weights(config: TrainConfig, directory: Path) -> dict[str, torch.Tensor]:
    """The state that a single process reads from a run's checkpoint."""
    trainer = Trainer(config, directory)
    assert trainer.state.step == config.steps
    return snapshot(trainer)


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run that one process made."""
    directory = tmp_path_factory.mktemp("alone")
    train(config_for(pictures), directory)
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"sharding": "ddp"},
        {"sharding": "fsdp"},
        {"sharding": "ddp", "accumulate": 2},
        {"sharding": "fsdp", "accumulate": 2, "checkpoint_activations": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_two_processes_train_as_one(
    pictures: Path, alone: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_for(pictures, **changes)
    assert train_together(2, config, tmp_path) == []
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-3)
    assert_close(weights(config, tmp_path), weights(config_for(pictures), alone), 2e-3)
    names = {path.name for path in tmp_path.iterdir()}
    kind = "checkpoint-00000012" if changes["sharding"] == "fsdp" else "checkpoint.pt"
    assert names == {kind, "config.json", "log.jsonl", "loss.png", "model.safetensors", "samples"}


@pytest.mark.parametrize("task", ["clip", "inpaint", "upsampler", "classifier", "adm"])
def test_every_task_is_shared(pictures: Path, tmp_path: Path, task: str) -> None:
    changes: dict[str, Any] = {"task": task}
    if task != "clip":
        network = tiny_config(pictures, task=task)
        if network.model is not None:
            plain = replace(network.model, unet=replace(network.model.unet, dropout=0.0))
            changes["model"] = plain
        else:
            changes["model"] = None
    config = config_for(pictures, **changes)
    train(config, tmp_path / "one")
    assert train_together(2, replace(config, sharding="fsdp"), tmp_path / "two") == []
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


CHAINS = [
    [(2, "fsdp"), (1, "ddp"), (2, "fsdp")],
    [(1, "ddp"), (2, "fsdp"), (2, "ddp")],
    [(2, "fsdp"), (4, "fsdp"), (1, "ddp")],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"{size}{kind}" for size, kind in chain))
def test_a_checkpoint_is_resumed_by_another_number_of_processes(
    pictures: Path, alone: Path, tmp_path: Path, chain: list[tuple[int, str]]
) -> None:
    for part, (size, sharding) in enumerate(chain, start=1):
        config = config_for(pictures, sharding=sharding, steps=4 * part)
        if size == 1:
            train(config, tmp_path)
        else:
            assert train_together(size, config, tmp_path) == []
    assert_close(weights(config, tmp_path), weights(config_for(pictures), alone), 2e-3)
    assert len(list(tmp_path.glob("checkpoint*"))) == 1


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_resumed_by_as_many_it_is_the_unbroken_run(pictures: Path, tmp_path: Path, sharding: str) -> None:
    config = config_for(pictures, sharding=sharding, timesteps="loss_second_moment")
    assert train_together(2, config, tmp_path / "unbroken") == []
    assert train_together(2, replace(config, steps=5), tmp_path / "stopped") == []
    assert train_together(2, config, tmp_path / "stopped") == []
    assert_identical(weights(config, tmp_path / "stopped"), weights(config, tmp_path / "unbroken"))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")


def slowly(config: TrainConfig, directory: Path, prepare: Callable[[Trainer], None] | None = None) -> None:
    """As ``train``, a step at a time, so that something can happen between them."""
    with joined() as world:
        trainer = Trainer(config, directory, None, world)
        take_step = trainer.step

        def step() -> dict[str, float]:
            time.sleep(0.05)
            return take_step()

        trainer.step = step  # type: ignore[method-assign]
        if prepare is not None:
            prepare(trainer)
        trainer.run()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_others_and_nothing_is_lost(
    pictures: Path, tmp_path: Path, sharding: str
) -> None:
    config = config_for(pictures, sharding=sharding)
    world = World(2, slowly, config, tmp_path / "killed")
    until(lambda: bool(list((tmp_path / "killed").glob("checkpoint*"))))
    time.sleep(0.15)
    assert world.processes[1].pid is not None
    os.kill(world.processes[1].pid, signal.SIGKILL)
    (message,) = world.wait()
    assert message.startswith("LostProcessError: process 0 of 2 lost the others, of which one has ended")
    assert "start the run again" in message
    assert train_together(2, config, tmp_path / "killed") == []
    assert train_together(2, config, tmp_path / "unbroken") == []
    assert_identical(weights(config, tmp_path / "killed"), weights(config, tmp_path / "unbroken"))


def test_a_signal_to_one_process_ends_all_after_the_step_at_hand(pictures: Path, tmp_path: Path) -> None:
    config = config_for(pictures, steps=1000, save_every=1000)
    world = World(2, slowly, config, tmp_path)
    until((tmp_path / "log.jsonl").exists)
    time.sleep(0.5)
    assert world.processes[1].pid is not None
    os.kill(world.processes[1].pid, signal.SIGTERM)
    assert world.wait() == []
    assert 0 < Trainer(config, tmp_path).state.step < 1000


def with_full_disk(trainer: Trainer) -> None:
    """From step 5 on, the last process can write no file of more than a few kilobytes."""
    take_step = trainer.step

    def step() -> dict[str, float]:
        if trainer.state.step == 5 and trainer.world.rank == trainer.world.size - 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return take_step()

    trainer.step = step  # type: ignore[method-assign]


def limited(config: TrainConfig, directory: Path) -> None:
    slowly(config, directory, with_full_disk)


@pytest.mark.parametrize(("size", "sharding"), [(1, "ddp"), (2, "fsdp")])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    pictures: Path, tmp_path: Path, size: int, sharding: str
) -> None:
    config = config_for(pictures, sharding=sharding)
    messages = World(size, limited, config, tmp_path).wait()
    assert len(messages) == size
    assert all("Error: " in message and "File too large" in message for message in messages), messages
    trainer = Trainer(config, tmp_path)
    assert trainer.state.step == 4
    assert train_together(2, config, tmp_path) == []
    assert Trainer(config, tmp_path).state.step == STEPS


def poisoned(trainer: Trainer) -> None:
    make_batch = trainer.task.batch

    def batch(*inputs: Any) -> Any:
        found = make_batch(*inputs)
        if trainer.state.step == 5 and trainer.world.rank == 1:
            found.x_start[0, 0, 0, 0] = math.nan
        return found

    trainer.task.batch = batch  # type: ignore[method-assign]


def poison(config: TrainConfig, directory: Path) -> None:
    slowly(config, directory, poisoned)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_number_that_is_not_finite_anywhere_stops_everybody_with_its_cause(
    pictures: Path, tmp_path: Path, sharding: str
) -> None:
    config = config_for(pictures, sharding=sharding)
    messages = World(2, poison, config, tmp_path).wait()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("NonFiniteLossError: ")
        assert "process 1" in message
        assert "at step 5, timesteps " in message
        assert "first module with a non-finite output is input_blocks.0.0" in message
    assert Trainer(config, tmp_path).state.step == 4


@pytest.mark.parametrize(
    ("batch", "accumulate", "size", "nearest"),
    [(8, 1, 3, 4), (8, 2, 3, 4), (30, 1, 4, 5), (7, 1, 2, 1), (6, 1, 64, 6)],
)
def test_a_batch_that_cannot_be_shared_names_the_nearest_number_that_can(
    batch: int, accumulate: int, size: int, nearest: int
) -> None:
    with pytest.raises(
        ValueError, match=f"by {size} processes; the nearest number .* that can is {nearest}$"
    ):
        OurWorld(size=size).check_batch(batch, accumulate)


def test_a_broken_shard_of_a_checkpoint_is_named(pictures: Path, tmp_path: Path) -> None:
    config = config_for(pictures, sharding="fsdp", steps=4)
    assert train_together(2, config, tmp_path) == []
    shard = next(tmp_path.glob("checkpoint-*/__1_0.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint-00000004 is not a readable checkpoint"):
        Trainer(config, tmp_path)


def test_a_sharded_checkpoint_of_another_config_is_refused(pictures: Path, tmp_path: Path) -> None:
    assert train_together(2, config_for(pictures, sharding="fsdp", steps=4), tmp_path) == []
    with pytest.raises(ValueError, match="another config: seed was 0 and is now 3"):
        Trainer(config_for(pictures, seed=3), tmp_path)
    with pytest.raises(ValueError, match="another config: task was 'base' and is now 'clip'"):
        Trainer(config_for(pictures, task="clip", clip=TINY_CLIP), tmp_path)


def test_an_unfinished_checkpoint_does_not_count(pictures: Path, tmp_path: Path) -> None:
    config = config_for(pictures, sharding="fsdp", steps=4)
    assert train_together(2, config, tmp_path) == []
    unfinished = tmp_path / "checkpoint-00000009"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    assert Trainer(config, tmp_path).state.step == 4
    assert train_together(2, replace(config, steps=6), tmp_path) == []
    assert not unfinished.exists()
