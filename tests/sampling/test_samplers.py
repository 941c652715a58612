"""Loops on the toy model against the original's numbers; properties; errors."""

from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion, VarianceType
from glide_fast.diffusion.schedule import Schedule
from glide_fast.sampling.denoiser import PerImageNoise, global_noise, initial_noise
from glide_fast.sampling.guidance import MeanGuidedDiffusion, ScoreGuidedDiffusion
from glide_fast.sampling.run import Sampler, Step
from glide_fast.sampling.samplers import SAMPLERS, ddim, ddim_encode, ddpm, find_sampler
from tests.diffusion.test_process import MEAN_TYPES
from tests.golden import assert_close, data, entry, normal
from tests.sampling.toy import RecordingNoise, expected_shapes, toy_denoiser

SHAPE = (2, 3, 8, 8)
CASES = entry("toy_loops")["cases"]
SHORT = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, "6"))
CPU = torch.device("cpu")


def toy_gradient(x: Tensor, timesteps: Tensor) -> Tensor:
    return 0.2 - 0.5 * x + 0.1 * torch.cos(timesteps.float().view(-1, 1, 1, 1) / 100)


def build_diffusion(case: dict[str, Any]) -> GaussianDiffusion:
    options = case["diffusion"]
    kind: Any = GaussianDiffusion
    if "cond_fn" in case["arguments"]:
        guided = MeanGuidedDiffusion if case["loop"] == "p_sample_loop" else ScoreGuidedDiffusion
        kind = partial(guided, gradient=toy_gradient)
    return cast(
        GaussianDiffusion,
        kind(
            schedule=Schedule.create(options["name"], options["steps"], options["respacing"]),
            mean_type=MEAN_TYPES[options["mean"]],
            variance_type=cast(VarianceType, options["var"].lower()),
            rescale_timesteps=options["rescale"],
        ),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_toy_loops(case: dict[str, Any]) -> None:
    arguments, diffusion, noise = case["arguments"], build_diffusion(case), RecordingNoise()
    steps: list[Step] = []
    common: dict[str, Any] = {
        "clip_denoised": arguments.get("clip_denoised", True),
        "callback": steps.append,
    }
    torch.manual_seed(case["torch_seed"])
    x = initial_noise(noise, SHAPE, temperature=0.997 if "noise" in arguments else 1.0)
    denoise = toy_denoiser(diffusion)
    if case["loop"] == "p_sample_loop":
        denoised_fn = (lambda x: 0.9 * x) if "denoised_fn" in arguments else None
        final = ddpm(denoise, x, diffusion, noise=noise, denoised_fn=denoised_fn, **common)
    elif case["loop"] == "ddim_sample_loop":
        final = ddim(denoise, x, diffusion, noise=noise, eta=arguments["eta"], **common)
    else:
        final = ddim_encode(denoise, x.clamp(-1, 1), diffusion, **common)
    assert len(steps) == case["steps"]
    assert noise.shapes == expected_shapes(case["rng_calls"])
    assert_close(final, "toy_loops", f"{case['name']}.final")
    assert_close(steps[-1].x_start, "toy_loops", f"{case['name']}.final_pred_xstart")
    assert_close(torch.randn(4), "toy_loops", f"{case['name']}.rng_next")
    for key in data("toy_loops"):
        if key.startswith(f"{case['name']}.step"):
            assert_close(steps[int(key.rpartition("step")[2])].x, "toy_loops", key)


def test_steps_report_their_training_timesteps() -> None:
    steps: list[Step] = []
    ddpm(toy_denoiser(SHORT), normal("x", SHAPE, 0), SHORT, callback=steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4, 5]
    assert [step.timestep for step in steps] == [999, 799, 599, 400, 200, 0]


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_respacing_to_every_step_is_no_respacing(sampler: Sampler) -> None:
    pictures = []
    for respacing in ("", "30", [30]):
        diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 30, respacing))
        noise = PerImageNoise([4, 5])
        x = initial_noise(noise, SHAPE)
        pictures.append(sampler(toy_denoiser(diffusion), x, diffusion, noise=noise))
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**63), other=st.integers(0, 2**63))
def test_ddim_without_eta_depends_on_the_start_only(seed: int, other: int) -> None:
    x, denoise = normal("x", SHAPE, 0), toy_denoiser(SHORT)
    first = ddim(denoise, x, SHORT, noise=PerImageNoise([seed, seed]))
    assert torch.equal(first, ddim(denoise, x, SHORT, noise=PerImageNoise([other, seed])))


def test_ddim_encode_finds_the_start_again() -> None:
    """With the exact denoiser of pictures that are normal with standard deviation 1/2."""
    diffusion = GaussianDiffusion(schedule=Schedule.create("linear", 1000), variance_type="fixed_small")
    levels = torch.from_numpy(Schedule.create("linear", 1000).alphas_cumprod).float()

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        alpha = levels[timesteps].view(-1, 1, 1, 1)
        return torch.sqrt(1 - alpha) * x / (1 - 0.75 * alpha)

    picture = 0.5 * normal("x", SHAPE, 0)
    code = ddim_encode(denoise, picture, diffusion, clip_denoised=False)
    again = ddim(denoise, code, diffusion, clip_denoised=False)
    torch.testing.assert_close(again, picture, rtol=0.01, atol=0.001)


@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=1.0), ddim])
@settings(deadline=None, max_examples=15)
@given(seeds=st.lists(st.integers(0, 2**63), min_size=2, max_size=4), data=st.data())
def test_a_picture_does_not_depend_on_its_batch(
    sampler: Sampler, seeds: list[int], data: st.DataObject
) -> None:
    def pictures(some: list[int]) -> Tensor:
        noise = PerImageNoise(some)
        return sampler(toy_denoiser(SHORT), initial_noise(noise, (len(some), *SHAPE[1:])), SHORT, noise=noise)

    chosen = data.draw(st.integers(0, len(seeds) - 1))
    torch.testing.assert_close(pictures(seeds)[chosen], pictures([seeds[chosen]])[0], rtol=1e-5, atol=1e-6)


def test_per_image_noise_is_bit_equal_in_any_batch() -> None:
    together = PerImageNoise([3, 8, 1])
    alone = PerImageNoise([8])
    for _ in range(3):
        assert torch.equal(together((3, 3, 5, 7), CPU)[1], alone((1, 3, 5, 7), CPU)[0])


def test_global_noise_is_the_stream_of_randn_like() -> None:
    torch.manual_seed(0)
    expected = torch.randn_like(torch.empty(SHAPE))
    torch.manual_seed(0)
    assert torch.equal(global_noise(SHAPE, CPU), expected)


@pytest.mark.parametrize("sampler", [ddpm, ddim, partial(ddim, eta=0.7)])
def test_memory_format_of_model_and_start_do_not_matter(sampler: Sampler) -> None:
    x = normal("x", SHAPE, 0)
    plain = toy_denoiser(SHORT)

    def channels_last(x: Tensor, timesteps: Tensor) -> Tensor:
        return plain(x, timesteps).contiguous(memory_format=torch.channels_last)

    torch.manual_seed(1)
    expected = sampler(plain, x, SHORT)
    torch.manual_seed(1)
    given = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sampler(channels_last, given, SHORT), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_result_is_a_normal_tensor_and_the_start_is_untouched(sampler: Sampler) -> None:
    x = normal("x", SHAPE, 0)
    before = x.clone()
    picture = sampler(toy_denoiser(SHORT), x, SHORT)
    assert not picture.is_inference()
    picture.mul_(2).requires_grad_()
    assert torch.equal(x, before)


def test_gradient_guidance_may_use_autograd() -> None:
    def gradient(x: Tensor, timesteps: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            phase = timesteps.clone().float().view(-1, 1, 1, 1) / 100
            log_probability = (0.2 * x - 0.25 * x**2 + 0.1 * torch.cos(phase) * x).sum()
            return torch.autograd.grad(log_probability, x)[0]

    x = normal("x", SHAPE, 0)
    pictures = []
    for function in (gradient, toy_gradient):
        diffusion = ScoreGuidedDiffusion(schedule=SHORT.schedule, gradient=function)
        pictures.append(ddim(toy_denoiser(diffusion), x, diffusion))
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [MeanGuidedDiffusion, ScoreGuidedDiffusion])
def test_conditioning(guided: type[MeanGuidedDiffusion | ScoreGuidedDiffusion]) -> None:
    diffusion = guided(
        schedule=Schedule.create("linear", 1000, "20"),
        gradient=lambda x, timesteps: 0.3 - 1.5 * x + timesteps.view(-1, 1, 1, 1) / 1000,
    )
    x, output = normal("x_t", (4, 3, 4, 4), 301), normal("model_output", (4, 6, 4, 4), 301)
    prediction = diffusion.predict(output, x, torch.from_numpy(data("conditioning")["in.t"]))
    if guided is MeanGuidedDiffusion:
        assert_close(prediction.mean, "conditioning", "condition_mean")
    else:
        assert_close(prediction.mean, "conditioning", "condition_score.mean")
        assert_close(prediction.x_start, "conditioning", "condition_score.pred_xstart")


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x = normal("x", SHAPE, 0)
    ddpm(toy_denoiser(SHORT), x, SHORT)
    assert capsys.readouterr().err == ""
    ddpm(toy_denoiser(SHORT), x, SHORT, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_empty_batch() -> None:
    assert ddpm(toy_denoiser(SHORT), torch.empty(0, 3, 8, 8), SHORT).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta .* must lie in \[0, 1\]; 0 is deterministic"):
        ddim(toy_denoiser(SHORT), normal("x", SHAPE, 0), SHORT, eta=eta)


def test_errors_name_value_rule_and_fix() -> None:
    x = normal("x", SHAPE, 0)
    with pytest.raises(ValueError, match="unknown sampler 'euler_a'; known: ddpm, ddim, plms, euler"):
        find_sampler("euler_a")
    with pytest.raises(ValueError, match=r"float16 .*keep float32 .*use initial_noise, or x.float\(\)"):
        ddpm(toy_denoiser(SHORT), x.half(), SHORT)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) but x .* needs \(2, 6, 8, 8\)"):
        ddpm(lambda x, _: x, x, SHORT)
    with pytest.raises(ValueError, match="noise for 2 pictures wanted but there are 3 seeds"):
        ddpm(toy_denoiser(SHORT), x, SHORT, noise=PerImageNoise([1, 2, 3]))
    for temperature in (0.0, 2.5, float("nan")):
        with pytest.raises(ValueError, match=r"temperature .* must lie in \(0, 2\]"):
            initial_noise(global_noise, SHAPE, temperature=temperature)
