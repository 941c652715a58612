"""q, posterior, predictions and model timesteps against the original's numbers, and their errors."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion, MeanType, VarianceType
from glide_fast.diffusion.schedule import Schedule
from tests.golden import assert_close, data, entry, normal

SHAPE = (4, 3, 4, 4)
LINEAR = Schedule.create("linear", 1000)
MEAN_TYPES: dict[str, MeanType] = {
    "EPSILON": "epsilon",
    "START_X": "x_start",
    "PREVIOUS_X": "previous_x",
}
PREDICTIONS = sorted({key.rsplit(".", 1)[0] for key in entry("p_mean_variance")["arrays"] if key != "in.t"})


def stored(name: str, key: str) -> Tensor:
    return torch.from_numpy(data(name)[key])


def variance_type(upstream: str) -> VarianceType:
    return cast(VarianceType, upstream.lower())


def test_q_operations() -> None:
    diffusion = GaussianDiffusion(schedule=LINEAR)
    x_start, t = stored("q_ops", "in.x_start"), stored("q_ops", "in.t")
    noise, x_t = normal("noise", SHAPE, 301), normal("x_t", SHAPE, 301)
    marginal, posterior = diffusion.q_mean_variance(x_start, t), diffusion.q_posterior(x_start, x_t, t)
    for field in ("mean", "variance", "log_variance"):
        assert_close(getattr(marginal, field).expand(SHAPE), "q_ops", f"q_mean_variance.{field}")
        assert_close(getattr(posterior, field).expand(SHAPE), "q_ops", f"q_posterior.{field}")
    assert_close(diffusion.q_sample(x_start, t, noise), "q_ops", "q_sample")
    torch.manual_seed(301)
    assert_close(diffusion.q_sample(x_start, t, torch.randn_like(x_start)), "q_ops", "q_sample.drawn")
    assert_close(diffusion.predict_x_start_from_epsilon(x_t, t, noise), "q_ops", "predict_xstart_from_eps")
    assert_close(diffusion.predict_epsilon_from_x_start(x_t, t, x_start), "q_ops", "predict_eps_from_xstart")
    assert_close(diffusion.predict_x_start_from_previous(x_t, t, noise), "q_ops", "predict_xstart_from_xprev")


@pytest.mark.parametrize("case", PREDICTIONS)
def test_predict(case: str) -> None:
    mean, variance, clip, function = case.split(".")
    diffusion = GaussianDiffusion(
        schedule=LINEAR, mean_type=MEAN_TYPES[mean], variance_type=variance_type(variance)
    )
    output = normal("model_output", (4, 6, 4, 4), 301)
    prediction = diffusion.predict(
        output if diffusion.learns_variance else output[:, :3],
        normal("x_t", SHAPE, 301),
        stored("p_mean_variance", "in.t"),
        clip_denoised=clip == "clip1",
        denoised_fn=(lambda x: 0.8 * x + 0.1) if function == "fn1" else None,
    )
    for key, values in zip(("mean", "variance", "log_variance", "pred_xstart"), prediction, strict=True):
        assert_close(values, "p_mean_variance", f"{case}.{key}")


@pytest.mark.parametrize("case", data("timesteps_seen"))
def test_model_timesteps(case: dict[str, Any]) -> None:
    diffusion = GaussianDiffusion(
        schedule=Schedule.create("cosine", case["steps"], case["respacing"]),
        rescale_timesteps=case["rescale_timesteps"],
    )
    timesteps = diffusion.model_timesteps(torch.tensor(case["t"]))
    for seen in case["seen"].values():
        assert str(timesteps.dtype) == f"torch.{seen['dtype']}"
        np.testing.assert_array_equal(timesteps, seen["values"])


@pytest.mark.parametrize("mean", MEAN_TYPES.values())
def test_true_prediction_gives_the_true_posterior(mean: MeanType) -> None:
    diffusion = GaussianDiffusion(schedule=LINEAR, mean_type=mean, variance_type="fixed_small")
    x_start, noise, t = (
        normal("x", SHAPE, 0).clamp(-1, 1),
        normal("noise", SHAPE, 0),
        torch.tensor([0, 9, 99, 500]),
    )
    x_t = diffusion.q_sample(x_start, t, noise)
    posterior = diffusion.q_posterior(x_start, x_t, t)
    output = {"epsilon": noise, "x_start": x_start, "previous_x": posterior.mean}[mean]
    prediction = diffusion.predict(output, x_t, t)
    torch.testing.assert_close(prediction.mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.x_start, x_start, rtol=0, atol=1e-3)


def test_half_precision_output_is_widened_first() -> None:
    diffusion = GaussianDiffusion(schedule=LINEAR)
    x, t = normal("x_t", SHAPE, 301), torch.tensor([0, 9, 99, 999])
    output = normal("model_output", (4, 6, 4, 4), 301).bfloat16()
    for half, full in zip(
        diffusion.predict(output, x, t), diffusion.predict(output.float(), x, t), strict=True
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=0)


def test_errors_name_value_rule_and_fix() -> None:
    with pytest.raises(ValueError, match="unknown mean type 'noise'; known: epsilon, x_start, previous_x"):
        GaussianDiffusion(schedule=LINEAR, mean_type=cast(MeanType, "noise"))
    with pytest.raises(ValueError, match="unknown variance type 'big'; known: fixed_small"):
        GaussianDiffusion(schedule=LINEAR, variance_type=cast(VarianceType, "big"))
    with pytest.raises(
        ValueError, match=r"\(4, 3, 4, 4\).*needs \(4, 6, 4, 4\); check the model's out_channels"
    ):
        GaussianDiffusion(schedule=LINEAR).predict(
            torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(4).long()
        )
