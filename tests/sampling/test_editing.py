"""Pictures out of a picture from Python: what is kept, what the strength means, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glide_fast.data.images import to_tensor, to_uint8
from glide_fast.models import LoadedModel
from glide_fast.sampling import PerImageNoise, ddim, start_from
from glide_fast.sampling.editing import inpaint, upscale, vary
from glide_fast.sampling.pipeline import StageOptions, TextToImage, sample_stage
from tests import tiny

FEW = StageOptions(steps=6, guidance=1.0)
SIZE, SMALL = tiny.SIZE, tiny.BASE_SIZE


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return tiny.model(tiny.config(inpaint=True))


@pytest.fixture(scope="module")
def enlarger() -> LoadedModel:
    return tiny.model(tiny.config(upsampler=True), seed=1)


def picture(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)


def left_half(size: int) -> np.ndarray:
    known = np.zeros((size, size), dtype=np.bool_)
    known[:, : size // 2] = True
    return known


def test_every_known_pixel_comes_back_and_the_prompt_paints_the_rest(
    base: LoadedModel, enlarger: LoadedModel
) -> None:
    model, shown = TextToImage(base=base, upsampler=enlarger), picture(SIZE)
    known = np.random.default_rng(1).random((SIZE, SIZE)) < 0.5
    painted = inpaint(
        model, shown, known, ["key", "sun"], seeds=[0, 0], base_options=FEW, upsampler_options=FEW
    )
    for each in painted:
        np.testing.assert_array_equal(each[known], shown[known])
    assert (painted[0] != painted[1]).any()


def test_an_inpainting_model_looks_at_the_picture(base: LoadedModel) -> None:
    model, known = TextToImage(base=base), left_half(SMALL)
    shown = picture(SMALL)
    other = np.where(known[..., None], 255 - shown, shown)
    first, second = (
        inpaint(model, each, known, ["key"], seeds=[0], base_options=FEW) for each in (shown, other)
    )
    assert (first[:, :, SMALL // 2 :] != second[:, :, SMALL // 2 :]).any()


def test_unknown_pixels_of_the_picture_do_not_matter(base: LoadedModel) -> None:
    model, known, shown = TextToImage(base=base), left_half(SMALL), picture(SMALL)
    hidden = np.where(known[..., None], shown, 255 - shown)
    first, second = (
        inpaint(model, each, known, ["key"], seeds=[0], base_options=FEW) for each in (shown, hidden)
    )
    np.testing.assert_array_equal(first, second)


def test_a_variation_is_the_last_steps_from_the_noised_picture(base: LoadedModel) -> None:
    shown, network = picture(SMALL), base.network
    found = vary(TextToImage(base=base), shown, [""], seeds=[4], strength=0.5, base_options=FEW)
    noise = PerImageNoise([4])
    x, rest = start_from(to_tensor(shown)[None], FEW.diffusion(base.config), 0.5, noise=noise)
    assert rest.steps == 3
    text = network.text(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool))
    expected = ddim(lambda x, t: network(x, t, text=text), x, rest, noise=noise)
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1


def test_a_variation_begins_with_the_picture_averaged_to_the_base_models_size(
    base: LoadedModel, enlarger: LoadedModel
) -> None:
    small = picture(SMALL)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    alone = vary(TextToImage(base=base), small, ["key"], seeds=[1], base_options=FEW)
    both = TextToImage(base=base, upsampler=enlarger)
    found = vary(both, large, ["key"], seeds=[1], base_options=FEW, upsampler_options=FEW)
    noise = PerImageNoise([1])
    for _ in range(1 + 3):  # the start and three steps
        noise((1, 3, SMALL, SMALL), torch.device("cpu"))
    expected = sample_stage(enlarger, ["key"], noise=noise, options=FEW, low_res=to_tensor(alone))
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1


def test_upscaling_is_the_upsampler_on_the_picture_for_each_seed(enlarger: LoadedModel) -> None:
    small = picture(SMALL)
    found = upscale(enlarger, small, ["key", "sun"], seeds=[2, 3], options=FEW)
    alone = upscale(enlarger, small, ["sun"], seeds=[3], options=FEW)
    expected = sample_stage(
        enlarger, ["sun"], noise=PerImageNoise([3]), options=FEW, low_res=to_tensor(small)[None]
    )
    assert found.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(alone, to_uint8(expected))
    assert np.abs(found[1].astype(int) - alone[0]).max() <= 1
    shifted = upscale(enlarger, 255 - small, ["sun"], seeds=[3], options=FEW)
    assert (shifted != alone).any()


def test_what_does_not_fit_is_refused(base: LoadedModel, enlarger: LoadedModel) -> None:
    model, shown, known = TextToImage(base=base), picture(SMALL), left_half(SMALL)
    with pytest.raises(ValueError, match=r"mask is bool \[16, 16\]; it must be bool \[8, 8\]"):
        inpaint(model, shown, left_half(16), ["key"], seeds=[0])
    with pytest.raises(ValueError, match=r"mask is uint8 \[8, 8\]; it must be bool"):
        inpaint(model, shown, known.astype(np.uint8), ["key"], seeds=[0])
    with pytest.raises(ValueError, match="everything is known"):
        inpaint(model, shown, known | True, ["key"], seeds=[0])
    with pytest.raises(ValueError, match="nothing is known"):
        inpaint(model, shown, known & False, ["key"], seeds=[0])
    with pytest.raises(ValueError, match=r"picture is float64 \[8, 8, 3\]; it must be uint8"):
        vary(model, shown / 255, ["key"], seeds=[0])
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        vary(model, shown, ["key", "sun"], seeds=[0])
    with pytest.raises(ValueError, match="0 prompts and 0 seeds"):
        upscale(enlarger, shown, [], seeds=[])
