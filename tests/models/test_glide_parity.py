"""The text-conditioned U-Nets against the original's outputs, gradients, names and shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.models import MaskedImage, UNet
from tests.golden import PARITY, assert_close, data, entry, fill, normal
from tests.models.upstream import glide_config, unet_config

TEXT_MODELS = ["glide_base", "glide_base_plain", "glide_upsample", "glide_inpaint", "glide_upsample_inpaint"]
UNETS = ["glide_unet_superres", "glide_unet_class_cond"]
STATE_DICTS = json.loads((PARITY / "state_dicts.json").read_text())


def build(name: str, **options: Any) -> UNet:
    """The fixture's model with its weights, in eval mode."""
    kwargs = entry(name)["kwargs"]
    low_res = name == "glide_unet_superres"
    config = (
        glide_config(kwargs) if name in TEXT_MODELS else unet_config(16, {**kwargs, "super_res": low_res})
    )
    model = UNet(config, **options).eval()
    fill(model, entry(name)["weights_seed"])
    return model


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The noised pictures, timesteps and conditions of a fixture."""
    seed = entry(name)["weights_seed"]

    def given(key: str) -> Tensor | None:
        source = entry(name)["inputs"].get(key)
        if source is None:
            return None
        if "stored" in source:
            return torch.from_numpy(data(name)[source["stored"]])
        shape = json.loads(source["rule"].split("(", 2)[2].split(")")[0].join("[]"))
        return normal(key, shape, seed)

    conditions = {
        "tokens": given("tokens"),
        "mask": given("mask"),
        "low_res": given("low_res"),
        "labels": given("y"),
    }
    image, mask = given("inpaint_image"), given("inpaint_mask")
    if image is not None and mask is not None:
        conditions["known"] = MaskedImage(image, mask)
    x, timesteps = given("x"), given("timesteps")
    assert x is not None
    assert timesteps is not None
    return x, timesteps, {key: value for key, value in conditions.items() if value is not None}


@pytest.mark.parametrize("name", TEXT_MODELS + UNETS)
def test_names_and_shapes(name: str) -> None:
    ours = [[key, list(tensor.shape), "float32"] for key, tensor in build(name).state_dict().items()]
    assert ours == STATE_DICTS[name]


@pytest.mark.parametrize("name", TEXT_MODELS + UNETS)
def test_output_and_gradients(name: str) -> None:
    model = build(name)
    x, timesteps, conditions = inputs(name)
    low_res = conditions.get("low_res")
    for tensor in (x, low_res):
        if tensor is not None:
            tensor.requires_grad_()
    out = model(x, timesteps, **conditions)
    assert_close(out, name, "out")

    projection = normal("projection", tuple(out.shape), entry(name)["weights_seed"])
    (out * projection).sum().backward()
    assert_close(x.grad, name, "grad_x")
    if "grad_low_res" in data(name):
        assert low_res is not None
        assert_close(low_res.grad, name, "grad_low_res")
    norms = torch.stack(
        [
            torch.zeros((), dtype=torch.float64) if p.grad is None else p.grad.double().norm()
            for p in model.parameters()
        ]
    )
    assert_close(norms, name, "param_grad_norms")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_encoding(name: str) -> None:
    _, _, conditions = inputs(name)
    with torch.inference_mode():
        text = build(name).text(conditions["tokens"], conditions.get("mask"))
    assert_close(text.pooled, name, "xf_proj")
    assert_close(text.sequence.transpose(1, 2), name, "xf_out")


@pytest.mark.parametrize("name", ["glide_inpaint", "glide_upsample_inpaint"])
def test_nothing_known(name: str) -> None:
    x, timesteps, conditions = inputs(name)
    del conditions["known"]
    with torch.inference_mode():
        out = build(name)(x, timesteps, **conditions)
    assert_close(out[:1], name, "out_no_inpaint")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_float16_activations(name: str) -> None:
    model = build(name, compute_dtype=torch.float16)
    x, timesteps, conditions = inputs(name)
    with torch.inference_mode():
        text = model.text(conditions["tokens"], conditions.get("mask"))
        assert_close(text.pooled.float(), name, "fp16.xf_proj")
        assert_close(text.sequence.float().transpose(1, 2), name, "fp16.xf_out")
        assert_close(model(x, timesteps, **conditions)[:1], name, "out_fp16")
