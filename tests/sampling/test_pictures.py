"""Whole pictures, as GLIDE's notebooks make them: same seed, same picture as the original on the CPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.diffusion.schedule import Schedule
from glide_fast.models import MaskedImage, UNet
from glide_fast.sampling.denoiser import initial_noise
from glide_fast.sampling.guidance import classifier_free
from glide_fast.sampling.inpainting import keep_known
from glide_fast.sampling.run import Sampler, Step
from glide_fast.sampling.samplers import ddim, ddpm
from tests.golden import assert_close, data, entry, fill, normal
from tests.models.upstream import glide_config
from tests.sampling.toy import RecordingNoise, expected_shapes

PICTURES = ["picture_text2im", "picture_inpaint"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The fixtures were computed with one thread, and networks this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(name: str, key: str) -> Tensor:
    return torch.from_numpy(data(name)[key])


def build(name: str, stage: str) -> tuple[UNet, GaussianDiffusion]:
    """The stage's model with its weights, and its diffusion."""
    options = entry(name)[f"{stage}_options"]
    model = UNet(glide_config(options)).eval()
    fill(model, entry(name)[f"{stage}_seed"])
    schedule = Schedule.create(
        options["noise_schedule"], options["diffusion_steps"], options["timestep_respacing"]
    )
    return model, GaussianDiffusion(schedule=schedule)


def known(name: str, size: int) -> MaskedImage | None:
    if name != "picture_inpaint":
        return None
    return MaskedImage(stored(name, f"in.image{size}"), stored(name, f"in.mask{size}"))


def sample_base(name: str, model: UNet, diffusion: GaussianDiffusion, noise: RecordingNoise) -> list[Step]:
    """The guided base stage on one row; the original draws noise for the unconditional row too."""
    tokens, mask, given = stored(name, "in.tokens"), stored(name, "in.mask"), known(name, 16)
    doubled = None if given is None else MaskedImage(*(torch.cat([part, part]) for part in given))

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = model(x, timesteps, tokens=tokens, mask=mask, known=doubled)
        return output

    steps: list[Step] = []
    ddpm(
        classifier_free(denoise, entry(name)["guidance_scale"]),
        initial_noise(noise, (1, 3, 16, 16)),
        diffusion,
        noise=noise,
        denoised_fn=None if given is None else keep_known(*given),
        callback=steps.append,
    )
    return steps


def sample_up(
    name: str, model: UNet, diffusion: GaussianDiffusion, low_res: Tensor, noise: RecordingNoise
) -> list[Step]:
    """The unguided upsampler on one row."""
    tokens, mask, given = stored(name, "in.tokens")[:1], stored(name, "in.mask")[:1], known(name, 32)

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = model(x, timesteps, tokens=tokens, mask=mask, low_res=low_res, known=given)
        return output

    steps: list[Step] = []
    sampler: Sampler = ddim if name == "picture_text2im" else ddpm
    sampler(
        denoise,
        initial_noise(noise, (1, 3, 32, 32), temperature=entry(name)["upsample_temp"]),
        diffusion,
        noise=noise,
        denoised_fn=None if given is None else keep_known(*given),
        callback=steps.append,
    )
    return steps


def assert_first_row_close(actual: Tensor, name: str, key: str) -> None:
    """Compare with the conditional row of the original's doubled batch."""
    tolerance: dict[str, Any] = entry(name)["arrays"][key]
    expected = data(name)[key][:1]
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=f"{name}/{key}"
    )


def to_levels(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round()


@pytest.mark.parametrize("name", PICTURES)
def test_picture(name: str) -> None:
    stages = build(name, "base"), build(name, "up")
    noises = RecordingNoise(factor=2), RecordingNoise()
    torch.manual_seed(entry(name)["torch_seed"])  # after building, which draws as well
    base = sample_base(name, *stages[0], noises[0])
    up = sample_up(name, *stages[1], stored(name, "low_res"), noises[1])
    following = torch.randn(4)
    assert noises[0].shapes + noises[1].shapes == expected_shapes(entry(name)["rng_calls"])
    for stage, steps, check in (("base", base, assert_first_row_close), ("up", up, assert_close)):
        assert len(steps) == entry(name)[f"{stage}_steps"]
        for key in data(name):
            if key.startswith(f"{stage}.step"):
                check(steps[int(key.rpartition("step")[2])].x, name, key)
        check(steps[-1].x, name, f"{stage}.final")
        check(steps[-1].x_start, name, f"{stage}.final_pred_xstart")
    assert_close(following, name, "rng_next")
    flips = (to_levels(base[-1].x) - to_levels(stored(name, "low_res"))).abs()
    assert flips.max() <= 1
    assert flips.mean() < 0.01
    levels = to_levels(up[-1].x).clamp(0, 255) - stored(name, "uint8").float()
    assert levels.abs().max() <= 1
    assert levels.abs().mean() < 0.01


def test_known_pixels_of_the_picture_stay_exactly() -> None:
    given = known("picture_inpaint", 32)
    assert given is not None
    low_res = normal("low_res", (1, 3, 16, 16), 0).clamp(-1, 1)
    steps = sample_up("picture_inpaint", *build("picture_inpaint", "up"), low_res, RecordingNoise())
    painted = given.mask.expand_as(given.image) == 1
    assert painted.any()
    assert torch.equal(steps[-1].x[painted], given.image[painted])
