"""The U-Net's conditions, dtypes, layouts and errors; its numbers are the business of test_glide_parity."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.models import MaskedImage, UNet, fused
from glide_fast.models.conditioning import masked_channels
from glide_fast.models.layers import GroupNorm, timestep_embedding
from tests.models.tiny import TEXT, noise, prompt, tiny

T = torch.tensor([3, 700])
VARIANTS: dict[str, dict[str, Any]] = {
    "text": {},
    "resampling without convolution": {"resblock_updown": False, "learned_resample": False},
    "resampling with convolution": {"resblock_updown": False},
    "added embedding": {"scale_shift_norm": False},
    "upsampler": {"low_res": True},
    "inpainting": {"inpaint": True},
    "inpainting upsampler": {"low_res": True, "inpaint": True},
    "classes": {"text": None, "classes": 4},
    "unconditional": {"text": None},
    "heads by number": {"head_channels": None, "heads": 4, "heads_up": 2},
}


def conditions(model: UNet, batch: int = 2) -> dict[str, Any]:
    """What the model wants to be given besides pictures and timesteps."""
    given: dict[str, Any] = prompt(batch) if model.config.text is not None else {}
    if model.config.low_res:
        given["low_res"] = noise(batch, 3, 4, 4, seed=5)
    if model.config.inpaint:
        given["known"] = MaskedImage(
            noise(batch, 3, 8, 8, seed=6), (noise(batch, 1, 8, 8, seed=7) > 0).float()
        )
    if model.config.classes is not None:
        given["labels"] = torch.arange(batch) % model.config.classes
    return given


@torch.inference_mode()
def run(model: UNet, **changes: Any) -> Tensor:
    out: Tensor = model(noise(2, 3, 8, 8), T, **{**conditions(model), **changes})
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_do_not_see_one_another(variant: str) -> None:
    model = tiny(**VARIANTS[variant])
    given = conditions(model, 3)
    x, timesteps = noise(3, 3, 8, 8), torch.tensor([3, 700, 40])
    with torch.inference_mode():
        together = model(x, timesteps, **given)
        for row in range(3):
            part = slice(row, row + 1)
            own = {
                name: MaskedImage(*(each[part] for each in value)) if name == "known" else value[part]
                for name, value in given.items()
            }
            alone = model(x[part], timesteps[part], **own)
            torch.testing.assert_close(alone, together[part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_condition_matters(variant: str) -> None:
    model = tiny(**VARIANTS[variant])
    before = run(model)
    for name, value in conditions(model).items():
        if name == "known":
            other: Any = MaskedImage(value.image + 0.5, value.mask)
        elif name == "mask":
            other = ~value
        else:
            other = value.flip(0) + (1 if name == "low_res" else 0)
        assert not torch.allclose(run(model, **{name: other}), before, atol=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant: str) -> None:
    model = tiny(**VARIANTS[variant]).train()
    out = model(noise(2, 3, 8, 8), T, **conditions(model))
    (out * noise(2, 6, 8, 8, seed=9)).sum().backward()
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert untouched == []


def test_a_fresh_network_predicts_zero() -> None:
    torch.manual_seed(0)
    assert not run(UNet(tiny().config).eval()).any()


@pytest.mark.parametrize("variant", ["text", "inpainting upsampler"])
def test_channels_last_input_and_weights_give_the_same_numbers(variant: str) -> None:
    model = tiny(**VARIANTS[variant])
    given = conditions(model)
    x = noise(2, 3, 8, 8)
    with torch.inference_mode():
        expected = model(x, T, **given)
        as_input = model(x.contiguous(memory_format=torch.channels_last), T, **given)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        as_weights = model(x, T, **given)
    assert expected.is_contiguous()
    assert as_input.is_contiguous()
    assert torch.equal(as_input, expected)
    torch.testing.assert_close(as_weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("variant", ["text", "added embedding", "inpainting upsampler"])
def test_half_precision_activations_stay_close_to_float32(
    variant: str, dtype: torch.dtype, share: float
) -> None:
    exact, rounded = run(tiny(**VARIANTS[variant])), run(tiny(**VARIANTS[variant], compute_dtype=dtype))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_last_layers_compute_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = tiny(text=None, norm_groups=8, compute_dtype=dtype).train(), []
    for converted in (False, True):
        if converted:
            monkeypatch.setattr(fused, "widens", lambda *_: False)
        model.zero_grad(set_to_none=True)
        out = model(noise(2, 3, 8, 8), T)
        out.square().sum().backward()
        found.append([out.detach(), *(each.grad for each in model.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype is torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["hook", "module"])
def test_who_watches_or_replaces_the_last_layers_reads_the_dtype_of_the_pictures(kind: str) -> None:
    model, seen = tiny(text=None, compute_dtype=torch.bfloat16), []
    expected = run(model)
    if kind == "hook":
        model.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    else:
        own = model.out
        model.out = torch.nn.Sequential(own["0"], torch.nn.SiLU(), own["2"])
        own["0"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert seen == [torch.float32]


def test_text_given_encoded_is_the_tokens_given() -> None:
    model = tiny()
    with torch.inference_mode():
        encoded = model.text(**prompt())
    given = {"tokens": None, "mask": None, "text": encoded}
    assert torch.equal(run(model, **given), run(model))


def test_nothing_known_is_an_empty_mask() -> None:
    model = tiny(inpaint=True)
    empty = MaskedImage(noise(2, 3, 8, 8), torch.zeros(2, 1, 8, 8))
    assert torch.equal(run(model, known=None), run(model, known=empty))


def test_unknown_pixels_of_the_picture_are_hidden() -> None:
    image, mask = noise(2, 3, 8, 8), (noise(2, 1, 8, 8, seed=2) > 0).float()
    channels = masked_channels(noise(2, 3, 8, 8), MaskedImage(image, mask))
    assert torch.equal(channels[:, :3], torch.where(mask.bool(), image, 0.0))
    assert torch.equal(channels[:, 3:], mask)


def test_a_low_res_picture_of_the_final_size_is_taken_as_it_is() -> None:
    model = tiny(low_res=True)
    large = noise(2, 3, 8, 8, seed=5)
    small = torch.nn.functional.avg_pool2d(large, 2)
    enlarged = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear")
    assert torch.equal(run(model, low_res=enlarged), run(model, low_res=small))


def test_pictures_need_not_be_square_or_of_the_config_size() -> None:
    model = tiny()
    with torch.inference_mode():
        assert model(noise(2, 3, 12, 4), T, **prompt()).shape == (2, 6, 12, 4)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    model = tiny(text=None)
    with torch.inference_mode():
        assert model(noise(0, 3, 8, 8), T[:0]).shape == (0, 6, 8, 8)


def test_timesteps_may_be_integers_or_floats() -> None:
    model = tiny()
    with torch.inference_mode():
        whole = model(noise(2, 3, 8, 8), T, **prompt())
        assert torch.equal(model(noise(2, 3, 8, 8), T.float(), **prompt()), whole)
        assert not torch.equal(model(noise(2, 3, 8, 8), T + 0.5, **prompt()), whole)


def test_an_odd_number_of_embedding_channels_is_padded_with_zero() -> None:
    embedding = timestep_embedding(T, 7)
    assert embedding.shape == (2, 7)
    assert not embedding[:, 6].any()
    assert torch.equal(embedding[:, 0], torch.cos(T.float()))
    assert torch.equal(embedding[:, 3], torch.sin(T.float()))


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ({}, {"tokens": None}, "this model needs text; give it"),
        ({"text": None}, prompt(), "this model is not conditioned on text; leave out it"),
        ({"low_res": True}, {"low_res": None}, "this model needs low_res; give it"),
        ({}, {"low_res": noise(2, 3, 4, 4)}, "this model is not conditioned on low_res"),
        ({"text": None, "classes": 4}, {"labels": None}, "this model needs labels; give it"),
        ({}, {"labels": torch.zeros(2, dtype=torch.int64)}, "this model is not conditioned on labels"),
        (
            {},
            {"known": MaskedImage(noise(2, 3, 8, 8), noise(2, 1, 8, 8))},
            "this model is not conditioned on a masked picture; leave known out",
        ),
        ({}, {"tokens": noise(2, 4).long()}, "tokens have length 4, the model's context is 5"),
        ({}, {"mask": None}, "needs the tokens' mask; give mask="),
    ],
)
def test_missing_and_surplus_conditions_are_named(
    shape: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tiny(**shape), **given)


def test_a_prompt_given_twice_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="tokens and text are both given"):
        run(model, text=model.text(**prompt()))


def test_encoding_a_prompt_needs_a_model_with_text() -> None:
    with pytest.raises(ValueError, match="this model is not conditioned on text; leave tokens out"):
        tiny(text=None).text(**prompt())


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 9)])
def test_a_size_that_the_levels_cannot_halve_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"picture size \({height}, {width}\) is not divisible by 2"):
        tiny()(noise(2, 3, height, width), T, **prompt())


def test_channels_that_group_norm_cannot_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels 48 are not divisible by the 32 groups .*; use 32 or 64"):
        tiny(channels=48)
    with pytest.raises(ValueError, match=r"channels 20 .*; use 32 or 64"):
        GroupNorm(20)


def test_channels_that_head_channels_cannot_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="channels 64 are not divisible by head_channels 48"):
        tiny(head_channels=48)


def test_channels_that_the_heads_cannot_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="channels 64 are not divisible by 3 heads; use a divisor of 64"):
        tiny(head_channels=None, heads=3)


def test_a_text_width_that_the_heads_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="text width 32 is not divisible by 3 heads; use a divisor of 32"):
        tiny(text=replace(TEXT, heads=3))
