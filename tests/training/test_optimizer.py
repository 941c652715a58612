"""The one-launch optimiser: torch's weights, moments and averages; states that either goes on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models import ModelConfig
from glide_fast.training import loop
from glide_fast.training.config import OptimizerConfig, TrainConfig
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.log import read_log
from glide_fast.training.loop import Trainer
from glide_fast.training.optimizer import OneLaunchAdamW, clip_gradients, new_optimizer, update
from tests.training.tiny import assert_identical, snapshot, tiny_config, tiny_unet
from tests.training.worlds import World

SETTINGS = OptimizerConfig(learning_rate=3e-3, weight_decay=0.05, clip=0.5, ema=0.99)
LAST = torch.channels_last
Make = Callable[[nn.Module], torch.optim.AdamW]


class Network(nn.Module):
    """A convolution, a layer that learns from the third step on, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.late = nn.Linear(5, 2)
        self.never = nn.Parameter(torch.ones(2))

    def loss(self, step: int) -> Tensor:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        y = self.convolution(x).mean((2, 3))
        return (y.square().sum() + (self.late(y).square().sum() if step >= 2 else 0)) * 3


def torchs(model: nn.Module) -> torch.optim.AdamW:
    return new_optimizer(model, SETTINGS)


def one_launch(model: nn.Module) -> torch.optim.AdamW:
    return OneLaunchAdamW(model, SETTINGS)


class Learner:
    """A network, its optimiser and its average."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        self.model = Network().to(memory_format=LAST)
        self.optimizer = make(self.model)
        self.ema = ExponentialMovingAverage(self.model, SETTINGS.ema)

    def learn(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad(set_to_none=True)
            self.model.loss(step).backward()
            _, factor = clip_gradients(self.optimizer, self.model, SETTINGS.clip)
            update(self.optimizer, self.ema, self.model, step, factor)

    def restore(self, other: Learner, path: Path) -> Learner:
        """Go on from another's state, as it comes from a file."""
        self.model.load_state_dict(other.model.state_dict())
        self.ema.load_state_dict(other.ema.state_dict())
        torch.save(other.optimizer.state_dict(), path / "optimizer.pt")
        self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
        return self


def assert_alike(mine: Learner, theirs: Learner) -> None:
    pairs = list(zip(mine.model.parameters(), theirs.model.parameters(), strict=True))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(mine.ema.average.values(), theirs.ema.average.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in pairs:
        ours, expected = mine.optimizer.state[a], theirs.optimizer.state[b]
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=2e-6, atol=2e-6)
            assert ours[name].stride() == expected[name].stride()


def test_it_learns_what_torchs_optimizer_and_the_average_learn() -> None:
    mine, theirs = Learner(one_launch), Learner(torchs)
    for learner in (mine, theirs):
        learner.learn(0, 6)
    assert_alike(mine, theirs)
    steps = [
        float(mine.optimizer.state[each]["step"]) for each in mine.model.parameters() if each.grad is not None
    ]
    assert steps == [6, 6, 4, 4]
    assert not mine.optimizer.state[mine.model.never]


@pytest.mark.parametrize(
    ("before", "after"), [(torchs, one_launch), (one_launch, torchs), (one_launch, one_launch)]
)
def test_either_goes_on_with_the_others_state(before: Make, after: Make, tmp_path: Path) -> None:
    unbroken, begun, resumed = Learner(torchs), Learner(before), Learner(after)
    unbroken.learn(0, 6)
    begun.learn(0, 4)
    resumed.restore(begun, tmp_path).learn(4, 6)
    assert_alike(resumed, unbroken)
    assert [group["fused"] for group in resumed.optimizer.state_dict()["param_groups"]] == [True]


def test_moments_of_another_layout_are_laid_out_like_their_weights(tmp_path: Path) -> None:
    begun, resumed = Learner(one_launch), Learner(one_launch)
    begun.learn(0, 2)
    for state in begun.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()
    resumed.restore(begun, tmp_path).learn(2, 3)
    begun.learn(2, 3)
    assert_alike(resumed, begun)
    weight = resumed.model.convolution.weight
    assert resumed.optimizer.state[weight]["exp_avg"].is_contiguous(memory_format=LAST)


def test_a_plain_step_is_torchs() -> None:
    mine, theirs = Learner(one_launch), Learner(torchs)
    for learner in (mine, theirs):
        learner.model.loss(0).backward()
    returned = mine.optimizer.step(lambda: 7.0)
    theirs.optimizer.step()
    assert returned == 7.0
    assert_alike(mine, theirs)


def test_without_a_gpu_it_is_torchs_own() -> None:
    assert type(new_optimizer(Network(), SETTINGS)) is torch.optim.AdamW


def test_a_run_with_it_is_resumed_exactly_and_goes_on_without_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(pictures)

    def trainer(name: str, kind: Make, steps: int) -> Trainer:
        monkeypatch.setattr(loop, "new_optimizer", lambda model, _settings: kind(model))
        made = Trainer(config, tmp_path / name)
        for _ in range(steps):
            made.step()
        made.save()
        return made

    unbroken = trainer("unbroken", one_launch, 4)
    trainer("stopped", one_launch, 2)
    resumed = trainer("stopped", one_launch, 2)
    assert_identical(snapshot(resumed), snapshot(unbroken))
    other = trainer("other", torchs, 2)
    assert isinstance(other.state.optimizer, torch.optim.AdamW)
    changed = trainer("other", one_launch, 2)
    mine, expected = (
        torch.cat([each.detach().flatten() for each in made.model.parameters()])
        for made in (changed, unbroken)
    )
    # Where a gradient is nothing but rounding, AdamW makes a whole step of it: few weights, by a rate each.
    assert (mine - expected).abs().mean() <= 1e-6
    assert (mine - expected).abs().max() <= config.optimizer.learning_rate


def train_in_one_launch(config: TrainConfig, directory: Path) -> None:
    """What each process of a run does whose device has the kernel."""
    loop.new_optimizer = OneLaunchAdamW
    loop.train(config, directory)


def test_sharded_weights_learn_the_same_and_are_saved_and_resumed(pictures: Path, tmp_path: Path) -> None:
    model = ModelConfig(unet=tiny_unet(dropout=0.0), steps=20)
    config = tiny_config(pictures, model=model, sharding="fsdp", save_every=6)
    alone = replace(config, sharding="ddp")
    loop.train(alone, tmp_path / "alone")
    assert World(2, train_in_one_launch, replace(config, steps=6), tmp_path / "sharded").wait() == []
    assert World(2, train_in_one_launch, config, tmp_path / "sharded").wait() == []
    mine, theirs = (
        [each["loss"] for each in read_log(tmp_path / name / "log.jsonl")] for name in ("sharded", "alone")
    )
    assert mine[-1] == pytest.approx(theirs[-1], rel=2e-3)
    read, expected = (Trainer(alone, tmp_path / name) for name in ("sharded", "alone"))
    assert read.state.step == expected.state.step == config.steps
    steps = [float(state["step"]) for state in read.state.optimizer.state.values()]
    assert set(steps) == {float(config.steps)}
