"""16-bit working copies of the weights: what has one, that it follows, and the gradients that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.training import loop
from glide_fast.training.config import OptimizerConfig, TrainConfig
from glide_fast.training.distributed import World
from glide_fast.training.loop import Trainer
from glide_fast.training.optimizer import OneLaunchAdamW, clip_gradients, update
from glide_fast.training.working_weights import WorkingWeights, converted_names, widen_gradients
from tests.training.tiny import TASKS, assert_identical, awake, snapshot, tiny_config

HALF = ("bfloat16", "float16")


def converting(trainer: Trainer) -> Trainer:
    """Without copies: weights are converted as they are used."""
    trainer.working = WorkingWeights(trainer.model, [], torch.bfloat16)
    return trainer


def in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by the optimiser that writes copies."""
    monkeypatch.setattr(loop, "new_optimizer", OneLaunchAdamW)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Those of the first step, whatever their dtype."""
    trainer.step()
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_that_of_weights_converted_as_they_are_used(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, dtype: str, one_launch: bool
) -> None:
    if one_launch:
        in_one_launch(monkeypatch)
    config = tiny_config(pictures, task=task, compute_dtype=dtype)
    mine = awake(Trainer(config, tmp_path / "mine"))
    plain = converting(awake(Trainer(config, tmp_path / "plain")))
    found, expected = gradients(mine), gradients(plain)
    copied = converted_names(config.network, getattr(torch, dtype))
    narrow = {name for name, each in found.items() if each.dtype is not torch.float32}
    assert narrow == (set(copied) if one_launch else set())
    assert len(copied) > 20
    for name, gradient in expected.items():
        assert torch.equal(found[name].float(), gradient), name
    if not one_launch:
        assert [mine.step() for _ in range(2)] == [plain.step() for _ in range(2)]
        assert_identical(snapshot(mine), snapshot(plain))
        return
    for (name, weight), other in zip(mine.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_gradients_of_parts_are_summed_in_float32(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    in_one_launch(monkeypatch)
    config = tiny_config(pictures, compute_dtype="bfloat16", batch=8, accumulate=accumulate)
    found = gradients(awake(Trainer(config, tmp_path / "mine")))
    expected = gradients(converting(awake(Trainer(config, tmp_path / "plain"))))
    for name, gradient in expected.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], gradient), name


def assert_followed(trainer: Trainer) -> None:
    """Each copy that a pass would read has the values of its weight and its layout."""
    trainer.working._refresh()
    assert len(trainer.working.copies) > 20
    for parameter, copy in trainer.working.copies.items():
        assert torch.equal(copy, parameter.to(copy.dtype))
        assert copy.stride() == parameter.stride()


@pytest.mark.parametrize("one_launch", [False, True])
def test_copies_follow_their_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_launch: bool
) -> None:
    if one_launch:
        in_one_launch(monkeypatch)
    trainer = Trainer(tiny_config(pictures, compute_dtype="bfloat16"), tmp_path)
    for _ in range(2):
        trainer.step()
        assert_followed(trainer)
    state = {name: torch.randn_like(each) for name, each in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)
    assert_followed(trainer)
    with torch.no_grad():
        trainer.model.get_parameter("middle_block.0.in_layers.2.weight")[0, 0, 0, 0] = 7
    assert_followed(trainer)


def test_an_optimiser_in_one_launch_writes_them_itself(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_launch(monkeypatch)
    trainer = Trainer(tiny_config(pictures, compute_dtype="bfloat16"), tmp_path)
    trainer.step()
    monkeypatch.setattr(torch, "_foreach_copy_", None)  # what else would copy
    trainer.working._refresh()
    with trainer.working.lent():
        pass
    for parameter, copy in trainer.working.copies.items():
        assert (copy - parameter).abs().max() <= 2**-8 * parameter.abs().max()


@pytest.mark.parametrize("dtype", HALF)
def test_a_resumed_run_is_the_unbroken_one_whose_checkpoint_knows_no_copies(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    in_one_launch(monkeypatch)
    config = tiny_config(pictures, compute_dtype=dtype)

    def trained(name: str, steps: int) -> Trainer:
        trainer = Trainer(config, tmp_path / name)
        for _ in range(steps):
            trainer.step()
        trainer.save()
        return trainer

    unbroken = trained("unbroken", 4)
    trained("stopped", 2)
    assert_identical(snapshot(trained("stopped", 2)), snapshot(unbroken))
    values: dict[str, Any] = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert {each.dtype for each in (*values["model"].values(), *values["ema"].values())} == {torch.float32}


def test_the_model_has_its_own_weights_again_after_a_pass_that_fails(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(pictures, compute_dtype="bfloat16"), tmp_path)
    before = list(trainer.model.parameters())

    def passes() -> None:
        with trainer.working.lent():
            assert {each.dtype for each in trainer.model.parameters()} == {torch.float32, torch.bfloat16}
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        passes()
    assert all(a is b for a, b in zip(trainer.model.parameters(), before, strict=True))


def test_what_is_computed_in_float32_has_no_copy(pictures: Path) -> None:
    names = converted_names(tiny_config(pictures).network, torch.bfloat16)
    assert "middle_block.0.in_layers.2.weight" in names
    assert "transformer.resblocks.0.mlp.c_fc.bias" in names
    kept = ("in_layers.0.", "out_layers.0.", ".norm.", ".ln_", "final_ln", "time_embed", "embedding")
    assert [name for name in names if any(each in name for each in kept) or name.startswith("out.")] == []


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bfloat16"}])
def test_there_are_none_in_float32_or_with_other_processes(pictures: Path, changes: dict[str, Any]) -> None:
    config: TrainConfig = tiny_config(pictures, **changes)
    world = World(size=2 if changes else 1)
    working = WorkingWeights.of(nn.Linear(2, 2), config, world)
    assert working.copies == {}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bit_gradients_is_summed_in_float32(dtype: torch.dtype) -> None:
    narrow = [100 * torch.randn(64, 32).to(dtype), torch.randn(7).to(dtype)]
    every = [*narrow, torch.randn(5)]
    expected = torch.cat([each.double().flatten() for each in every]).norm()
    found, _ = ops.gradient_norm(every, 1.0)
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert not torch.isfinite(ops.gradient_norm([*every, torch.tensor([torch.inf], dtype=dtype)], 1.0)[0])


def test_a_step_takes_16_bit_gradients_and_float32_ones_and_writes_copies() -> None:
    models = [network() for _ in range(2)]
    optimizers = [OneLaunchAdamW(each, OptimizerConfig(learning_rate=0.1)) for each in models]
    working = WorkingWeights(models[0], ["0.weight", "1.weight"], torch.bfloat16)
    averages = [loop.ExponentialMovingAverage(each, 0.9) for each in models]
    for step in range(3):
        for each in models:
            each.zero_grad(set_to_none=True)
        given = [torch.randn_like(each).bfloat16() for each in models[1].parameters()]
        for index, gradient in enumerate(given):
            mine, theirs = (list(each.parameters())[index] for each in models)
            theirs.grad = gradient.float()
            mine.grad = gradient if mine in working.copies else gradient.float()
        for model, optimizer, average in zip(models, optimizers, averages, strict=True):
            _, factor = clip_gradients(optimizer, model, 1.0)
            update(optimizer, average, model, step, factor, working if model is models[0] else None)
    for mine, theirs in zip(*(each.parameters() for each in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for parameter, copy in working.copies.items():
        assert torch.equal(copy, parameter.bfloat16())
    for name, average in averages[0].average.items():
        torch.testing.assert_close(average, averages[1].average[name], rtol=1e-5, atol=1e-6)


def test_narrow_gradients_are_widened_and_others_left() -> None:
    model = network()
    weight, bias = model.get_parameter("0.weight"), model.get_parameter("0.bias")
    WorkingWeights(model, ["0.weight"], torch.bfloat16)
    weight.grad, bias.grad = torch.ones(32, 64, dtype=torch.bfloat16), torch.ones(32)
    left = bias.grad
    widen_gradients(list(model.parameters()))
    assert weight.grad.dtype is torch.float32
    assert torch.equal(weight.grad, torch.ones(32, 64))
    assert bias.grad is left
