"""The three projects' diffusion objects under their own names, against the originals' numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.glide_text2im import gaussian_diffusion as glide
from glide_fast.compat.glide_text2im import respace as glide_respace
from glide_fast.compat.guided_diffusion import gaussian_diffusion as guided
from glide_fast.compat.guided_diffusion import losses as guided_losses
from glide_fast.compat.guided_diffusion import respace as guided_respace
from glide_fast.compat.improved_diffusion import gaussian_diffusion as improved
from glide_fast.compat.improved_diffusion import losses as improved_losses
from glide_fast.compat.improved_diffusion import respace as improved_respace
from tests.golden import assert_close, data, entry, normal

PACKAGES = {
    "guided_diffusion": (guided, guided_respace),
    "improved_diffusion": (improved, improved_respace),
    "glide_text2im": (glide, glide_respace),
}
SHAPE = (4, 3, 4, 4)
TABLES = [key.split(".") for key in entry("tables")["arrays"]]
PREDICTIONS = sorted({key.rsplit(".", 1)[0] for key in entry("p_mean_variance")["arrays"] if key != "in.t"})
LOSSES = [key.removesuffix(".loss") for key in entry("training_losses")["arrays"] if key.endswith(".loss")]
LOOPS = [
    (package, case)
    for case in entry("toy_loops")["cases"]
    for package in PACKAGES
    if package in case["bit_identical_in"]
]

every = pytest.mark.parametrize("package", PACKAGES)
both = pytest.mark.parametrize("package", ["guided_diffusion", "improved_diffusion"])
guidable = pytest.mark.parametrize("package", ["guided_diffusion", "glide_text2im"])


def stored(name: str, key: str) -> Tensor:
    return torch.from_numpy(data(name)[key])


def options(
    package: str, mean: str = "EPSILON", var: str = "LEARNED_RANGE", loss: str = "MSE"
) -> dict[str, Any]:
    """A constructor's description of the model; GLIDE's knows one kind alone."""
    if package == "glide_text2im":
        return {}
    module = PACKAGES[package][0]
    return {
        "model_mean_type": module.ModelMeanType[mean],
        "model_var_type": module.ModelVarType[var],
        "loss_type": module.LossType[loss],
    }


def betas_of(package: str, name: str, steps: int) -> Any:
    name = "squaredcos_cap_v2" if (package, name) == ("glide_text2im", "cosine") else name
    return PACKAGES[package][0].get_named_beta_schedule(name, steps)


def plain(package: str, name: str = "linear", steps: int = 1000, **kwargs: Any) -> Any:
    betas = betas_of(package, name, steps)
    return PACKAGES[package][0].GaussianDiffusion(betas=betas, **{**options(package), **kwargs})


def spaced(package: str, name: str, steps: int, respacing: str, **kwargs: Any) -> Any:
    respace = PACKAGES[package][1]
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(steps, respacing or [steps]),
        betas=betas_of(package, name, steps),
        **{**options(package), **kwargs},
    )


def constant(output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A model with this answer to everything."""
    return lambda _x, _timesteps: output


@every
def test_schedules(package: str) -> None:
    module = PACKAGES[package][0]
    for key, expected in data("schedules").items():
        name, _, steps = key.partition(".")
        if name in ("linear", "cosine"):
            betas = betas_of(package, name, int(steps))
            np.testing.assert_allclose(betas, expected, rtol=1e-15, atol=0)
    seen = []
    module.betas_for_alpha_bar(5, lambda time: seen.append(time) or 1 - time / 2)
    assert all(isinstance(time, float) for time in seen)
    assert len(seen) == 10
    foreign = "cosine" if package == "glide_text2im" else "squaredcos_cap_v2"
    with pytest.raises(NotImplementedError, match=f"unknown beta schedule: {foreign}"):
        module.get_named_beta_schedule(foreign, 10)


@every
def test_tables(package: str) -> None:
    built: dict[tuple[str, ...], Any] = {}
    for *which, table in TABLES:
        name, steps, respacing = which
        if respacing == "fast27" and package != "glide_text2im":
            continue
        if tuple(which) not in built:
            sections = "" if respacing == "all" else respacing
            built[tuple(which)] = spaced(package, name, int(steps), sections)
        diffusion = built[tuple(which)]
        expected = data("tables")[".".join([*which, table])]
        np.testing.assert_allclose(getattr(diffusion, table), expected, rtol=1e-13, atol=0)
        assert diffusion.num_timesteps == len(diffusion.use_timesteps) == len(diffusion.timestep_map)
        assert diffusion.original_num_steps == int(steps)


@every
def test_space_timesteps(package: str) -> None:
    respace = PACKAGES[package][1]
    for case in data("space_timesteps"):
        expected = case.get("all", case.get(package))
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=r"respacing|stride"):
                respace.space_timesteps(case["num_timesteps"], case["section_counts"])
        else:
            assert respace.space_timesteps(case["num_timesteps"], case["section_counts"]) == set(expected)


@every
def test_q_operations(package: str) -> None:
    diffusion = plain(package)
    x_start, t = stored("q_ops", "in.x_start"), stored("q_ops", "in.t")
    noise, x_t = normal("noise", SHAPE, 301), normal("x_t", SHAPE, 301)
    for key, values in (
        ("q_mean_variance", diffusion.q_mean_variance(x_start, t)),
        ("q_posterior", diffusion.q_posterior_mean_variance(x_start, x_t, t)),
    ):
        for field, value in zip(("mean", "variance", "log_variance"), values, strict=True):
            assert_close(value, "q_ops", f"{key}.{field}")
    assert_close(diffusion.q_sample(x_start, t, noise=noise), "q_ops", "q_sample")
    torch.manual_seed(301)
    assert_close(diffusion.q_sample(x_start, t), "q_ops", "q_sample.drawn")
    assert_close(diffusion._predict_xstart_from_eps(x_t, t, eps=noise), "q_ops", "predict_xstart_from_eps")
    assert_close(diffusion._predict_eps_from_xstart(x_t, t, x_start), "q_ops", "predict_eps_from_xstart")
    assert_close(
        diffusion._predict_xstart_from_xprev(x_t, t, xprev=noise), "q_ops", "predict_xstart_from_xprev"
    )
    extract = PACKAGES[package][0]._extract_into_tensor
    found = extract(diffusion.sqrt_alphas_cumprod, t, SHAPE) * x_start
    assert torch.equal(found, diffusion.q_mean_variance(x_start, t)[0])


@every
def test_p_mean_variance(package: str) -> None:
    x, t = normal("x_t", SHAPE, 301), stored("p_mean_variance", "in.t")
    output = normal("model_output", (4, 6, 4, 4), 301)
    for case in PREDICTIONS:
        mean, variance, clip, function = case.split(".")
        if package == "glide_text2im" and (mean, variance) != ("EPSILON", "LEARNED_RANGE"):
            continue
        diffusion = plain(package, **options(package, mean, variance))
        channels = 6 if variance.startswith("LEARNED") else 3
        out = diffusion.p_mean_variance(
            constant(output[:, :channels]),
            x,
            t,
            clip_denoised=clip == "clip1",
            denoised_fn=(lambda x: 0.8 * x + 0.1) if function == "fn1" else None,
        )
        for key in ("mean", "variance", "log_variance", "pred_xstart"):
            assert_close(out[key], "p_mean_variance", f"{case}.{key}")


@guidable
def test_conditioning(package: str) -> None:
    diffusion = spaced(package, "linear", 1000, "20")
    x, t = normal("x_t", SHAPE, 301), stored("conditioning", "in.t")
    output = normal("model_output", (4, 6, 4, 4), 301)
    before = diffusion.p_mean_variance(constant(output), x, t)

    def gradient(x: Tensor, timesteps: Tensor) -> Tensor:
        return 0.3 - 1.5 * x + timesteps.view(-1, 1, 1, 1) / 1000

    assert_close(diffusion.condition_mean(gradient, before, x, t), "conditioning", "condition_mean")
    after = diffusion.condition_score(gradient, before, x, t)
    assert_close(after["pred_xstart"], "conditioning", "condition_score.pred_xstart")
    assert_close(after["mean"], "conditioning", "condition_score.mean")
    assert after["variance"] is before["variance"]


@pytest.mark.parametrize("losses", [guided_losses, improved_losses])
def test_losses(losses: ModuleType) -> None:
    mean1, logvar1, mean2, logvar2 = (
        normal(name, SHAPE, 301) for name in ("mean1", "logvar1", "mean2", "logvar2")
    )
    assert_close(losses.normal_kl(mean1, logvar1, mean2, logvar2), "losses", "normal_kl")
    assert_close(losses.normal_kl(mean1, logvar1, 0.0, 0.0), "losses", "normal_kl.scalar")
    assert_close(losses.normal_kl(mean1, -1.0, mean2, logvar2), "losses", "normal_kl.mixed")
    assert torch.equal(
        losses.normal_kl(0.0, 0.0, mean2, logvar2)[0],
        losses.normal_kl(torch.zeros(SHAPE), 0.0, mean2, logvar2)[0],
    )
    with pytest.raises(ValueError, match="normal_kl has no tensor"):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)
    assert_close(losses.approx_standard_normal_cdf(3 * mean1), "losses", "approx_standard_normal_cdf")
    image = stored("losses", "in.image")
    likelihood = losses.discretized_gaussian_log_likelihood(
        image, means=image + 0.02 * mean1, log_scales=0.2 * logvar1 - 3.5
    )
    assert_close(likelihood, "losses", "discretized_gaussian_log_likelihood")


@both
@pytest.mark.parametrize("case", LOSSES)
def test_training_losses(package: str, case: str) -> None:
    loss, mean, variance = case.split(".")
    diffusion = plain(package, "cosine", **options(package, mean, variance, loss))
    x_start, t = stored("training_losses", "in.x_start"), stored("training_losses", "in.t")
    output = 0.5 * normal("model_output", (4, 6, 4, 4), 311)
    output = (output if variance.startswith("LEARNED") else output[:, :3]).clone().requires_grad_()
    terms = diffusion.training_losses(
        constant(output), x_start, t, model_kwargs={}, noise=normal("noise", SHAPE, 311)
    )
    terms["loss"].sum().backward()
    keys = {key.rsplit(".", 1)[1] for key in data("training_losses") if key.startswith(f"{case}.")}
    assert terms.keys() == keys - {"grad"}
    for key, values in terms.items():
        assert_close(values, "training_losses", f"{case}.{key}")
    assert_close(output.grad, "training_losses", f"{case}.grad")


def toy_model(diffusion: Any) -> Any:
    """The toy model of tests/parity/README.md, with ``parameters`` as a network has."""
    learned = diffusion.process.learns_variance

    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            phase = timesteps.float().view(-1, 1, 1, 1) / 1000
            epsilon = 0.7 * x + 0.3 * torch.sin(3 * x + 6 * phase)
            return torch.cat([epsilon, torch.sin(2 * x - 4 * phase)], dim=1) if learned else epsilon

    return Toy()


@both
def test_bits_per_dim(package: str) -> None:
    cases = sorted({key.rsplit(".", 1)[0] for key in data("bpd") if key != "in.x_start"})
    for case in cases:
        mean, variance, clip = case.split(".")
        diffusion = spaced(package, "cosine", 1000, "10", **options(package, mean, variance))
        torch.manual_seed(entry("bpd")["torch_seed"])
        bits = diffusion.calc_bpd_loop(
            toy_model(diffusion), stored("bpd", "in.x_start"), clip_denoised=clip == "clip1"
        )
        assert set(bits) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
        for key, values in bits.items():
            assert_close(values, "bpd", f"{case}.{key}")


@pytest.mark.parametrize("case", data("timesteps_seen"), ids=str)
def test_timesteps_seen(case: dict[str, Any]) -> None:
    package, steps = case["package"], case["steps"]
    rescale = {"rescale_timesteps": case["rescale_timesteps"]} if package != "glide_text2im" else {}
    if case["cls"] == "GaussianDiffusion":
        diffusion = plain(package, "cosine", steps, **rescale)
    else:
        diffusion = spaced(package, "cosine", steps, case["respacing"], **rescale)
    seen: dict[str, Tensor] = {}
    t = torch.tensor(case["t"])
    x = torch.zeros(len(t), 3, 4, 4)

    def model(x: Tensor, timesteps: Tensor, *, name: str) -> Tensor:
        seen[name] = timesteps
        return torch.zeros(len(x), 6 if name != "cond_fn" else 3, 4, 4)

    out = diffusion.p_mean_variance(model, x, t, model_kwargs={"name": "model"})
    diffusion.condition_mean(model, out, x, t, model_kwargs={"name": "cond_fn"})
    diffusion.training_losses(model, x, t, model_kwargs={"name": "training"})
    for name, expected in case["seen"].items():
        assert str(seen[name].dtype) == f"torch.{expected['dtype']}"
        np.testing.assert_array_equal(seen[name], expected["values"])


@pytest.mark.parametrize(
    ("package", "case"), LOOPS, ids=lambda part: part if isinstance(part, str) else part["name"]
)
def test_loops(package: str, case: dict[str, Any]) -> None:
    given, arguments, shape = case["diffusion"], dict(case["arguments"]), (2, 3, 8, 8)
    diffusion = spaced(
        package,
        given["name"],
        given["steps"],
        given["respacing"],
        **options(package, given["mean"], given["var"]),
        **({"rescale_timesteps": True} if given["rescale"] else {}),
    )
    model = toy_model(diffusion)
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
    for key in data("toy_loops"):
        if key.startswith(f"{case['name']}.step"):
            assert_close(steps[int(key.rpartition("step")[2])]["sample"], "toy_loops", key)


@every
def test_loops_return_the_last_step_and_take_upstreams_positions(package: str) -> None:
    diffusion = spaced(package, "cosine", 100, "5")
    model, shape, noise = toy_model(diffusion), (2, 3, 8, 8), normal("x", (2, 3, 8, 8), 0)
    cond_fn = [] if package == "improved_diffusion" else [None]
    for loop, extra in (("p_sample_loop", []), ("ddim_sample_loop", [0.5])):
        arguments = [shape, noise, False, None, *cond_fn, None, "cpu", True, *extra]
        torch.manual_seed(0)
        picture = getattr(diffusion, loop)(model, *arguments)
        torch.manual_seed(0)
        *_, last = getattr(diffusion, f"{loop}_progressive")(model, *arguments)
        assert torch.equal(picture, last["sample"])
        assert not picture.requires_grad
        assert ("cond_fn" in inspect.signature(getattr(diffusion, loop)).parameters) == bool(cond_fn)
    if package == "improved_diffusion":
        with pytest.raises(TypeError, match="cond_fn"):
            diffusion.p_sample_loop(model, shape, cond_fn=torch.zeros_like)


@every
def test_a_subclass_may_override_the_step(package: str) -> None:
    class Halved(PACKAGES[package][1].SpacedDiffusion):  # type: ignore[name-defined]
        def p_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_sample(*args, **kwargs)
            return {**out, "sample": torch.full_like(out["sample"], 0.5)}

    betas = betas_of(package, "cosine", 20)
    diffusion = Halved(use_timesteps=range(20), betas=betas, **options(package))
    assert torch.equal(
        diffusion.p_sample_loop(toy_model(diffusion), (1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.5)
    )


@every
def test_reversal_is_deterministic_only(package: str) -> None:
    with pytest.raises(ValueError, match=r"eta 0\.5 must be 0"):
        plain(package).ddim_reverse_sample(None, torch.zeros(SHAPE), torch.zeros(4).long(), eta=0.5)
