"""What a batch holds: captions, some dropped, and the degraded small pictures of the upsampler."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glide_fast.data.folder import load_folder
from glide_fast.data.images import to_tensor
from glide_fast.models import ModelConfig
from glide_fast.text.tokenizer import embedded_tokenizer
from glide_fast.training.config import LowResConfig, SampleConfig
from glide_fast.training.draws import Draws
from glide_fast.training.loop import Trainer
from glide_fast.training.tasks import DiffusionTask, UpsamplerTask
from glide_fast.training.tasks.diffusion import degrade, gaussian_blur, mirror, shrink
from tests.training.tiny import CAPTIONS, SIZE, tiny_config, tiny_unet


def draws(count: int, seed: int = 0) -> Draws:
    return Draws.of_step(seed, 0, count, slice(None))


def base_task(pictures: Path, caption_drop: float) -> DiffusionTask:
    return DiffusionTask(tiny_config(pictures, caption_drop=caption_drop), None)


def test_a_batch_holds_the_pictures_and_captions_of_its_rows(pictures: Path) -> None:
    task = base_task(pictures, 0.0)
    chosen = load_folder(pictures, SIZE).select([1, 0, 1])
    batch = task.batch(chosen, draws(3))
    assert batch.tokens is not None
    assert batch.mask is not None
    assert torch.equal(batch.x_start, to_tensor(chosen.images))
    decode = embedded_tokenizer().decode
    assert [decode(tokens.tolist()) for tokens in batch.tokens] == ["sun", "red apple", "sun"]
    assert batch.mask.sum(1).tolist() == [1, 2, 1]
    assert batch.low_res is None


def test_captions_are_dropped_at_the_configured_rate(pictures: Path) -> None:
    task = base_task(pictures, 0.2)
    batch = task.batch(load_folder(pictures, SIZE).select([0] * 10_000), draws(10_000))
    assert batch.tokens is not None
    assert batch.mask is not None
    dropped = ~batch.mask.any(1)
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.02)  # 5 standard deviations
    assert (batch.tokens[dropped] == embedded_tokenizer().end_token).all()


def test_no_caption_is_dropped_at_rate_zero(pictures: Path) -> None:
    chosen = load_folder(pictures, SIZE).select([0] * 10_000)
    batch = base_task(pictures, 0.0).batch(chosen, draws(10_000))
    assert batch.mask is not None
    assert batch.mask.any(1).all()


def test_the_upsampler_sees_half_the_size_and_otherwise_the_same_batch(pictures: Path) -> None:
    config = tiny_config(pictures, task="upsampler")
    task = UpsamplerTask(config, load_folder(pictures, SIZE))
    count = len(CAPTIONS)
    batch = task.batch(load_folder(pictures, SIZE), draws(count))
    assert batch.low_res is not None
    assert batch.low_res.shape == (count, 3, SIZE // 2, SIZE // 2)
    plain = base_task(pictures, config.caption_drop).batch(load_folder(pictures, SIZE), draws(count))
    assert torch.equal(batch.x_start, plain.x_start)
    assert batch.tokens is not None
    assert plain.tokens is not None
    assert torch.equal(batch.tokens, plain.tokens)
    part = batch.part(slice(2, 5))
    assert part.low_res is not None
    assert torch.equal(part.low_res, batch.low_res[2:5])
    assert part.mask is not None
    assert batch.mask is not None
    assert torch.equal(part.mask, batch.mask[2:5])


def test_mirrored_pictures_are_half_of_them() -> None:
    pictures = torch.arange(600.0).view(200, 1, 1, 3)
    mirrored = mirror(pictures, draws(200))
    exchanged = (mirrored == pictures.flip(3)).all(3).flatten()
    assert torch.equal(mirrored[~exchanged], pictures[~exchanged])
    assert 70 <= int(exchanged.sum()) <= 130  # 4 standard deviations


def test_the_draws_of_a_picture_do_not_depend_on_who_takes_the_others() -> None:
    together = Draws.of_step(3, 7, 6, slice(None))
    expected = [together.normal(2, 3), together.uniform(), together.normal(1)]
    for part in (slice(0, 2), slice(2, 6)):
        alone = Draws.of_step(3, 7, 6, part)
        for found, all_rows in zip(
            [alone.normal(2, 3), alone.uniform(), alone.normal(1)], expected, strict=True
        ):
            assert torch.equal(found, all_rows[part])
    assert not torch.equal(Draws.of_step(3, 8, 6, slice(None)).normal(2, 3), expected[0])
    assert len({tuple(row.flatten().tolist()) for row in expected[0]}) == 6


def test_halving_is_the_mean_of_two_by_two_pixels_in_eight_bits() -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    halved = (shrink(to_tensor(values), 2) + 1) * 127.5
    means = values.reshape(4, 3, 2, 3, 2, 3).astype(np.float64).mean((2, 4)).transpose(0, 3, 1, 2)
    assert torch.equal(halved.round(), halved.round().clamp(0, 255))
    torch.testing.assert_close(halved, halved.round(), rtol=0, atol=1e-4)
    assert np.abs(halved.numpy() - means).max() <= 0.5 + 1e-4


def test_without_blur_and_noise_nothing_is_degraded() -> None:
    pictures = draws(5).uniform(3, 8, 8) * 2 - 1
    unchanged = degrade(pictures, LowResConfig(blur=0.0, noise=0.0), draws(5))
    torch.testing.assert_close(unchanged, pictures, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6, 2.0])
def test_blur_keeps_constant_pictures(sigma: float) -> None:
    pictures = torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1).expand(2, 3, 7, 5).contiguous()
    blurred = gaussian_blur(pictures, torch.full((2, 1, 1, 1), sigma))
    torch.testing.assert_close(blurred, pictures, rtol=0, atol=1e-6)


def test_blur_is_a_gaussian_of_the_given_width_for_each_picture() -> None:
    impulse = torch.zeros(2, 1, 9, 9)
    impulse[:, :, 4, 4] = 1.0
    blurred = gaussian_blur(impulse, torch.tensor([0.0, 0.6]).view(2, 1, 1, 1))
    torch.testing.assert_close(blurred[0], impulse[0])
    offsets = torch.arange(-2, 3)
    line = torch.exp(-offsets.double().square() / (2 * 0.6**2))
    expected = torch.outer(line, line) / line.sum() ** 2
    torch.testing.assert_close(blurred[1, 0, 2:7, 2:7].double(), expected, rtol=1e-5, atol=1e-7)
    assert blurred[1, 0].sum() == pytest.approx(1.0, abs=1e-6)


def test_noise_is_as_strong_as_allowed_and_differs_between_pictures() -> None:
    noisy = degrade(torch.zeros(400, 3, 16, 16), LowResConfig(blur=0.0, noise=0.1), draws(400))
    deviations = noisy.flatten(1).std(1)
    assert float(deviations.max()) < 0.1 * 1.15  # 768 numbers a picture: 2.6 % of sampling error
    assert float(deviations.min()) < 0.01
    assert float(deviations.mean()) == pytest.approx(0.05, abs=0.005)


def test_degradation_depends_on_the_draws_alone() -> None:
    pictures = draws(3).uniform(3, 8, 8)
    first = degrade(pictures, LowResConfig(), draws(3, 4))
    torch.rand(10)
    assert torch.equal(degrade(pictures, LowResConfig(), draws(3, 4)), first)
    assert not torch.equal(degrade(pictures, LowResConfig(), draws(3, 5)), first)


@pytest.mark.parametrize("task", ["base", "upsampler"])
def test_samples_are_one_picture_a_prompt_and_always_the_same(pictures: Path, task: str) -> None:
    kind = {"base": DiffusionTask, "upsampler": UpsamplerTask}[task]
    config = tiny_config(pictures, task=task)
    learned = kind(config, load_folder(pictures, SIZE))
    torch.manual_seed(0)
    state = learned.network().state_dict()
    first, second = learned.samples(state), learned.samples(state)
    assert first is not None
    assert second is not None
    assert first.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(second, first)


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(pictures: Path, tmp_path: Path) -> None:
    unet = tiny_unet()
    assert unet.text is not None
    wrong = replace(unet, text=replace(unet.text, vocabulary=100))
    config = tiny_config(pictures, model=ModelConfig(unet=wrong, steps=20))
    size = embedded_tokenizer().size
    with pytest.raises(ValueError, match=rf"text\.vocabulary 100 is not the size .*'embedded'; use {size}"):
        Trainer(config, tmp_path)


def test_an_unknown_tokenizer_is_refused(pictures: Path, tmp_path: Path) -> None:
    unet = tiny_unet()
    assert unet.text is not None
    wrong = replace(unet, text=replace(unet.text, tokenizer="klingon"))
    with pytest.raises(ValueError, match=re.escape("tokenizer 'klingon' is unknown")):
        Trainer(tiny_config(pictures, model=ModelConfig(unet=wrong, steps=20)), tmp_path)


def test_a_sample_prompt_that_is_no_caption_is_refused_before_the_upsampler_trains(
    pictures: Path, tmp_path: Path
) -> None:
    samples = SampleConfig(prompts=("sun", "moon"), steps=2)
    with pytest.raises(ValueError, match=r"samples\.prompts: 'moon' is not a caption"):
        Trainer(tiny_config(pictures, task="upsampler", samples=samples), tmp_path)
