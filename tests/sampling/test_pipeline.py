"""From prompts to pictures with tiny random models: seeds, stages, known pixels and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glide_fast.models import LoadedModel, MaskedImage
from glide_fast.sampling import PerImageNoise
from glide_fast.sampling.pipeline import StageOptions, TextToImage, quantise, sample_stage
from tests import tiny

FEW = StageOptions(steps=4)
FEW_PLAIN = StageOptions(steps=4, guidance=1.0)


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return tiny.model(tiny.config())


@pytest.fixture(scope="module")
def both(base: LoadedModel) -> TextToImage:
    return TextToImage(base=base, upsampler=tiny.model(tiny.config(upsampler=True), seed=1))


def draw(stage: LoadedModel, prompts: list[str], seeds: list[int], options: StageOptions) -> torch.Tensor:
    return sample_stage(stage, prompts, noise=PerImageNoise(seeds), options=options)


def test_a_picture_does_not_depend_on_its_neighbours(both: TextToImage) -> None:
    prompts, seeds = ["red apple", "rocket", "dog face"], [5, 6, 7]
    together = both(prompts, seeds=seeds, base_options=FEW, upsampler_options=FEW_PLAIN)
    alone = both(["rocket"], seeds=[6], base_options=FEW, upsampler_options=FEW_PLAIN)
    assert together.shape == (3, tiny.SIZE, tiny.SIZE, 3)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1


def test_prompt_and_seed_both_matter(base: LoadedModel) -> None:
    apple = draw(base, ["red apple"], [0], FEW)
    assert torch.equal(apple, draw(base, ["red apple"], [0], FEW))
    assert not torch.equal(apple, draw(base, ["rocket"], [0], FEW))
    assert not torch.equal(apple, draw(base, ["red apple"], [1], FEW))


def test_guidance_zero_ignores_the_prompt_and_the_empty_prompt_is_unconditional(base: LoadedModel) -> None:
    ignored = draw(base, ["red apple"], [0], StageOptions(steps=4, guidance=0.0))
    empty = draw(base, [""], [0], FEW_PLAIN)
    torch.testing.assert_close(ignored, empty, rtol=0, atol=1e-5)


def test_guidance_one_is_the_plain_conditional_model(base: LoadedModel) -> None:
    guided = draw(base, ["rocket"], [0], StageOptions(steps=4, guidance=1.0 + 1e-9))
    torch.testing.assert_close(guided, draw(base, ["rocket"], [0], FEW_PLAIN), rtol=0, atol=1e-5)


def test_options_without_guidance_take_the_models_usual_scale(both: TextToImage) -> None:
    def paint(model: TextToImage, options: StageOptions) -> np.ndarray:
        return model(["rocket"], seeds=[0], base_options=options, upsampler_options=FEW_PLAIN)

    given = paint(both, StageOptions(steps=4, guidance=1.5))
    np.testing.assert_array_equal(paint(replace(both, guidance=1.5), FEW), given)
    assert (paint(both, FEW) != given).any()
    np.testing.assert_array_equal(paint(both, FEW), paint(both, StageOptions(steps=4, guidance=3.0)))


def test_the_upsampler_sees_the_quantised_base_picture_and_continues_the_noise(both: TextToImage) -> None:
    assert both.upsampler is not None
    noise = PerImageNoise([3])
    small = sample_stage(both.base, ["rocket"], noise=noise, options=FEW)
    options = StageOptions(steps=4, guidance=1.0, temperature=0.997)
    large = sample_stage(both.upsampler, ["rocket"], noise=noise, options=options, low_res=quantise(small))
    expected = ((large + 1) * 127.5).round().clamp(0, 255)
    picture = both(["rocket"], seeds=[3], base_options=FEW, upsampler_options=options)
    np.testing.assert_array_equal(picture[0], expected[0].permute(1, 2, 0).numpy())


def test_quantised_pictures_have_256_levels() -> None:
    values = quantise(torch.linspace(-1.2, 1.2, 1000))
    levels = (values + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert values.min() == -1
    assert values.max() == 1


def test_temperature_scales_the_first_noise(base: LoadedModel) -> None:
    cold = draw(base, ["rocket"], [0], StageOptions(steps=4, temperature=0.5))
    assert not torch.equal(cold, draw(base, ["rocket"], [0], FEW))


@pytest.mark.parametrize("steps", ["fast27", "10,15", 3])
def test_steps_may_be_a_number_or_a_respacing(base: LoadedModel, steps: int | str) -> None:
    counts = {"fast27": 27, "10,15": 25, 3: 3}
    assert StageOptions(steps=steps).diffusion(base.config).steps == counts[steps]


@pytest.mark.parametrize("inpaint", [False, True])
def test_known_pixels_are_kept_at_both_sizes(inpaint: bool) -> None:
    model = TextToImage(
        base=tiny.model(tiny.config(inpaint=inpaint)),
        upsampler=tiny.model(tiny.config(upsampler=True, inpaint=inpaint)),
    )
    image = quantise(torch.rand(1, 3, tiny.SIZE, tiny.SIZE) * 2 - 1)
    mask = torch.zeros(1, 1, tiny.SIZE, tiny.SIZE)
    mask[:, :, :, : tiny.SIZE // 2] = 1
    pictures = model(
        ["rocket"] * 2,
        seeds=[0, 1],
        base_options=FEW,
        upsampler_options=FEW_PLAIN,
        known=MaskedImage(image, mask),
    )
    kept = pictures[:, :, : tiny.SIZE // 2].astype(float) / 127.5 - 1
    expected = image[0, :, :, : tiny.SIZE // 2].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(kept, np.stack([expected, expected]), atol=1e-5)
    assert not np.array_equal(pictures[0], pictures[1])


def test_an_inpainting_model_sees_the_known_pixels() -> None:
    stage = tiny.model(tiny.config(inpaint=True))
    corner = torch.zeros(1, 1, tiny.BASE_SIZE, tiny.BASE_SIZE)
    corner[..., 0, 0] = 1
    pictures = [
        sample_stage(
            stage,
            ["rocket"],
            noise=PerImageNoise([0]),
            options=FEW,
            known=MaskedImage(torch.full((1, 3, tiny.BASE_SIZE, tiny.BASE_SIZE), value), corner),
        )
        for value in (-1.0, 1.0)
    ]
    assert (pictures[0] - pictures[1]).abs()[..., 1:, 1:].max() > 1e-3


def test_a_small_mask_knows_only_wholly_known_pixels(base: LoadedModel) -> None:
    image = torch.zeros(1, 3, tiny.SIZE, tiny.SIZE)
    mask = torch.zeros(1, 1, tiny.SIZE, tiny.SIZE)
    mask[..., :3, :] = 1  # rows 0 and 1 fill a small row, row 2 only half of one
    picture = TextToImage(base=base)(["rocket"], seeds=[0], base_options=FEW, known=MaskedImage(image, mask))
    grey = picture[0] == 128
    assert grey[0].all()
    assert not grey[1].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StageOptions(steps=1), r"steps 1 must lie in 2 \.\. 1000"),
        (StageOptions(steps=1001), r"steps 1001 must lie in 2 \.\. 1000"),
        (StageOptions(steps="often"), "respacing 'often' is not understood"),
        (StageOptions(guidance=-1.0), r"guidance scale -1\.0 must lie in 0 \.\. 100"),
        (StageOptions(guidance=float("nan")), "guidance scale nan must lie in"),
        (StageOptions(sampler="euler_a"), "unknown sampler 'euler_a'; known: ddpm, ddim, plms"),
        (StageOptions(temperature=0.0), r"temperature 0\.0 must lie in \(0, 2\]"),
    ],
)
def test_bad_options_say_the_allowed_range(base: LoadedModel, options: StageOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(base, ["rocket"], [0], options)


def test_prompts_and_seeds_come_in_pairs(base: LoadedModel) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds; give one seed a prompt"):
        TextToImage(base=base)(["rocket", "key"], seeds=[0])


def test_an_over_long_prompt_is_cut_with_a_warning_that_shows_what_was_kept(base: LoadedModel) -> None:
    words = " ".join(["red apple"] * 6)
    with pytest.warns(UserWarning, match=r"prompt of 12 tokens was cut to the model's 8; kept: 'red apple"):
        cut = draw(base, [words], [0], FEW_PLAIN)
    assert torch.equal(cut, draw(base, [" ".join(["red apple"] * 4)], [0], FEW_PLAIN))


def test_pictures_stay_near_the_range(base: LoadedModel) -> None:
    picture = draw(base, ["rocket"], [0], StageOptions(steps=20))
    assert torch.isfinite(picture).all()
    assert F.relu(picture.abs() - 1).max() < 0.1
