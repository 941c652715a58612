"""Half precision: float32 weights under 16-bit activations, the scaled loss, and how it fails."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glide_fast.ops.composed_convolution import composed, composed_backward
from glide_fast.ops.norm_convolution import BACKWARD, FORWARD
from glide_fast.training.config import LARGEST_SCALE, OptimizerConfig, ScalingConfig, TrainConfig
from glide_fast.training.diagnose import NonFiniteLossError
from glide_fast.training.distributed import joined
from glide_fast.training.log import NO_LOSSES
from glide_fast.training.loop import Trainer
from glide_fast.training.optimizer import OneLaunchAdamW, clip_gradients, new_optimizer
from glide_fast.training.scaling import LossScale
from tests.training.tiny import TASKS, assert_identical, awake, log_without_speed, snapshot, tiny_config
from tests.training.worlds import World

HALF = {"compute_dtype": "float16"}
EAGER = ScalingConfig(initial=LARGEST_SCALE)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_in_float16_what_it_learns_in_float32(
    pictures: Path, tmp_path: Path, task: str
) -> None:
    optimizer = OptimizerConfig(clip=1e9, warmup_steps=4, ema=0.99)
    records, gradients = {}, {}
    for dtype in ("float32", "float16"):
        config = tiny_config(pictures, task=task, compute_dtype=dtype, optimizer=optimizer)
        trainer = awake(Trainer(config, tmp_path / dtype))
        records[dtype] = trainer.step()
        gradients[dtype] = [each.grad for each in trainer.model.parameters() if each.grad is not None]
        tensors = [*trainer.model.parameters(), *trainer.state.ema.state_dict().values()]
        assert {tensor.dtype for tensor in (*tensors, *gradients[dtype])} == {torch.float32}
        for moments in trainer.state.optimizer.state.values():
            assert {moment.dtype for moment in moments.values()} == {torch.float32}
    assert 2**12 <= records["float16"].pop("loss_scale") <= 65536
    assert records["float16"] != records["float32"]
    assert records["float16"]["loss"] == pytest.approx(records["float32"]["loss"], rel=5e-3)
    flat = {name: torch.cat([each.flatten() for each in some]) for name, some in gradients.items()}
    difference = (flat["float16"] - flat["float32"]).norm() / flat["float32"].norm()
    assert difference < 0.01


def test_small_gradients_vanish_without_a_scale(pictures: Path, tmp_path: Path) -> None:
    """The reason for it all: gradients as small as a long training makes them are nothing in float16."""

    def gradient(name: str, **changes: Any) -> Tensor:
        config = tiny_config(pictures, optimizer=OptimizerConfig(clip=1e9), **changes)
        trainer = awake(Trainer(config, tmp_path / name))
        slopes = trainer._slopes
        trainer._slopes = lambda weights: slopes(weights) / 1e5  # type: ignore[method-assign]
        trainer.step()
        found = trainer.model.get_parameter("input_blocks.0.0.weight").grad
        assert found is not None
        return found

    expected = gradient("float32")
    for initial, low, high in ((65536.0, 0.0, 0.01), (1.0, 0.3, 2.0)):
        found = gradient(f"{initial}", **HALF, scaling=ScalingConfig(initial=initial))
        assert low < (found - expected).norm() / expected.norm() < high


def test_a_step_whose_gradients_overflow_is_the_step_at_the_scale_where_they_do_not(
    pictures: Path, tmp_path: Path
) -> None:
    config = tiny_config(pictures, **HALF, scaling=EAGER)
    halved = awake(Trainer(config, tmp_path / "halved"))
    records = [halved.step() for _ in range(2)]
    assert records[0]["loss_scale"] < LARGEST_SCALE
    assert halved.state.scale.value == records[1]["loss_scale"]
    assert halved.state.scale.halvings == 0
    scaling = ScalingConfig(initial=records[0]["loss_scale"])
    at_once = awake(Trainer(replace(config, scaling=scaling), tmp_path / "at_once"))
    assert [at_once.step() for _ in range(2)] == records
    assert_identical(snapshot(halved), snapshot(at_once))


def test_the_scale_doubles_after_enough_steps_and_no_further_than_it_may() -> None:
    scale = LossScale(ScalingConfig(initial=LARGEST_SCALE / 4, growth_interval=3, most_halvings=2))
    values = []
    for _ in range(12):
        scale.succeed()
        values.append(scale.value / LARGEST_SCALE)
    assert values == [1 / 4] * 2 + [1 / 2] * 3 + [1.0] * 7
    scale.succeed()
    assert scale.halve()
    assert (scale.value, scale.since, scale.halvings) == (LARGEST_SCALE / 2, 0, 1)
    assert scale.halve()
    assert not scale.halve()
    scale.succeed()
    assert scale.halve()


def test_without_float16_nothing_is_scaled(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, compute_dtype="bfloat16"), tmp_path)
    assert "loss_scale" not in trainer.step()
    scale = trainer.state.scale
    assert (scale.value, scale.halve(), scale.state_dict(), str(scale)) == (1.0, False, {}, "")


def test_a_resumed_run_goes_on_with_the_scale_and_its_count(pictures: Path, tmp_path: Path) -> None:
    scaling = ScalingConfig(initial=256.0, growth_interval=3)
    config = tiny_config(pictures, **HALF, scaling=scaling, steps=8)
    unbroken = Trainer(config, tmp_path / "unbroken")
    unbroken.run()
    stopped = Trainer(config, tmp_path / "stopped")
    for _ in range(5):
        stopped.state.unlogged.append(stopped.step())
    stopped.save()
    resumed = Trainer(config, tmp_path / "stopped")
    assert resumed.state.scale.state_dict() == {"value": 512.0, "since": 2}
    resumed.run()
    assert (
        resumed.state.scale.state_dict() == unbroken.state.scale.state_dict() == {"value": 1024.0, "since": 2}
    )
    assert_identical(snapshot(resumed), snapshot(unbroken))
    assert log_without_speed(tmp_path / "stopped") == log_without_speed(tmp_path / "unbroken")
    assert "loss_scale" in NO_LOSSES


def test_a_run_may_change_to_float16_and_back(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures, compute_dtype="bfloat16")
    for changes in ({}, {**HALF, "scaling": ScalingConfig(initial=128.0)}, {}):
        trainer = Trainer(replace(config, **changes), tmp_path)
        assert trainer.step().get("loss_scale") == (128.0 if changes else None)
        trainer.save()
    values = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del values["scale"]  # as older checkpoints have none
    torch.save(values, tmp_path / "checkpoint.pt")
    assert Trainer(replace(config, **HALF), tmp_path).state.scale.value == 65536


def overflowing(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_repeated_overflows_the_run_stops_and_names_the_module(
    pictures: Path, tmp_path: Path, accumulate: int
) -> None:
    config = tiny_config(pictures, **HALF, scaling=ScalingConfig(most_halvings=5), accumulate=accumulate)
    trainer = awake(Trainer(config, tmp_path))
    first = [trainer.step() for _ in range(2)][-1]["loss_scale"]
    trainer.model.get_submodule("middle_block.0.in_layers.2").register_forward_hook(overflowing)
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.step()
    message = str(caught.value)
    told = rf"at step 2, timesteps \d+ \.\. \d+, the loss scaled by {first / 32:g} after 5 halvings in a row:"
    assert re.search(told, message)
    assert "the first module with a non-finite gradient is middle_block.0.in_layers.2;" in message
    assert "the first parameter with a non-finite gradient is " in message
    assert "every module's output is finite" in message
    assert "the last checkpoint is not there yet" in message
    assert_identical(snapshot(trainer), before)


def test_a_loss_that_is_not_finite_stops_the_run_at_once(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, **HALF), tmp_path)
    name = "middle_block.0.in_layers.2.weight"
    with torch.no_grad():
        trainer.model.get_parameter(name)[0, 0, 0, 0] = 1e6  # infinite in float16
    with pytest.raises(NonFiniteLossError, match="scaled by 65536 after 0 halvings") as caught:
        trainer.step()
    assert "the first module with a non-finite output is middle_block.0.in_layers.2;" in str(caught.value)
    assert trainer.state.scale.value == 65536


def train_with_an_overflow(config: TrainConfig, directory: Path) -> None:
    """What each process does; only the second has the fault."""
    with joined() as world:
        trainer = Trainer(config, directory, world=world)
        if world.rank == 1:
            trainer.model.get_submodule("out.2").register_forward_hook(overflowing)
        trainer.run()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_an_overflow_anywhere_halves_everybodys_scale_and_names_its_process(
    pictures: Path, tmp_path: Path, sharding: str
) -> None:
    scaling = ScalingConfig(most_halvings=2)
    config = tiny_config(pictures, **HALF, scaling=scaling, sharding=sharding, steps=2)
    messages = World(2, train_with_an_overflow, config, tmp_path).wait()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("NonFiniteLossError: process 1: ")
        assert "the loss scaled by 16384 after 2 halvings in a row" in message
        assert "the first module with a non-finite gradient is out.2;" in message


@pytest.mark.parametrize("make", [new_optimizer, OneLaunchAdamW])
@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_scaled_gradients_are_clipped_as_they_are_meant(make: Any, limit: float) -> None:
    stepped = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = make(model, OptimizerConfig(learning_rate=0.1))
        torch.autograd.backward(model(torch.randn(4, 5)).square().sum() * scale)
        norm, factor = clip_gradients(optimizer, model, limit, scale)
        for each in model.parameters():
            assert each.grad is not None
            each.grad.mul_(1.0 if factor is None else factor)
        stepped.append([norm, *(each.grad for each in model.parameters() if each.grad is not None)])
    for plain, scaled in zip(*stepped, strict=True):
        torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("task", ["base", "clip"])
def test_activations_that_are_computed_again_change_no_bit(
    pictures: Path, tmp_path: Path, task: str, dtype: str
) -> None:
    config = tiny_config(pictures, task=task, compute_dtype=dtype)
    runs = [
        awake(Trainer(replace(config, checkpoint_activations=again), tmp_path / f"{again}"))
        for again in (False, True)
    ]
    assert [run.step() for run in runs[:1] * 2] == [run.step() for run in runs[1:] * 2]
    assert_identical(snapshot(runs[0]), snapshot(runs[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": EAGER}, r"compute_dtype 'float32' needs no scaled loss; leave \[scaling\] out"),
        ({**HALF, "scaling": ScalingConfig(initial=1000.0)}, r"scaling\.initial 1000 must be a power of two"),
        ({**HALF, "scaling": ScalingConfig(initial=0.5)}, r"scaling\.initial 0\.5 must be .* 1 to 1\.67"),
        ({**HALF, "scaling": ScalingConfig(initial=math.nan)}, r"scaling\.initial nan must be a power"),
        ({**HALF, "scaling": ScalingConfig(initial=2.0**25)}, r"scaling\.initial 3\.35\S+ must be a power"),
        ({**HALF, "scaling": ScalingConfig(growth_interval=0)}, r"scaling\.growth_interval 0 must be"),
        ({**HALF, "scaling": ScalingConfig(most_halvings=0)}, r"scaling\.most_halvings 0 must be at least 1"),
    ],
)
def test_scales_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("pictures"), **changes)


class Layouts(TorchDispatchMode):
    """Serves our convolutions as CUDA does, from parts, and notes maps whose channels are not innermost.

    The pictures themselves, of up to six channels, are NCHW: their noise is drawn so.
    """

    WATCHED = ("norm_convolution", "group_norm", "convolution")
    PARTS = ((FORWARD, composed), (BACKWARD, composed_backward))

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.wrong = 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.removesuffix("_backward") in self.WATCHED:
            for tensor in [each for each in args if isinstance(each, Tensor) and each.dim() == 4]:
                self.maps += 1
                weight = tensor.shape[2:] in ((1, 1), (3, 3))
                dense = tensor.is_contiguous(memory_format=torch.channels_last)
                # The gradient of one of two maps side by side is a slice of the joined map's.
                if not (dense or tensor.shape[1] <= 6 or (tensor.stride(1) == 1 and not weight)):
                    self.wrong.append(f"{name} {tuple(tensor.shape)} {tensor.stride()}")
        parts = dict(self.PARTS).get(func)
        if parts is None:
            return func(*args, **(kwargs or {}))
        with self:
            return parts(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["base", "upsampler", "classifier"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_and_weights_are_channels_last_from_the_first_layer_to_the_last_and_back(
    pictures: Path, tmp_path: Path, task: str, dtype: str
) -> None:
    trainer = awake(Trainer(tiny_config(pictures, task=task, compute_dtype=dtype), tmp_path))
    trainer.step()
    take, layouts = trainer._gradients, Layouts()

    def watched(*arguments: Any) -> dict[str, Tensor]:
        with layouts:
            return take(*arguments)

    trainer._gradients = watched  # type: ignore[method-assign]
    trainer.step()
    assert layouts.maps > 80
    assert layouts.wrong == []
    for name, parameter in trainer.model.named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    average = trainer.state.ema.state_dict()["input_blocks.0.0.weight"]
    assert average.is_contiguous(memory_format=torch.channels_last)


def test_the_trainer_takes_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined() as world:
        assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with joined() as world:
        assert world.device == torch.device("cuda")
