"""The networks of guided- and improved-diffusion, through their own names, against the originals' numbers."""

from __future__ import annotations

import argparse
import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_fast.compat.guided_diffusion import nn as guided_nn
from glide_fast.compat.guided_diffusion import script_util as guided_script
from glide_fast.compat.guided_diffusion import unet as guided
from glide_fast.compat.improved_diffusion import nn as improved_nn
from glide_fast.compat.improved_diffusion import script_util as improved_script
from glide_fast.compat.improved_diffusion import unet as improved
from tests.golden import assert_close, data, entry, fill, input_of, normal, state_dict_shapes

CLASSES = {
    "guided_diffusion.unet.UNetModel": guided.UNetModel,
    "guided_diffusion.unet.EncoderUNetModel": guided.EncoderUNetModel,
    "guided_diffusion.script_util.sr_create_model_and_diffusion": guided_script.sr_create_model_and_diffusion,
    "improved_diffusion.unet.UNetModel": improved.UNetModel,
    "improved_diffusion.script_util.sr_create_model_and_diffusion": (
        improved_script.sr_create_model_and_diffusion
    ),
}
NETWORKS = [
    "guided_unet_legacy_attn",
    "guided_unet_new_attn",
    "guided_unet_fractional_mult",
    "guided_unet_1d",
    "guided_superres",
    "guided_encoder_adaptive",
    "guided_encoder_attention",
    "guided_encoder_spatial",
    "guided_encoder_spatial_v2",
    "improved_superres",
    "improved_unet",
    "improved_unet_plain",
]
TINY = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}
RELEASED = {
    "guided.64x64_diffusion": guided_script.create_model_and_diffusion,
    "guided.256x256_diffusion": guided_script.create_model_and_diffusion,
    "guided.64_256_upsampler": guided_script.sr_create_model_and_diffusion,
    "guided.64x64_classifier": guided_script.create_classifier,
    "improved.imagenet64_uncond_100M_1500K": improved_script.create_model_and_diffusion,
    "improved.upsample_cond_500K": improved_script.sr_create_model_and_diffusion,
}


def build(name: str, **changes: Any) -> Any:
    """The fixture's network with its weights, in eval mode."""
    built: Any = CLASSES[entry(name)["callable"]](**{**entry(name)["kwargs"], **changes})
    model = built[0] if isinstance(built, tuple) else built
    return fill(model, entry(name)["weights_seed"]).eval()


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pictures and timesteps, which go by position, and conditions, which go by keyword."""
    given = {key: input_of(name, key) for key in entry(name)["inputs"]}
    return given.pop("x"), given.pop("timesteps"), given


@pytest.mark.parametrize("name", NETWORKS)
def test_names_outputs_and_gradients(name: str) -> None:
    model = build(name)
    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == state_dict_shapes(name)
    own = dict(model.named_parameters())
    assert all(value.data_ptr() == own[key].data_ptr() for key, value in state.items())
    x, timesteps, conditions = inputs(name)
    x.requires_grad_()
    output = model(x, timesteps, **conditions)
    assert_close(output, name, "out")
    (output * normal("projection", output.shape, entry(name)["weights_seed"])).sum().backward()
    assert_close(x.grad, name, "grad_x")
    norms = [0.0 if each.grad is None else each.grad.double().norm().item() for each in model.parameters()]
    assert_close(np.array(norms), name, "param_grad_norms")


@pytest.mark.parametrize("name", ["guided_unet_legacy_attn", "guided_encoder_attention"])
def test_half_precision(name: str) -> None:
    model = build(name, use_fp16=True)
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    state = model.state_dict()
    assert state["input_blocks.0.0.weight"].dtype == torch.float16
    kept = ("time_embed.0.weight", "input_blocks.1.0.in_layers.0.weight", "out.0.weight")
    assert all(state[key].dtype == torch.float32 for key in (*kept, "input_blocks.1.0.emb_layers.1.weight"))
    x, timesteps, conditions = inputs(name)
    with torch.no_grad():
        output = model(x, timesteps, **conditions)
    assert output.dtype == torch.float32
    assert_close(output, name, "out_fp16")
    model.convert_to_fp32()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_improved_diffusion_computes_in_the_dtype_of_its_weights() -> None:
    model = build("improved_unet_plain")
    x, timesteps, _ = inputs("improved_unet_plain")
    with torch.no_grad():
        full = model(x, timesteps)
        model.convert_to_fp16()
        assert model.inner_dtype == torch.float16
        half = model(x, timesteps)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05
    model.convert_to_fp32()
    assert model.inner_dtype == torch.float32


@pytest.mark.parametrize("name", ["improved_unet", "improved_unet_plain"])
def test_feature_vectors(name: str) -> None:
    model = build(name)
    x, timesteps, conditions = inputs(name)
    with torch.no_grad():
        features = model.get_feature_vectors(x, timesteps, **conditions)
    assert_close(features["middle"], name, "features_middle")
    for part in ("down", "up"):
        expected = data(name)[f"features_{part}_norms"]
        norms = torch.stack([each.norm() for each in features[part]])
        assert_close(norms.view(expected.shape), name, f"features_{part}_norms")


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for use_checkpoint in (False, True):
        model = copy.deepcopy(fill(guided.UNetModel(**TINY, dropout=0.5, use_checkpoint=use_checkpoint), 3))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda x: x
        ):
            torch.manual_seed(5)
            loss = model(normal("x", (1, 3, 16, 16), 0), torch.tensor([3])).square().sum()
        loss.backward()
        gradients.append((len(kept), [each.grad for each in model.parameters()]))
    (plain_kept, plain), (recomputed_kept, recomputed) = gradients
    assert recomputed_kept < plain_kept / 2
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_conditions_are_checked() -> None:
    plain, classes = guided.UNetModel(**TINY), guided.UNetModel(**TINY, num_classes=5)
    x, t, y = torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1).long()
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="not conditioned on classes; leave y out"):
            plain(x, t, y)
        with pytest.raises(error, match="needs classes y"):
            classes(x, t)
    with pytest.raises(ValueError, match="give low_res="):
        guided.SuperResModel(**TINY)(x, t)
    assert guided.SuperResModel(**{**TINY, "in_channels": 1, "out_channels": 1})(
        torch.zeros(1, 1, 16, 16), t, torch.zeros(1, 1, 4, 4)
    ).shape == (1, 1, 16, 16)


def test_a_subclass_may_run_the_blocks_itself() -> None:
    class Own(guided.UNetModel):
        def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
            emb = self.time_embed(guided_nn.timestep_embedding(timesteps, self.model_channels))
            emb = emb + self.label_emb(y)
            h, maps = x.type(self.dtype), []
            for module in self.input_blocks:
                h = module(h, emb)
                maps.append(h)
            h = self.middle_block(h, emb)
            for module in self.output_blocks:
                h = module(torch.cat([h, maps.pop()], dim=1), emb)
            return self.out(h.type(x.dtype))

    name = "guided_unet_legacy_attn"
    model = fill(Own(**entry(name)["kwargs"]), entry(name)["weights_seed"]).eval()
    x, timesteps, conditions = inputs(name)
    assert_close(model(x, timesteps, **conditions), name, "out")


def test_arguments_are_attributes() -> None:
    model = guided.UNetModel(**TINY, num_classes=7, num_heads=2)
    for name, value in {**TINY, "num_classes": 7, "num_heads": 2, "num_heads_upsample": 2}.items():
        assert getattr(model, name) == value
    assert len(model.input_blocks) == 4
    assert len(model.output_blocks) == 4
    assert model.label_emb.num_embeddings == 7
    assert not hasattr(
        improved.UNetModel(**{k: v for k, v in TINY.items() if k != "image_size"}), "image_size"
    )


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_build_on_the_meta_device(name: str) -> None:
    described = entry("checkpoints")["models"][name]
    with torch.device("meta"):
        built: Any = RELEASED[name](**described["kwargs"])
    state = (built[0] if isinstance(built, tuple) else built).state_dict()
    assert len(state) == described["entries"]
    assert sum(value.numel() for value in state.values()) == described["elements"]
    assert all(value.is_meta for value in state.values())


def test_attention_of_raw_projections() -> None:
    qkv = input_of("layers", "qkv")
    for attention, key in (
        (guided.QKVAttentionLegacy(2), "guided_attention_legacy"),
        (guided.QKVAttention(2), "guided_attention_new"),
        (improved.QKVAttention(), "improved_attention"),
    ):
        assert_close(attention(qkv), "layers", key)


@pytest.mark.parametrize("module", [guided_nn, improved_nn])
def test_small_functions(module: Any) -> None:
    timesteps = input_of("layers", "timesteps")
    for dim in (32, 33, 192):
        assert_close(module.timestep_embedding(timesteps, dim), "layers", f"timestep_embedding_{dim}")
    norm = fill(module.normalization(64), entry("layers")["weights_seed"])
    x = input_of("layers", "groupnorm")
    assert_close(norm(x), "layers", "groupnorm_swish_0.0")
    assert norm(x.half()).dtype == torch.float16
    rows = normal("x", (3, 2, 2), 0)
    torch.testing.assert_close(module.mean_flat(rows), rows.mean(dim=(1, 2)))
    layer = module.scale_module(module.linear(2, 2), 0.0)
    assert not layer(torch.ones(1, 2)).any()
    assert module.conv_nd(1, 2, 4, 3, padding=1)(torch.zeros(1, 2, 8)).shape == (1, 4, 8)
    assert module.avg_pool_nd(3, 2)(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        module.conv_nd(4)
    weight = torch.ones(3, requires_grad=True)
    for flag in (False, True):
        (gradient,) = torch.autograd.grad(
            module.checkpoint(lambda x: (x * weight).square().sum(), (torch.arange(3.0),), (weight,), flag),
            weight,
        )
        assert gradient.tolist() == [0, 2, 8]


@pytest.mark.parametrize("module", [guided_nn, improved_nn])
def test_ema(module: Any) -> None:
    for rate in (0.99, 0.9999):
        target = [normal("target", (3, 4), 601)]
        for step in range(5):
            module.update_ema(target, [normal(f"source{step}", (3, 4), 601).requires_grad_()], rate=rate)
            expected = data("ema")[f"rate{rate}.after{step + 1}"]
            np.testing.assert_allclose(target[0], expected, rtol=1e-6, atol=1e-7)


def test_blocks_compose_as_in_the_network() -> None:
    """A network's residual and attention blocks, built alone, give what they give inside it."""
    model = fill(guided.UNetModel(**TINY, use_scale_shift_norm=True, num_heads=2), 3).eval()
    stage = model.input_blocks[3]
    res = guided.ResBlock(32, 128, 0.0, out_channels=64, use_scale_shift_norm=True)
    alone = guided.TimestepEmbedSequential(res, guided.AttentionBlock(64, num_heads=2)).eval()
    alone.load_state_dict(stage.state_dict())
    x, emb = normal("x", (2, 32, 8, 8), 0), normal("emb", (2, 128), 0)
    expected = stage(x, torch.nn.functional.silu(emb), None)
    torch.testing.assert_close(alone(x, emb), expected)
    assert guided.ResBlock(32, 8, 0.0, down=True)(x, emb[:, :8]).shape == (2, 32, 4, 4)
    assert guided.ResBlock(32, 8, 0.0, 64, use_conv=True).skip_connection.weight.shape == (64, 32, 3, 3)
    assert guided.Upsample(32, True, out_channels=64)(x).shape == (2, 64, 16, 16)
    assert guided.Downsample(32, True, out_channels=64)(x).shape == (2, 64, 4, 4)
    assert guided.Downsample(32, False)(x).shape == (2, 32, 4, 4)
    assert guided.AttentionPool2d(8, 32, 16, 5)(x).shape == (2, 5)


def test_defaults_are_what_the_factories_take() -> None:
    pairs = [
        (guided_script.model_and_diffusion_defaults, guided_script.create_model_and_diffusion),
        (guided_script.sr_model_and_diffusion_defaults, guided_script.sr_create_model_and_diffusion),
        (guided_script.classifier_and_diffusion_defaults, guided_script.create_classifier_and_diffusion),
        (improved_script.model_and_diffusion_defaults, improved_script.create_model_and_diffusion),
        (improved_script.sr_model_and_diffusion_defaults, improved_script.sr_create_model_and_diffusion),
    ]
    for defaults, factory in pairs:
        assert defaults().keys() == inspect.signature(factory).parameters.keys()
    assert guided_script.model_and_diffusion_defaults()["rescale_timesteps"] is False
    assert improved_script.model_and_diffusion_defaults()["rescale_timesteps"] is True


def test_diffusions_of_options() -> None:
    for script in (guided_script, improved_script):
        for options, mean, var, loss in (
            ({}, "EPSILON", "FIXED_LARGE", "MSE"),
            ({"sigma_small": True, "use_kl": True}, "EPSILON", "FIXED_SMALL", "RESCALED_KL"),
            (
                {"learn_sigma": True, "rescale_learned_sigmas": True},
                "EPSILON",
                "LEARNED_RANGE",
                "RESCALED_MSE",
            ),
            ({"predict_xstart": True, "timestep_respacing": "ddim10"}, "START_X", "FIXED_LARGE", "MSE"),
        ):
            diffusion = script.create_gaussian_diffusion(steps=100, **options)
            assert type(diffusion) is script.SpacedDiffusion
            names = [diffusion.model_mean_type.name, diffusion.model_var_type.name, diffusion.loss_type.name]
            assert names == [mean, var, loss]
        assert diffusion.timestep_map == list(range(0, 100, 10))


def test_options_of_scripts() -> None:
    parser = argparse.ArgumentParser()
    guided_script.add_dict_to_argparser(parser, {"a": False, "b": 3, "c": None, "d": 0.5, "e": ""})
    args = parser.parse_args(["--a", "yes", "--b", "4", "--c", "word", "--d", "2", "--e", "x"])
    assert guided_script.args_to_dict(args, "abcde") == {"a": True, "b": 4, "c": "word", "d": 2.0, "e": "x"}
    assert [guided_script.str2bool(word) for word in (True, "T", "0", "No")] == [True, True, False, False]
    with pytest.raises(argparse.ArgumentTypeError, match="boolean value expected, not 'maybe'"):
        guided_script.str2bool("maybe")
    with pytest.raises(ValueError, match="unsupported image size: 48; use one of 512, 256, 128, 64"):
        guided_script.create_model(48, 32, 1)
    assert guided_script.create_model(48, 32, 1, channel_mult="1,2").channel_mult == (1, 2)
