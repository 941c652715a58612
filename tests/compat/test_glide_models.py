"""GLIDE's U-Nets through the original's constructors, against its outputs, gradients, names, and dtypes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.glide_text2im import nn, unet, xf
from glide_fast.compat.glide_text2im.model_creation import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)
from glide_fast.compat.glide_text2im.text2im_model import SuperResText2ImUNet, Text2ImUNet
from glide_fast.compat.glide_text2im.unet import (
    InpaintUNetModel,
    SuperResInpaintUNetModel,
    SuperResUNetModel,
    UNetModel,
)
from tests.golden import PARITY, assert_close, data, entry, fill, input_of, normal, state_dict_shapes

TEXT_MODELS = ["glide_base", "glide_base_plain", "glide_upsample", "glide_inpaint", "glide_upsample_inpaint"]
UNETS = {"glide_unet_superres": SuperResUNetModel, "glide_unet_class_cond": UNetModel}


def build(name: str, **changes: Any) -> UNetModel:
    """The fixture's model with its weights, in eval mode, built as the original builds it."""
    options = {**entry(name)["kwargs"], **changes}
    model = UNETS[name](**options) if name in UNETS else create_model_and_diffusion(**options)[0]
    fill(model, entry(name)["weights_seed"])
    return model.eval()


def tiny(**changes: Any) -> Text2ImUNet:
    """The fixtures' smallest text model, with other options."""
    model = build("glide_base_plain", **changes)
    assert isinstance(model, Text2ImUNet)
    return model


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The noised pictures, timesteps and conditions of a fixture."""
    given = {key: input_of(name, key) for key in entry(name)["inputs"]}
    return given.pop("x"), given.pop("timesteps"), given


@pytest.mark.parametrize("name", [*TEXT_MODELS, *UNETS])
def test_outputs_gradients_names_and_memory(name: str) -> None:
    model = build(name)
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == state_dict_shapes(name)
    parameters = dict(model.named_parameters())
    assert all(state[key].data_ptr() == parameters[key].data_ptr() for key in parameters)

    x, timesteps, conditions = inputs(name)
    x.requires_grad_()
    if "grad_low_res" in data(name):
        conditions["low_res"].requires_grad_()
    out = model(x, timesteps, **conditions)
    assert_close(out, name, "out")
    (out * normal("projection", out.shape, entry(name)["weights_seed"])).sum().backward()
    assert_close(x.grad, name, "grad_x")  # type: ignore[arg-type]
    if "grad_low_res" in data(name):
        assert_close(conditions["low_res"].grad, name, "grad_low_res")  # type: ignore[arg-type]
    norms = [0.0 if p.grad is None else p.grad.double().norm().item() for p in model.parameters()]
    assert_close(norms, name, "param_grad_norms")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_half_precision_keeps_the_dtype_at_the_door(name: str) -> None:
    model = build(name, use_fp16=True)
    assert isinstance(model, Text2ImUNet)
    model.convert_to_fp16()
    kept = {
        key for key, value in model.named_parameters() if value.dtype == torch.float32 and value.dim() > 1
    }
    allowed = ("time_embed", "emb_layers", "positional_embedding", "padding_embedding", "out.2")
    assert all(any(part in key for part in allowed) for key in kept)
    x, timesteps, conditions = inputs(name)
    with torch.inference_mode():
        text = model.get_text_emb(conditions["tokens"], conditions["mask"])
        assert_close(text["xf_proj"].float(), name, "fp16.xf_proj")
        assert_close(text["xf_out"].float(), name, "fp16.xf_out")
        out = model(x, timesteps, **conditions)
    assert out.dtype == torch.float32
    assert_close(out[:1], name, "out_fp16")
    model.convert_to_fp32()
    assert model.input_blocks[0][0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_embeddings(name: str) -> None:
    model = build(name)
    _, _, conditions = inputs(name)
    with torch.inference_mode():
        text = model.get_text_emb(conditions["tokens"], conditions["mask"])
    assert_close(text["xf_proj"], name, "xf_proj")
    assert_close(text["xf_out"], name, "xf_out")


@pytest.mark.parametrize("name", ["glide_inpaint", "glide_upsample_inpaint"])
def test_nothing_known(name: str) -> None:
    x, timesteps, conditions = inputs(name)
    del conditions["inpaint_image"], conditions["inpaint_mask"]
    with torch.inference_mode():
        assert_close(build(name)(x, timesteps, **conditions)[:1], name, "out_no_inpaint")


def test_the_cache_compares_tokens_only_until_it_is_deleted() -> None:
    model = tiny(cache_text_emb=True, xf_padding=True)
    x, timesteps, conditions = inputs("glide_base_plain")
    tokens, mask = conditions["tokens"], conditions["mask"]
    with torch.no_grad():
        first = model(x, timesteps, tokens=tokens, mask=mask)
        assert torch.equal(model(x, timesteps, tokens=tokens, mask=~mask), first)
        with pytest.raises(AssertionError, match=r"del_cache"):
            model(x, timesteps, tokens=tokens + 1, mask=mask)
        model.del_cache()
        assert not torch.equal(model(x, timesteps, tokens=tokens, mask=~mask), first)
        assert set(model.get_text_emb(tokens, mask)) == {"tokens", "xf_proj", "xf_out"}


def test_tokens_of_any_integer_type_and_none_at_all() -> None:
    model = tiny()
    x, timesteps, conditions = inputs("glide_base_plain")
    with torch.no_grad():
        expected = model(x, timesteps, tokens=conditions["tokens"])
        assert torch.equal(model(x, timesteps, conditions["tokens"].int(), conditions["mask"]), expected)
    with pytest.raises(AssertionError, match=r"give tokens="):
        model(x, timesteps)


def test_a_model_without_text_and_one_that_predicts_tokens() -> None:
    model = tiny(xf_width=0)
    assert not any(key.startswith(("transformer", "token")) for key in model.state_dict())
    x, timesteps, _ = inputs("glide_base_plain")
    assert model(x, timesteps).shape == (3, 6, 16, 16)
    shapes = {"in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1}
    autoregressive = Text2ImUNet(
        8, 16, 1, 2, True, tiny().tokenizer, **shapes, attention_resolutions=(), xf_ar=1.0, share_unemb=True
    )
    assert list(autoregressive.state_dict())[-2:] == ["unemb.weight", "unemb.bias"]
    assert autoregressive.unemb.weight is autoregressive.token_embedding.weight


def test_published_configurations_build_without_memory() -> None:
    described = entry("checkpoints")["models"]
    defaults = {
        "glide.base": model_and_diffusion_defaults(),
        "glide.upsample": model_and_diffusion_defaults_upsampler(),
        "glide.base-inpaint": {**model_and_diffusion_defaults(), "inpaint": True},
        "glide.upsample-inpaint": {**model_and_diffusion_defaults_upsampler(), "inpaint": True},
    }
    for name, options in defaults.items():
        assert options == described[name]["kwargs"]
        with torch.device("meta"):
            model, diffusion = create_model_and_diffusion(**options)
        state = model.state_dict()
        assert len(state) == described[name]["entries"]
        assert sum(value.numel() for value in state.values()) == described[name]["elements"]
        assert {value.device.type for value in state.values()} == {"meta"}
        assert diffusion.num_timesteps == 1000


def test_attributes_and_class_of_each_kind() -> None:
    model = tiny(super_res=True)
    assert isinstance(model, SuperResText2ImUNet)
    assert (model.in_channels, model.text_ctx, model.xf_width, model.cache) == (6, 16, 64, None)
    assert (model.tokenizer.n_vocab, model.tokenizer.end_token) == (50257, 50256)  # type: ignore[attr-defined]
    assert model.dtype == torch.float32
    model.dtype = torch.float16
    assert model.compute_dtype == torch.float16


def test_picture_conditions_of_plain_unets() -> None:
    shapes: dict[str, Any] = {
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
    }
    x, mask, low_res = normal("x", (2, 3, 8, 8), 0), torch.ones(2, 1, 8, 8), normal("low", (2, 3, 4, 4), 0)
    steps = torch.tensor([3, 900])
    for classes, channels, conditions in (
        (InpaintUNetModel, 7, {"inpaint_image": x, "inpaint_mask": mask}),
        (SuperResInpaintUNetModel, 10, {"inpaint_image": x, "inpaint_mask": mask, "low_res": low_res}),
    ):
        model = fill(classes(in_channels=3, **shapes), 1)
        assert model.input_blocks[0][0].weight.shape[1] == channels  # type: ignore[index,union-attr]
        rest = {key: value for key, value in conditions.items() if key == "low_res"}
        assert not torch.equal(model(x, steps, **conditions), model(x, steps, **rest))
        with pytest.raises(TypeError, match=r"in_channels"):
            classes(3, 32, 3, 1, ())


def test_wrong_options_are_explained() -> None:
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=r"channel_mult '1,2' has 2 levels.*16 pixels, not 64"):
            tiny(image_size=64)
    with pytest.raises(ValueError, match=r"unsupported image size: 48; use one of 256, 128, 64"):
        tiny(image_size=48, channel_mult="")


def test_layers() -> None:
    seed, heads = entry("layers")["weights_seed"], entry("layers")["n_heads"]
    qkv, encoder_kv = input_of("layers", "qkv"), input_of("layers", "encoder_kv")
    assert_close(unet.QKVAttention(heads)(qkv), "layers", "glide_attention")
    assert_close(unet.QKVAttention(heads)(qkv, encoder_kv), "layers", "glide_attention_encoder")
    tokens = input_of("layers", "xf_qkv")
    assert_close(xf.QKVMultiheadAttention(heads, 20)(tokens), "layers", "glide_xf_attention")
    for swish in (0.0, 0.5, 1.0, 1.702):
        norm = fill(nn.GroupNorm32(32, 64, swish), seed)
        assert_close(norm(input_of("layers", "groupnorm")), "layers", f"groupnorm_swish_{swish}")
    for channels in (32, 33, 192):
        embedding = nn.timestep_embedding(input_of("layers", "timesteps"), channels)
        assert_close(embedding, "layers", f"timestep_embedding_{channels}")
    embedding = nn.timestep_embedding(input_of("layers", "timesteps"), 8, 100)
    assert_close(embedding, "layers", "timestep_embedding_period")


def test_blocks_to_build_other_networks_from() -> None:
    model = build("glide_base_plain")
    ours = model.input_blocks[1]  # a residual block, then attention
    theirs = unet.TimestepEmbedSequential(
        unet.ResBlock(64, 256, 0.1), unet.AttentionBlock(64, num_heads=4, encoder_channels=64)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, emb, text = normal("x", (2, 64, 8, 8), 0), normal("e", (2, 256), 0), normal("t", (2, 64, 5), 0)
    expected = ours(x, torch.nn.functional.silu(emb), text.transpose(1, 2))
    torch.testing.assert_close(theirs(x, emb, text), expected)
    assert not torch.equal(theirs(x, emb), expected)


def test_the_transformers_layers_take_the_originals_arguments() -> None:
    model = xf.Transformer(n_ctx=5, width=16, layers=2, heads=2)
    block = xf.ResidualAttentionBlock(5, 16, 2)
    block.load_state_dict(model.resblocks[0].state_dict())
    x = normal("x", (2, 5, 16), 0)
    torch.testing.assert_close(model(x), model.resblocks[1](block(x)))
    attention, tokens = xf.MultiheadAttention(5, 16, 2), normal("tokens", (1, 5, 16), 0)
    expected = attention.c_proj(xf.QKVMultiheadAttention(2, 5)(attention.c_qkv(tokens)))
    torch.testing.assert_close(attention(tokens), expected)


def test_every_fixture_of_the_packages_models_is_used() -> None:
    files = {path.stem for path in PARITY.glob("glide_*.npz")}
    assert files == set(itertools.chain(TEXT_MODELS, UNETS, ["glide_clip", "glide_clip_text_direct"]))
    assert np.all([entry(name)["package"] == "glide_text2im" for name in files])
