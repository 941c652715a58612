"""Networks placed for painting: the bits are those of weights rounded at each use."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glide_fast.models import LoadedModel, MaskedImage, UNet
from glide_fast.models.placement import placed, usual_dtype
from glide_fast.sampling.pipeline import StageOptions, TextToImage
from tests import tiny

HALVES = (torch.float16, torch.bfloat16)


def outputs(network: UNet) -> tuple[Tensor, Tensor, Tensor]:
    """What the network paints of fixed pictures, and how it reads a text."""
    generator = torch.Generator().manual_seed(0)
    size = network.config.image_size
    x = torch.randn(2, 3, size, size, generator=generator)
    with torch.inference_mode():
        text = network.text(torch.arange(16).view(2, 8), torch.ones(2, 8, dtype=torch.bool))
        known = MaskedImage(x.clamp(-1, 1), torch.ones(2, 1, size, size)) if network.config.inpaint else None
        low_res = x[:, :, ::2, ::2] if network.config.low_res else None
        y = network(x, torch.tensor([3, 700]), text=text, low_res=low_res, known=known)
    return y, text.pooled, text.sequence


def network_of(kind: str) -> UNet:
    unet = tiny.config(upsampler=kind == "upsampler", inpaint=kind == "inpaint").unet
    if kind == "learned":
        unet = replace(unet, resblock_updown=False, norm_groups=16)
    torch.manual_seed(0)
    network = UNet(unet)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["base", "upsampler", "inpaint", "learned"])
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_kept_in_half_give_the_bits_of_weights_rounded_at_each_use(
    kind: str, dtype: torch.dtype
) -> None:
    network = network_of(kind)
    network.compute_dtype = dtype
    expected = outputs(network)
    assert placed(network, "cpu", dtype) is network
    for found, wanted in zip(outputs(network), expected, strict=True):
        assert torch.equal(found, wanted)
    kept = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kept["input_blocks.0.0.weight"] == kept["middle_block.1.encoder_kv.bias"] == dtype
    assert kept["transformer.resblocks.0.mlp.c_fc.weight"] == kept["transformer_proj.bias"] == dtype
    full = ("time_embed", "emb_layers", "ln_", "norm", ".0.weight", "embedding", "out.2", "final_ln")
    for name, found_dtype in kept.items():
        if any(part in name for part in full) and name != "input_blocks.0.0.weight":
            assert found_dtype == torch.float32, name
    halves = sum(each.numel() for each in network.parameters() if each.dtype == dtype)
    assert halves > 0.5 * sum(each.numel() for each in network.parameters())


def test_placed_in_float32_a_network_is_what_it_was() -> None:
    network = network_of("base")
    expected = outputs(network)
    placed(network, "cpu")
    assert {each.dtype for each in network.parameters()} == {torch.float32}
    for found, wanted in zip(outputs(network), expected, strict=True):
        assert torch.equal(found, wanted)
    assert usual_dtype(torch.device("cpu")) == torch.float32
    assert usual_dtype(torch.device("cuda", 1)) == torch.float16


def test_every_weight_goes_to_the_device_also_of_a_file_in_half() -> None:
    network = network_of("base").half()
    placed(network, "meta", torch.bfloat16)
    assert {each.device.type for each in network.parameters()} == {"meta"}
    assert network.time_embed["0"].weight.dtype == torch.float32


def test_what_cannot_be_placed_is_refused() -> None:
    network = network_of("base")
    with pytest.raises(ValueError, match=r"activations cannot be torch\.float64; use float32, float16"):
        placed(network, "cpu", torch.float64)
    network.middle_block[0].in_layers["2"].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"middle_block\.0\.in_layers\.2\.weight has numbers too large"):
        placed(network, "cpu", torch.float16)
    with pytest.raises(ValueError, match="this network is being trained; place a copy"):
        placed(copy.deepcopy(network).requires_grad_(True), "cpu")


def test_a_pipeline_is_placed_with_its_upsampler() -> None:
    model = TextToImage(
        base=LoadedModel(network_of("base"), tiny.config()),
        upsampler=LoadedModel(network_of("upsampler"), tiny.config(upsampler=True)),
    )

    def paint(model: TextToImage) -> Tensor:
        options = StageOptions(steps=4)
        pictures = model(["key"], seeds=[0], base_options=options, upsampler_options=options)
        return torch.from_numpy(pictures).float()

    before = paint(model)
    halved = model.to("cpu", torch.bfloat16)
    assert halved.base.network.compute_dtype == torch.bfloat16
    assert halved.upsampler is not None
    assert halved.upsampler.network.compute_dtype == torch.bfloat16
    difference = (paint(halved) - before).abs()
    assert 0 < difference.mean() < 8
    assert math.isfinite(float(difference.max()))
