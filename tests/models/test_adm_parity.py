"""The U-Nets and classifiers of guided- and improved-diffusion against the originals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.models import UNet, UNetConfig
from glide_fast.models.encoder import EncoderConfig, EncoderUNet
from tests.golden import assert_close, data, entry, fill, input_of, normal, state_dict_shapes
from tests.models.upstream import super_resolution_config, unet_config

UNETS = [
    "guided_unet_legacy_attn",
    "guided_unet_new_attn",
    "guided_unet_new_attn_64flags",
    "guided_unet_fractional_mult",
    "guided_unet_1d",
    "guided_superres",
    "improved_superres",
    "improved_unet",
    "improved_unet_plain",
]
ENCODERS = [
    "guided_encoder_adaptive",
    "guided_encoder_attention",
    "guided_encoder_spatial",
    "guided_encoder_spatial_v2",
]


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The fixture's model with its weights, in eval mode."""
    kwargs = entry(name)["kwargs"]
    model: torch.nn.Module
    if name in UNETS:
        config = super_resolution_config(kwargs) if "superres" in name else unet_config(16, kwargs)
        model = UNet(config, compute_dtype=dtype)
    else:
        trunk = unet_config(kwargs["image_size"], kwargs)
        model = EncoderUNet(EncoderConfig(trunk=trunk, pool=kwargs["pool"]), compute_dtype=dtype)
    fill(model, entry(name)["weights_seed"])
    return model.eval()


def inputs(name: str) -> dict[str, Any]:
    """The fixture's inputs by our argument names."""
    given = {key: input_of(name, key) for key in entry(name)["inputs"]}
    if "y" in given:
        given["labels"] = given.pop("y")
    return given


def gradient_norms(model: torch.nn.Module) -> np.ndarray:
    return np.array(
        [0.0 if each.grad is None else each.grad.double().norm().item() for each in model.parameters()]
    )


@pytest.mark.parametrize("name", UNETS + ENCODERS)
def test_names_and_shapes_are_upstreams(name: str) -> None:
    state = build(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == state_dict_shapes(name)


@pytest.mark.parametrize("name", UNETS + ENCODERS)
def test_output_and_gradients(name: str) -> None:
    model, given = build(name), inputs(name)
    pictures = {key: given[key].requires_grad_() for key in ("x", "low_res") if key in given}
    output = model(**given)
    assert_close(output, name, "out")
    (output * normal("projection", output.shape, entry(name)["weights_seed"])).sum().backward()
    for key, picture in pictures.items():
        if f"grad_{key}" in data(name):
            assert_close(picture.grad, name, f"grad_{key}")
    assert_close(gradient_norms(model), name, "param_grad_norms")


@pytest.mark.parametrize("name", ["guided_unet_legacy_attn", "guided_encoder_attention"])
def test_half_precision_is_near_the_originals(name: str) -> None:
    with torch.inference_mode():
        assert_close(build(name, torch.float16)(**inputs(name)), name, "out_fp16")


def test_the_classifiers_guidance_gradient_is_the_originals() -> None:
    name = "guided_classifier_guidance"
    kwargs = entry(name)["kwargs"]
    trunk = unet_config(kwargs["image_size"], kwargs)
    model = EncoderUNet(EncoderConfig(trunk=trunk, pool=kwargs["pool"])).eval()
    fill(model, entry(name)["weights_seed"])
    x = input_of(name, "x").requires_grad_()
    logits: Tensor = model(x, input_of(name, "t"))
    chosen = logits.log_softmax(dim=1).gather(1, input_of(name, "y").long()[:, None])[:, 0]
    assert_close(chosen, name, "selected_log_prob")
    chosen.sum().backward()
    assert x.grad is not None
    assert_close(x.grad * entry(name)["classifier_scale"], name, "cond_grad")


def tiny(**changes: Any) -> UNetConfig:
    shape: dict[str, Any] = {
        "image_size": 8,
        "channels": 32,
        "channel_mult": (1, 2),
        "res_blocks": 1,
        "attention_strides": (2,),
        "head_channels": 32,
    }
    return UNetConfig(**{**shape, **changes})


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_a_volume_keeps_its_depth_between_levels(resblock_updown: bool) -> None:
    model = UNet(tiny(dims=3, resblock_updown=resblock_updown))
    x = torch.randn(1, 3, 5, 8, 8)
    assert model(x, torch.zeros(1)).shape == (1, 6, 5, 8, 8)
    maps = model.encode(x, torch.zeros(1, 128))
    assert maps[-1].shape == (1, 64, 5, 4, 4)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_a_classifier_of_signals(pool: Any) -> None:
    model = EncoderUNet(EncoderConfig(trunk=tiny(dims=1, out_channels=4), pool=pool))
    assert model(torch.randn(2, 3, 8), torch.zeros(2)).shape == (2, 4)


@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_one_timestep_serves_a_batch(scale_shift_norm: bool) -> None:
    model = fill(UNet(tiny(scale_shift_norm=scale_shift_norm)), 1)
    x = normal("x", (3, 3, 8, 8), 1)
    torch.testing.assert_close(model(x, torch.tensor([7])), model(x, torch.tensor([7, 7, 7])))
    with pytest.raises(ValueError, match=r"timesteps have shape \(2,\); give one for each of the 3 pictures"):
        model(x, torch.tensor([7, 7]))


def test_wrong_dimensions_and_pools_are_named() -> None:
    with pytest.raises(ValueError, match="this model has 2 dimensions of space"):
        UNet(tiny())(torch.randn(1, 3, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="unknown pool 'max'; known: adaptive, attention, spatial"):
        EncoderConfig(trunk=tiny(), pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pool 'attention' needs trunk\.head_channels"):
        EncoderConfig(trunk=tiny(head_channels=None), pool="attention")
