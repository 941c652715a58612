"""Guidance along gradients: what it does to a known distribution, how kinds combine, and its errors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast.diffusion.process import GaussianDiffusion
from glide_fast.diffusion.schedule import Schedule
from glide_fast.models.clip import CLIP, CLIPConfig, VisionTransformerConfig
from glide_fast.models.encoder import EncoderConfig, EncoderUNet
from glide_fast.models.noisy_clip import NoisyCLIP, NoisyCLIPConfig
from glide_fast.models.trunk import UNetConfig
from glide_fast.models.unet import UNet
from glide_fast.sampling import (
    SAMPLERS,
    along_gradient,
    classifier_free,
    classifier_gradient,
    clip_gradient,
    gradient_of,
    noisy_clip_gradient,
    within,
)
from glide_fast.sampling.gradients import clip_pixels
from glide_fast.sampling.guidance import GradientFunction, ScoreGuidedDiffusion
from glide_fast.sampling.samplers import ddim
from tests.golden import fill, normal
from tests.sampling.toy import toy_denoiser

SHAPE = (2, 3, 8, 8)
SCHEDULE = Schedule.create("cosine", 1000, "50")


def diffusion_of(mean_type: Any = "epsilon") -> GaussianDiffusion:
    return GaussianDiffusion(schedule=SCHEDULE, mean_type=mean_type)


def push(x: Tensor, timesteps: Tensor) -> Tensor:
    return 0.2 - 0.5 * x + timesteps.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("mean_type", ["epsilon", "x_start", "previous_x"])
def test_every_kind_of_prediction_moves_the_same_way(mean_type: Any) -> None:
    """x_0 moves by (1 - alpha_bar) / sqrt(alpha_bar) times the gradient: epsilon moved, DDPM's equation 4."""
    diffusion = diffusion_of(mean_type)
    t = torch.tensor([10, 30])
    timesteps = diffusion.model_timesteps(t)
    x, output = normal("x", SHAPE, 0), normal("output", (2, 6, 8, 8), 0)
    guided = along_gradient(lambda *_: output, push, diffusion)(x, timesteps)
    before, after = (
        diffusion.predict(each, x, t, clip_denoised=False).x_start.double() for each in (output, guided)
    )
    kept = torch.from_numpy(SCHEDULE.alphas_cumprod)[t].view(-1, 1, 1, 1)
    expected = before + (1 - kept) / kept.sqrt() * push(x, timesteps)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(guided[:, 3:], output[:, 3:])


def test_without_clipping_it_is_the_published_guidance_of_ddim() -> None:
    plain = diffusion_of()
    published = ScoreGuidedDiffusion(schedule=SCHEDULE, gradient=push)
    x, denoise = normal("x", SHAPE, 0), toy_denoiser(plain)
    torch.testing.assert_close(
        ddim(along_gradient(denoise, push, plain), x, plain, clip_denoised=False),
        ddim(denoise, x, published, clip_denoised=False),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_by_bayes_rule_reaches_the_posterior(name: str) -> None:
    """Pictures N(0, 1), seen as y = x_0 + noise of variance 1: guided by p(y | x_t) they are N(y/2, 1/2)."""
    diffusion = GaussianDiffusion(
        schedule=Schedule.create("linear", 1000, "200"), variance_type="fixed_small"
    )
    levels = torch.from_numpy(Schedule.create("linear", 1000).alphas_cumprod)
    observed = 0.8

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        return (1 - levels[timesteps]).sqrt().float().view(-1, 1, 1, 1) * x

    def log_likelihood(x: Tensor, timesteps: Tensor) -> Tensor:
        kept = levels[timesteps].float().view(-1, 1, 1, 1)
        # x_0 given x_t is N(sqrt(kept) x, 1 - kept), so y given x_t is N(sqrt(kept) x, 2 - kept).
        return (-((observed - kept.sqrt() * x) ** 2) / (2 * (2 - kept))).flatten(1).sum(1)

    guided = along_gradient(denoise, gradient_of(log_likelihood), diffusion)
    torch.manual_seed(0)
    found = SAMPLERS[name](guided, torch.randn(1, 3, 64, 64), diffusion, clip_denoised=False)
    assert abs(float(found.mean()) - observed / 2) < 0.03
    assert abs(float(found.std()) - math.sqrt(0.5)) < 0.03


def test_the_gradient_is_the_scores() -> None:
    x, timesteps = normal("x", SHAPE, 0), torch.tensor([3, 7])
    with torch.inference_mode():
        found = gradient_of(lambda x, t: (x**3 * t.view(-1, 1, 1, 1)).flatten(1).sum(1), 2.0)(x, timesteps)
    torch.testing.assert_close(found, 6 * x**2 * timesteps.view(-1, 1, 1, 1))


def finite_everywhere(gradient: GradientFunction, shape: tuple[int, ...]) -> None:
    """Also in inference mode, at every tenth timestep, and not zero."""
    with torch.inference_mode():
        for timestep in (*range(0, 1000, 100), 999):
            x = normal("x", shape, timestep)
            found = gradient(x, torch.full((shape[0],), timestep))
            assert found.shape == x.shape
            assert found.dtype == torch.float32
            assert torch.isfinite(found).all()
            assert float(found.abs().max()) > 0


def filled(model: nn.Module) -> Any:
    return fill(model, 3).eval()


def tiny_unet(**changes: Any) -> UNetConfig:
    return UNetConfig(
        image_size=8,
        channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        attention_strides=(2,),
        head_channels=32,
        **changes,
    )


def tiny_classifier() -> Any:
    return filled(EncoderUNet(EncoderConfig(trunk=tiny_unet(out_channels=10))))


def test_the_readmes_example_runs() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "along_" in block
    )
    small = example.replace("256, 256", "8, 8").replace('"50"', '"5"')
    names = {
        "network": filled(UNet(tiny_unet(classes=10))),
        "classifier": tiny_classifier(),
        "labels": torch.tensor([1, 2, 3, 4]),
    }
    exec(compile(small, "README.md", "exec"), names)
    assert names["pictures"].shape == (4, 3, 8, 8)
    assert names["pictures"].isfinite().all()


def test_classifier_guidance() -> None:
    classifier = tiny_classifier()
    labels = torch.tensor([4, 7])
    finite_everywhere(classifier_gradient(classifier, labels, 10.0), SHAPE)
    x, timesteps = normal("x", SHAPE, 0), torch.tensor([500, 500])
    gradient = classifier_gradient(classifier, labels)(x, timesteps)
    higher, lower = (
        classifier(x + sign * 1e-3 * gradient, timesteps).log_softmax(1)[[0, 1], labels] for sign in (1, -1)
    )
    expected = gradient.square().sum((1, 2, 3))
    torch.testing.assert_close((higher - lower) / 2e-3, expected, rtol=0.02, atol=1e-4)


def test_noisy_clip_guidance() -> None:
    config = NoisyCLIPConfig(
        embedding=16,
        image_size=8,
        patch_size=4,
        image_heads=2,
        image_head_channels=8,
        image_layers=1,
        text_heads=2,
        text_head_channels=8,
        text_layers=1,
        context=8,
        vocabulary=32,
        timesteps=1000,
    )
    clip = filled(NoisyCLIP(config))
    text = clip.text_embeddings(torch.arange(16).view(2, 8), torch.tensor([5, 8]))
    finite_everywhere(noisy_clip_gradient(clip, text), SHAPE)


def tiny_clip() -> Any:
    config = CLIPConfig(
        embedding=16,
        image_size=16,
        vision=VisionTransformerConfig(width=64, layers=1, patch_size=8),
        width=32,
        layers=1,
        heads=2,
        context=8,
        vocabulary=32,
    )
    return filled(CLIP(config))


def test_clip_guidance_through_x_start() -> None:
    clip, diffusion = tiny_clip(), GaussianDiffusion(schedule=Schedule.create("cosine", 1000))
    text = clip.encode_text(torch.arange(16).view(2, 8))
    denoise = toy_denoiser(diffusion)
    finite_everywhere(clip_gradient(clip, text, denoise, diffusion), SHAPE)


def test_clip_guidance_raises_the_similarity() -> None:
    clip, diffusion = tiny_clip(), diffusion_of("x_start")
    text = clip.encode_text(torch.arange(16).view(2, 8)).detach()

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        kept = torch.from_numpy(SCHEDULE.alphas_cumprod)[diffusion.steps_of(timesteps)].float()
        return torch.cat([kept.sqrt().view(-1, 1, 1, 1) * x, torch.zeros_like(x)], 1)

    def similarity(pictures: Tensor) -> Tensor:
        return torch.cosine_similarity(clip.encode_image(clip_pixels(pictures, 16)), text)

    x = normal("x", SHAPE, 0)
    plain = ddim(denoise, x, diffusion)
    gradient = clip_gradient(clip, text, denoise, diffusion, scale=30.0)
    guided = ddim(along_gradient(denoise, gradient, diffusion), x, diffusion)
    assert (similarity(guided) > similarity(plain) + 0.05).all()


def test_clip_reads_normalised_pictures() -> None:
    white = clip_pixels(torch.ones(1, 3, 8, 8), 16)
    assert white.shape == (1, 3, 16, 16)
    expected = torch.tensor([(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258])
    torch.testing.assert_close(white[0, :2, 4, 4], expected)


def test_kinds_of_guidance_combine() -> None:
    diffusion = diffusion_of()
    plain = toy_denoiser(diffusion)
    mixed = classifier_free(lambda x, t: plain(x, t) * torch.linspace(1, 2, len(x)).view(-1, 1, 1, 1), 3.0)
    both = along_gradient(within(mixed, plain, first=200, last=700), push, diffusion)
    x = normal("x", SHAPE, 0)
    for timestep, inner in ((100, plain), (200, mixed), (700, mixed), (701, plain)):
        timesteps = torch.full((2,), timestep)
        nearest = SCHEDULE.timestep_map[diffusion.steps_of(timesteps)]
        timesteps = torch.from_numpy(nearest)
        inner = mixed if 200 <= int(timesteps[0]) <= 700 else plain
        expected = along_gradient(inner, push, diffusion)(x, timesteps)
        assert torch.equal(both(x, timesteps), expected)


def test_rescaled_guidance_has_the_conditional_contrast() -> None:
    x, timesteps = normal("x", SHAPE, 0), torch.tensor([500, 500])
    output = normal("output", (4, 6, 8, 8), 0)
    conditional = output[:2, :3]
    for rescale, expected in ((0.0, None), (1.0, conditional.flatten(1).std(1))):
        found = classifier_free(lambda *_: output, 6.0, rescale=rescale)(x, timesteps)[:, :3]
        plain = classifier_free(lambda *_: output, 6.0)(x, timesteps)[:, :3]
        if expected is None:
            assert torch.equal(found, plain)
        else:
            torch.testing.assert_close(found.flatten(1).std(1), expected)
            torch.testing.assert_close(
                torch.cosine_similarity(found.flatten(1), plain.flatten(1)), torch.ones(2)
            )


def test_errors_name_value_rule_and_fix() -> None:
    with pytest.raises(ValueError, match=r"guidance rescale 1.5 must lie in 0 .. 1; 0 leaves it out"):
        classifier_free(toy_denoiser(diffusion_of()), 3.0, rescale=1.5)
    with pytest.raises(ValueError, match=r"guidance interval 9 .. 3 is empty; 0 <= first <= last"):
        within(toy_denoiser(diffusion_of()), toy_denoiser(diffusion_of()), first=9, last=3)
