"""Training through guided- and improved-diffusion's names: samplers, precision, loop, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.guided_diffusion import fp16_util as guided_fp16
from glide_fast.compat.guided_diffusion import gaussian_diffusion as options
from glide_fast.compat.guided_diffusion import logger, nn, resample, respace, train_util, unet
from glide_fast.compat.improved_diffusion import fp16_util as improved_fp16
from glide_fast.compat.improved_diffusion import respace as improved_respace
from glide_fast.compat.improved_diffusion import train_util as improved_train_util
from glide_fast.compat.improved_diffusion import unet as improved_unet
from tests.golden import assert_close, data, entry, fill, normal

KINDS: dict[str, Any] = {
    "guided": (unet.UNetModel, respace.SpacedDiffusion, train_util),
    "improved": (improved_unet.UNetModel, improved_respace.SpacedDiffusion, improved_train_util),
}


@pytest.fixture(autouse=True)
def quiet_log(tmp_path: Path) -> Iterator[None]:
    with logger.scoped_configure(dir=tmp_path / "log", format_strs=[]):
        yield


def diffusion(kind: type[Any] = respace.SpacedDiffusion, steps: int = 1000) -> Any:
    """The fixtures' diffusion: cosine, learned range, MSE."""
    return kind(
        use_timesteps=respace.space_timesteps(steps, [steps]),
        betas=options.get_named_beta_schedule("cosine", steps),
        model_mean_type=options.ModelMeanType.EPSILON,
        model_var_type=options.ModelVarType.LEARNED_RANGE,
        loss_type=options.LossType.MSE,
    )


def norms(values: Any) -> np.ndarray:
    return np.array([0.0 if each is None else each.detach().double().norm().item() for each in values])


def assert_close_where_conditioned(actual: np.ndarray, name: str, key: str) -> None:
    """Compare the entries of which the fixture says that float32 determines them."""
    mask = data(name)[f"well_conditioned.{key}"]
    tolerance = entry(name)["arrays"][key]
    assert mask.mean() > 0.3
    np.testing.assert_allclose(
        actual[mask], data(name)[key][mask], rtol=tolerance["rtol"], atol=tolerance["atol"]
    )


def test_schedule_samplers() -> None:
    name = "schedule_samplers"
    twelve = diffusion(steps=12)
    seed = entry(name)["numpy_seed"]
    uniform = resample.create_named_schedule_sampler("uniform", twelve)
    aware = resample.create_named_schedule_sampler("loss-second-moment", twelve)
    assert_close(uniform.weights(), name, "uniform.weights")
    pairs = zip(data(name)["in.timesteps"].tolist(), data(name)["in.losses"].tolist(), strict=True)
    for count, (step, loss) in enumerate(pairs, start=1):
        aware.update_with_all_losses([step], [loss])
        key = f"second_moment.weights_after_{count}"
        if key in data(name):
            np.testing.assert_allclose(aware.weights(), data(name)[key], rtol=1e-12, atol=0)
    for prefix, sampler, batch in (("uniform", uniform, 8), ("second_moment", aware, 16)):
        np.random.seed(seed)  # noqa: NPY002
        indices, weights = sampler.sample(batch, "cpu")
        assert_close(indices, name, f"{prefix}.indices")
        np.testing.assert_allclose(weights, data(name)[f"{prefix}.sample_weights"], rtol=1e-6)
    before = aware.weights().copy()
    aware.update_with_local_losses(torch.tensor([3, 3]), torch.tensor([9.0, 9.0]))
    assert aware.weights()[3] > before[3]
    with pytest.raises(NotImplementedError, match="unknown schedule sampler: best"):
        resample.create_named_schedule_sampler("best", twelve)


class Steps:
    """The five scripted steps of two fixtures."""

    def __init__(self, name: str) -> None:
        self.name, self.seed = name, entry(name)["weights_seed"]
        self.model = fill(unet.UNetModel(**entry(name)["kwargs"]), self.seed)
        self.x_start = normal("x_start", (4, 3, 8, 8), self.seed).clamp(-1, 1)
        self.y = torch.from_numpy(data("training_steps")["in.y"])
        self.diffusion = diffusion()

    def losses(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of a step, and the weighted mean of the loss."""
        terms = self.diffusion.training_losses(
            self.model,
            self.x_start,
            torch.from_numpy(data(self.name)["in.t"][step]),
            model_kwargs={"y": self.y},
            noise=normal(f"noise{step}", (4, 3, 8, 8), self.seed),
        )
        return terms, (terms["loss"] * torch.from_numpy(data(self.name)["in.loss_weights"][step])).mean()


def test_scripted_steps() -> None:
    name = "training_steps"
    steps, settings = Steps(name), entry("training_steps")["optimizer"]
    trainer = guided_fp16.MixedPrecisionTrainer(model=steps.model)
    optimizer = torch.optim.AdamW(trainer.master_params, **settings)
    start = [each.detach().clone() for each in trainer.master_params]
    average = [each.clone() for each in start]
    logged: dict[str, list[Any]] = {"loss": [], "terms.vb": [], "terms.mse": [], "terms.loss": []}
    for step in range(5):
        trainer.zero_grad()
        terms, loss = steps.losses(step)
        trainer.backward(loss)
        if step == 0:
            assert_close(norms(each.grad for each in trainer.model_params), name, "first_grad_norms")
        assert trainer.optimize(optimizer) is True
        nn.update_ema(average, trainer.master_params, rate=entry(name)["ema_rate"])
        logged["loss"].append(loss.item())
        for key, values in terms.items():
            logged[f"terms.{key}"].append(values.tolist())
    for key, values in logged.items():
        assert_close(np.array(values), name, key)
    final = [each.detach() for each in trainer.master_params]
    assert_close(norms(final), name, "final_param_norms")
    assert_close(norms(average), name, "final_ema_norms")
    for key, values in (("param", final), ("ema", average)):
        deltas = norms(value - begin for value, begin in zip(values, start, strict=True))
        assert_close_where_conditioned(deltas, name, f"{key}_delta_norms")
    assert_close(steps.model.state_dict()["out.2.weight"][0], name, "final_out_conv")


def test_half_precision_steps() -> None:
    name = "training_fp16"
    steps = Steps(name)
    trainer = guided_fp16.MixedPrecisionTrainer(model=steps.model, use_fp16=True)
    assert trainer.lg_loss_scale == entry(name)["initial_lg_loss_scale"] == 20.0
    shapes = [[1, each.numel()] if each.dim() == 2 else [0, each.numel()] for each in trainer.master_params]
    np.testing.assert_array_equal(shapes, data(name)["master_shapes"])
    assert all(each.dtype == torch.float32 for each in trainer.master_params)
    assert steps.model.input_blocks[0][0].weight.dtype == torch.float16
    optimizer = torch.optim.AdamW(trainer.master_params, **entry("training_steps")["optimizer"])
    losses, scales, took = [], [], []
    for step in range(5):
        trainer.zero_grad()
        loss = steps.losses(step)[1]
        trainer.backward(loss)
        took.append(trainer.optimize(optimizer))
        losses.append(loss.item())
        scales.append(trainer.lg_loss_scale)
    close: dict[str, Any] = {"rtol": 0.01, "atol": 0.001}
    np.testing.assert_allclose(losses, data(name)["loss"], **close)
    np.testing.assert_allclose(scales, data(name)["lg_loss_scale"], **close)
    np.testing.assert_array_equal(took, data(name)["took_step"])
    state = trainer.master_params_to_state_dict(trainer.master_params)
    named = [key for key, _ in steps.model.named_parameters()]
    np.testing.assert_allclose(norms(state[key] for key in named), data(name)["param_norms"], **close)
    assert list(state) == list(steps.model.state_dict())
    again = trainer.state_dict_to_master_params(state)
    torch.testing.assert_close(again, trainer.master_params, rtol=0, atol=0)


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model = fill(unet.UNetModel(**entry("training_fp16")["kwargs"]), 1)
    trainer = guided_fp16.MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=30.0)
    optimizer = torch.optim.AdamW(trainer.master_params)
    before = [each.detach().clone() for each in trainer.master_params]
    model.out["2"].weight.grad = torch.full_like(model.out["2"].weight, float("inf"))
    assert trainer.optimize(optimizer) is False
    assert trainer.lg_loss_scale == 29.0
    torch.testing.assert_close(list(trainer.master_params), before, rtol=0, atol=0)
    assert guided_fp16.check_overflow(float("nan"))
    assert not guided_fp16.check_overflow(3.0)


def test_flat_master_parameters_of_improved_diffusion() -> None:
    layer = fill(torch.nn.Conv2d(2, 3, 1), 1)
    parameters = list(layer.parameters())
    masters = improved_fp16.make_master_params(parameters)
    assert [tuple(each.shape) for each in masters] == [(9,)]
    parameters[1].grad = torch.ones(3)
    improved_fp16.model_grads_to_master_grads(parameters, masters)
    assert masters[0].grad.tolist() == [0.0] * 6 + [1.0] * 3
    with torch.no_grad():
        masters[0].fill_(2.0)
    improved_fp16.master_params_to_model_params(parameters, masters)
    assert all((each == 2).all() for each in parameters)
    assert [each.shape for each in improved_fp16.unflatten_master_params(parameters, masters)] == [
        each.shape for each in parameters
    ]


def loop(kind: str, batches: Any, **changes: Any) -> Any:
    """A training loop of the fixture's model."""
    network, spaced, module = KINDS[kind]
    settings = entry("train_loop")["loop"]
    half = {"use_fp16": True} if changes.get("use_fp16") and kind == "guided" else {}
    model = network(**entry("train_loop")["kwargs"][kind], **half)
    fill(model, entry("train_loop")["weights_seed"])
    arguments = {key: settings[key] for key in ("batch_size", "microbatch", "lr", "ema_rate", "weight_decay")}
    return module.TrainLoop(
        **{
            "model": model,
            "diffusion": diffusion(spaced),
            "data": batches,
            "log_interval": 10,
            "save_interval": 10_000,
            "resume_checkpoint": "",
            "lr_anneal_steps": settings["lr_anneal_steps"],
            **arguments,
            **changes,
        }
    )


def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    seed = entry("train_loop")["weights_seed"]
    for step in range(1000):
        pictures = normal(f"batch{step}", (4, 3, 8, 8), seed).clamp(-1, 1)
        yield pictures, {"y": torch.tensor(entry("train_loop")["loop"]["y"])}


@pytest.mark.parametrize("kind", KINDS)
def test_train_loop(kind: str) -> None:
    run, name = loop(kind, batches()), "train_loop"
    names = [key for key, _ in run.model.named_parameters()]
    start = [each.detach().clone() for each in run.model.parameters()]
    seen: list[float] = []
    original = run.diffusion.training_losses

    def recording(*args: Any, **kwargs: Any) -> Any:
        terms = original(*args, **kwargs)
        seen.extend(terms["loss"].tolist())
        return terms

    run.diffusion.training_losses = recording
    torch.manual_seed(entry(name)["torch_seed"])
    np.random.seed(entry(name)["numpy_seed"])  # noqa: NPY002
    rates = []
    for _ in range(entry(name)["loop"]["steps"]):
        run.run_step(*next(run.data))
        rates.append(run.opt.param_groups[0]["lr"])
        run.step += 1
    assert_close(torch.randn(4), name, f"{kind}.rng_next")
    assert_close(np.array(seen), name, f"{kind}.losses")
    assert_close(np.array(rates), name, f"{kind}.lr_after_step")
    final = [run.model.state_dict()[key] for key in names]
    assert_close(norms(final), name, f"{kind}.param_norms")
    assert run.ema_rate == [0.9, 0.99]
    for key, values in [("param", final), *zip(("ema0.9", "ema0.99"), run.ema_params, strict=True)]:
        deltas = norms(value - begin for value, begin in zip(values, start, strict=True))
        assert_close_where_conditioned(deltas, name, f"{kind}.{key}_delta_norms")
        if key != "param":
            assert_close(norms(values), name, f"{kind}.{key}_norms")


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_run(kind: str, use_fp16: bool, tmp_path: Path) -> None:
    def run(steps: int, **changes: Any) -> Any:
        given = batches()
        for _ in range(changes.pop("skip", 0)):
            next(given)
        model = loop(kind, given, lr_anneal_steps=steps, save_interval=2, use_fp16=use_fp16, **changes)
        model.lr_anneal_steps = 8
        for _ in range(steps - model.resume_step):
            torch.manual_seed(model.step + model.resume_step)
            np.random.seed(model.step + model.resume_step)  # noqa: NPY002
            model.run_step(*next(model.data))
            model.step += 1
        return model

    whole = run(4)
    with logger.scoped_configure(dir=tmp_path, format_strs=[]):
        first = run(2)
        first.save()
    names = {"model000002.pt", "opt000002.pt", "ema_0.9_000002.pt", "ema_0.99_000002.pt"}
    assert {path.name for path in tmp_path.glob("*.pt")} == names
    second = run(4, resume_checkpoint=str(tmp_path / "model000002.pt"), skip=2)
    assert second.resume_step == 2
    if use_fp16:  # the loss scale begins anew, which float16 gradients feel
        for a, b in zip(second.mp_trainer.master_params, whole.mp_trainer.master_params, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
        return
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.ema_params, whole.ema_params, rtol=0, atol=0)


def test_run_loop_saves_logs_and_ends(tmp_path: Path) -> None:
    with logger.scoped_configure(dir=tmp_path, format_strs=["csv", "log", "json"]):
        run = loop("guided", batches(), lr_anneal_steps=4, save_interval=3, log_interval=1, ema_rate=0.5)
        run.run_loop()
    assert run.step == 4
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        f"{stem}{step}.pt" for stem in ("model", "opt", "ema_0.5_") for step in ("000000", "000003")
    }
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert {"loss", "mse", "vb", "step", "samples", "grad_norm", "param_norm"} <= set(header.split(","))
    assert any(key.startswith("loss_q") for key in header.split(","))
    assert len(rows) == 4
    state = torch.load(tmp_path / "model000003.pt")
    torch.testing.assert_close(state, dict(run.model.state_dict()), rtol=0, atol=0)


def test_checkpoint_names() -> None:
    parse = train_util.parse_resume_step_from_filename
    assert [parse(name) for name in ("a/model012345.pt", "model7.pt", "ema_0.9.pt", "modelx.pt")] == [
        12345,
        7,
        0,
        0,
    ]
    assert train_util.find_resume_checkpoint() is None
    assert train_util.find_ema_checkpoint(None, 3, 0.9) is None
    assert train_util.get_blob_logdir() == logger.get_dir()
