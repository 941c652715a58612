"""One optimiser step: its gradient, its data, its rate, and what it does when numbers stop being finite."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.models import ModelConfig
from glide_fast.training.config import OptimizerConfig
from glide_fast.training.diagnose import NonFiniteLossError
from glide_fast.training.draws import Draws
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.loop import Trainer, learning_rate
from glide_fast.training.sources import rows_of_step
from glide_fast.training.tasks import Batch
from tests.training.tiny import CAPTIONS, assert_identical, snapshot, tiny_config, tiny_unet


def gradient(trainer: Trainer) -> dict[str, Tensor]:
    """The gradient of one step, before clipping matters."""
    trainer.step()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return {name: tensor.clone() for name, tensor in gradients.items() if tensor is not None}


def no_dropout(**changes: Any) -> dict[str, Any]:
    model = ModelConfig(unet=tiny_unet(dropout=0.0), steps=20)
    return {"model": model, "optimizer": OptimizerConfig(clip=1e9), **changes}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(
    pictures: Path, tmp_path: Path, accumulate: int
) -> None:
    changes = no_dropout(batch=8)
    whole = gradient(Trainer(tiny_config(pictures, **changes), tmp_path / "whole"))
    parts = gradient(Trainer(tiny_config(pictures, **changes, accumulate=accumulate), tmp_path / "parts"))
    assert whole.keys() == parts.keys()
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_the_gradient_is_weighted_by_the_timestep_sampler(pictures: Path, tmp_path: Path) -> None:
    changes = no_dropout(batch=8, timesteps="loss_second_moment")
    trainer = Trainer(tiny_config(pictures, **changes), tmp_path)
    steps = torch.arange(20).repeat(10)
    trainer.state.timesteps.update(steps, 1.0 + steps)
    t, weights = trainer.state.timesteps.sample(8, np.random.default_rng((0, 0)))
    assert len(set(weights.tolist())) > 2

    seen: dict[str, Tensor] = {}
    take_loss = trainer._loss

    def watched(batch: Batch, given_t: Tensor, noise: Tensor) -> Any:
        terms = take_loss(batch, given_t, noise)
        seen["t"] = given_t
        parameters = list(trainer.model.parameters())
        expected = (terms["loss"] * weights).mean()
        seen["norm"] = torch.stack(
            [each.norm() for each in torch.autograd.grad(expected, parameters, retain_graph=True)]
        ).norm()
        return terms

    trainer._loss = watched  # type: ignore[method-assign, assignment]
    record = trainer.step()
    assert torch.equal(seen["t"], t)
    assert record["grad_norm"] == pytest.approx(float(seen["norm"]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("weighting", ["simple", "v"])
def test_the_simple_loss_is_weighted_as_configured(pictures: Path, tmp_path: Path, weighting: str) -> None:
    trainer = Trainer(tiny_config(pictures, weighting=weighting, batch=8), tmp_path)
    seen: list[Tensor] = []
    take_loss = trainer._loss

    def watched(batch: Batch, t: Tensor, noise: Tensor) -> Any:
        seen.extend([t, noise])
        return take_loss(batch, t, noise)

    trainer._loss = watched  # type: ignore[method-assign]
    record = trainer.step()
    t, noise = seen
    squares = noise.double().square().flatten(1).mean(1)  # a fresh network predicts zero
    kept = torch.as_tensor(trainer.task.diffusion.schedule.alphas_cumprod)[t].double()
    weights = (1 / kept).clamp(max=20.0) if weighting == "v" else torch.ones(8)
    assert record["mse"] == pytest.approx(float((squares * weights).mean()), rel=1e-5)


def test_large_losses_come_to_be_drawn_more_often(pictures: Path, tmp_path: Path) -> None:
    model = ModelConfig(unet=tiny_unet(), steps=4)
    config = tiny_config(pictures, model=model, batch=16, steps=8, timesteps="loss_second_moment")
    trainer = Trainer(config, tmp_path)
    trainer.run()
    state = trainer.state.timesteps.state_dict()
    assert state["seen"].tolist() == [10] * 4
    moments = state["losses"].square().mean(1).sqrt()
    _, weights = trainer.state.timesteps.sample(2000, np.random.default_rng(0))
    steps, _ = trainer.state.timesteps.sample(2000, np.random.default_rng(0))
    largest, smallest = int(moments.argmax()), int(moments.argmin())
    assert (steps == largest).sum() > (steps == smallest).sum()
    assert weights[steps == largest][0] < weights[steps == smallest][0]


def test_the_gradient_is_clipped_to_the_configured_norm(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, optimizer=OptimizerConfig(clip=0.01)), tmp_path)
    record = trainer.step()
    clipped = torch.stack(
        [tensor.grad.norm() for tensor in trainer.model.parameters() if tensor.grad is not None]
    )
    assert record["grad_norm"] > 0.1
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_poisoned_parameter_is_named_and_nothing_is_updated(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    for _ in range(3):
        trainer.step()
    name = "middle_block.0.in_layers.2.weight"
    with torch.no_grad():
        trainer.model.get_parameter(name)[0, 0, 0, 0] = math.inf
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.step()
    message = str(caught.value)
    assert "at step 3," in message
    low, high = re.search(r"timesteps (\d+) \.\. (\d+)", message).groups()  # type: ignore[union-attr]
    assert 0 <= int(low) <= int(high) < 20
    assert "the first module with a non-finite output is middle_block.0.in_layers.2;" in message
    assert f"parameter {name} is not finite" in message
    assert "the last checkpoint is not there yet" in message
    assert trainer.state.step == 3
    assert_identical(snapshot(trainer), before)


def test_a_poisoned_picture_is_told_from_a_poisoned_parameter(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    trainer.save()
    make_batch = trainer.task.batch

    def poisoned(chosen: CaptionedPictures, draws: Draws) -> Batch:
        batch = make_batch(chosen, draws)
        batch.x_start[1, 0, 0, 0] = math.nan
        return batch

    trainer.task.batch = poisoned  # type: ignore[method-assign]
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.step()
    assert "the first module with a non-finite output is input_blocks.0.0;" in str(caught.value)
    assert "parameter" not in str(caught.value)
    assert f"the last checkpoint is {tmp_path / 'checkpoint.pt'}" in str(caught.value)
    assert_identical(snapshot(trainer), before)


def test_a_gradient_that_is_not_finite_stops_the_run_too(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    bias = trainer.model.get_parameter("out.2.bias")
    bias.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
    before = snapshot(trainer)
    with pytest.raises(NonFiniteLossError, match="every module's output is finite"):
        trainer.step()
    assert_identical(snapshot(trainer), before)


def test_bfloat16_activations_leave_float32_weights(pictures: Path, tmp_path: Path) -> None:
    records = {}
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(tiny_config(pictures, compute_dtype=dtype), tmp_path / dtype)
        records[dtype] = trainer.step()
        assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}
        assert {tensor.dtype for tensor in trainer.state.ema.state_dict().values()} == {torch.float32}
    assert records["bfloat16"] != records["float32"]
    assert records["bfloat16"]["loss"] == pytest.approx(records["float32"]["loss"], rel=0.02)
    assert records["bfloat16"]["grad_norm"] == pytest.approx(records["float32"]["grad_norm"], rel=0.05)


def test_sixty_steps_learn_ten_pictures(pictures: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, ema=0.9)
    model = ModelConfig(unet=tiny_unet())
    trainer = Trainer(tiny_config(pictures, model=model, optimizer=optimizer, batch=16, steps=60), tmp_path)
    losses = [trainer.step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_the_optimiser_uses_the_rate_of_the_step(pictures: Path, tmp_path: Path) -> None:
    config = tiny_config(pictures)
    trainer = Trainer(config, tmp_path)
    for step in range(6):
        trainer.step()
        assert trainer.state.optimizer.param_groups[0]["lr"] == learning_rate(config, step)


def test_the_learning_rate_warms_up_stays_and_decays(pictures: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=5)
    config = tiny_config(pictures, optimizer=optimizer, steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_without_warm_up_and_decay_the_learning_rate_is_constant(pictures: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=0, decay_steps=0)
    config = tiny_config(pictures, optimizer=optimizer)
    assert {learning_rate(config, step) for step in range(12)} == {2e-3}


@given(
    count=st.integers(1, 30), batch=st.integers(1, 70), epochs=st.integers(1, 4), seed=st.integers(0, 2**32)
)
def test_every_epoch_is_a_permutation_whatever_the_batch(
    count: int, batch: int, epochs: int, seed: int
) -> None:
    steps = -(-epochs * count // batch)
    rows = np.concatenate([rows_of_step(step, batch, count, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(rows[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [rows_of_step(step, 50, 50, seed).tolist() for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    average = ExponentialMovingAverage(model, 0.8)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(50):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model, step)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


def test_the_average_is_updated_after_every_step(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    expected = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for decay in (1 / 10, 2 / 11, 3 / 12):
        trainer.step()
        for name, parameter in trainer.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, tensor in trainer.state.ema.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_the_average_is_no_view_of_the_weights(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures), tmp_path)
    start = {name: tensor.clone() for name, tensor in trainer.state.ema.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    assert_identical(trainer.state.ema.state_dict(), start)


def test_a_batch_may_be_larger_than_the_data(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, batch=2 * len(CAPTIONS) + 3), tmp_path)
    assert math.isfinite(trainer.step()["loss"])


def test_two_runs_with_one_seed_are_one_run_and_another_seed_is_another(
    pictures: Path, tmp_path: Path
) -> None:
    config = tiny_config(pictures)
    runs = [
        Trainer(replace(config, seed=seed), tmp_path / name) for seed, name in [(0, "a"), (0, "b"), (1, "c")]
    ]
    first, second, third = [[run.step() for _ in range(2)] for run in runs]
    assert first == second != third
