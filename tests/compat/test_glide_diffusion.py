"""GLIDE's diffusion objects under their own names against the original's numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.glide_text2im import gaussian_diffusion, respace
from tests.golden import assert_close, data, entry, normal

SHAPE = (4, 3, 4, 4)
NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LOOPS = [case for case in entry("toy_loops")["cases"] if "glide_text2im" in case["bit_identical_in"]]
SEEN = [case for case in data("timesteps_seen") if case["package"] == "glide_text2im"]


def plain(name: str = "linear", steps: int = 1000) -> gaussian_diffusion.GaussianDiffusion:
    return gaussian_diffusion.GaussianDiffusion(
        betas=gaussian_diffusion.get_named_beta_schedule(NAMES[name], steps)
    )


def spaced(name: str, steps: int, respacing: str) -> respace.SpacedDiffusion:
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(steps, respacing or [steps]),
        betas=gaussian_diffusion.get_named_beta_schedule(NAMES[name], steps),
    )


class Toy(torch.nn.Module):
    """The toy model of tests/parity/README.md, with a parameter as a network has."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        phase = timesteps.float().view(-1, 1, 1, 1) / 1000
        epsilon = 0.7 * x + 0.3 * torch.sin(3 * x + 6 * phase)
        return torch.cat([epsilon, torch.sin(2 * x - 4 * phase)], dim=1)


def test_schedules() -> None:
    for key, expected in data("schedules").items():
        name, _, which = key.partition(".")
        if name in NAMES:
            betas = gaussian_diffusion.get_named_beta_schedule(NAMES[name], int(which))
        elif name == "get_beta_schedule":
            betas = gaussian_diffusion.get_beta_schedule(
                which, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=100
            )
        else:
            betas = gaussian_diffusion.betas_for_alpha_bar(30, lambda t: math.exp(-5 * t * t), max_beta=0.5)
        np.testing.assert_allclose(betas, expected, rtol=1e-15, atol=0, err_msg=key)
    with pytest.raises(NotImplementedError, match=r"cosine; known: linear, squaredcos_cap_v2"):
        gaussian_diffusion.get_named_beta_schedule("cosine", 10)
    with pytest.raises(NotImplementedError, match=r"cubic; known: quad"):
        gaussian_diffusion.get_beta_schedule("cubic", beta_start=0, beta_end=1, num_diffusion_timesteps=3)


def test_tables_and_respacing() -> None:
    built: dict[tuple[str, ...], respace.SpacedDiffusion] = {}
    for key in entry("tables")["arrays"]:
        *which, table = key.split(".")
        name, steps, respacing = which
        if tuple(which) not in built:
            built[tuple(which)] = spaced(name, int(steps), "" if respacing == "all" else respacing)
        actual = getattr(built[tuple(which)], table)
        np.testing.assert_allclose(actual, data("tables")[key], rtol=1e-13, atol=0, err_msg=key)
    for case in data("space_timesteps"):
        expected = case.get("all", case.get("glide_text2im"))
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=r"respacing|stride"):
                respace.space_timesteps(case["num_timesteps"], case["section_counts"])
        else:
            assert respace.space_timesteps(case["num_timesteps"], case["section_counts"]) == set(expected)


def test_predictions_and_conditioning() -> None:
    x, output = normal("x_t", SHAPE, 301), normal("model_output", (4, 6, 4, 4), 301)
    t = torch.from_numpy(data("p_mean_variance")["in.t"])
    for clip in (0, 1):
        for function in (0, 1):
            out = plain().p_mean_variance(
                lambda _x, _t: output, x, t, bool(clip), (lambda x: 0.8 * x + 0.1) if function else None
            )
            for key in ("mean", "variance", "log_variance", "pred_xstart"):
                case = f"EPSILON.LEARNED_RANGE.clip{clip}.fn{function}.{key}"
                assert_close(out[key], "p_mean_variance", case)

    diffusion, t = spaced("linear", 1000, "20"), torch.from_numpy(data("conditioning")["in.t"])
    before = diffusion.p_mean_variance(lambda _x, _t: output, x, t)

    def gradient(x: Tensor, timesteps: Tensor) -> Tensor:
        return 0.3 - 1.5 * x + timesteps.view(-1, 1, 1, 1) / 1000

    mean = diffusion.condition_mean(gradient, before, x, t, model_kwargs={})
    assert_close(mean, "conditioning", "condition_mean")
    after = diffusion.condition_score(gradient, before, x, t, model_kwargs={})
    assert_close(after["pred_xstart"], "conditioning", "condition_score.pred_xstart")
    assert_close(after["mean"], "conditioning", "condition_score.mean")


def test_a_models_second_output_is_handed_through() -> None:
    diffusion = spaced("linear", 1000, "25")
    x, t = torch.zeros(1, 3, 4, 4), torch.tensor([3])

    def pair(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, x], dim=1), timesteps

    assert diffusion.p_mean_variance(pair, x, t)["extra"].tolist() == [diffusion.timestep_map[3]]
    assert diffusion.p_mean_variance(lambda x, t: pair(x, t)[0], x, t)["extra"] is None


@pytest.mark.parametrize("case", SEEN, ids=lambda case: f"{case['cls']}-{case['respacing']}")
def test_timesteps_seen(case: dict[str, Any]) -> None:
    is_plain = case["cls"] == "GaussianDiffusion"
    diffusion = plain("cosine") if is_plain else spaced("cosine", case["steps"], case["respacing"])
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, timesteps: Tensor, *, name: str) -> Tensor:
        seen[name] = timesteps
        return torch.zeros(len(x), 6 if name == "model" else 3, 4, 4)

    t = torch.tensor(case["t"])
    x = torch.zeros(len(t), 3, 4, 4)
    out = diffusion.p_mean_variance(model, x, t, model_kwargs={"name": "model"})
    diffusion.condition_mean(model, out, x, t, model_kwargs={"name": "cond_fn"})
    for name, expected in case["seen"].items():
        assert str(seen[name].dtype) == f"torch.{expected['dtype']}"
        assert seen[name].tolist() == expected["values"]


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case["name"])
def test_loops(case: dict[str, Any]) -> None:
    given, arguments, shape = case["diffusion"], dict(case["arguments"]), (2, 3, 8, 8)
    diffusion, model = spaced(given["name"], given["steps"], given["respacing"]), Toy()
    if "cond_fn" in arguments:
        arguments["cond_fn"] = lambda x, t: 0.2 - 0.5 * x + 0.1 * torch.cos(t.float().view(-1, 1, 1, 1) / 100)
    if "denoised_fn" in arguments:
        arguments["denoised_fn"] = lambda x: 0.9 * x
    torch.manual_seed(case["torch_seed"])
    if case["loop"].startswith("ddim_reverse"):
        x, steps = torch.randn(*shape).clamp(-1, 1), []
        for index in range(diffusion.num_timesteps):
            steps.append(diffusion.ddim_reverse_sample(model, x, torch.tensor([index] * 2), **arguments))
            x = steps[-1]["sample"]
    else:
        if "noise" in arguments:
            arguments["noise"] = 0.997 * torch.randn(*shape)
        steps = list(getattr(diffusion, f"{case['loop']}_progressive")(model, shape, **arguments))
    assert len(steps) == case["steps"]
    assert_close(torch.randn(4), "toy_loops", f"{case['name']}.rng_next")
    assert_close(steps[-1]["sample"], "toy_loops", f"{case['name']}.final")
    assert_close(steps[-1]["pred_xstart"], "toy_loops", f"{case['name']}.final_pred_xstart")
