"""The plain peer is the original code's computation: it is held to the recorded numbers, as ours is."""

from __future__ import annotations

import pytest
import torch

from bench.peers.plain import plain_clip, plain_noisy_pictures, plain_unet
from glide_fast.models import UNet
from tests.golden import assert_close, data, entry, fill, normal
from tests.models import test_adm_parity as adm
from tests.models import test_clip_parity as clip
from tests.models import test_glide_parity as glide
from tests.models import test_noisy_clip_parity as noisy_clip

GLIDE = ["glide_base", "glide_base_plain", "glide_upsample"]
ADM = [
    "guided_unet_legacy_attn",
    "guided_unet_new_attn",
    "guided_unet_new_attn_64flags",
    "guided_unet_fractional_mult",
    "guided_superres",
    "improved_superres",
    "improved_unet",
    "improved_unet_plain",
]


def gradient_norms(twin: torch.nn.Module, ours: torch.nn.Module) -> torch.Tensor:
    """Of the twin's parameters, in the order of ours; 0 where there is no gradient."""
    gradients = {name: each.grad for name, each in twin.named_parameters()}
    norms = []
    for name, _ in ours.named_parameters():
        gradient = gradients.pop(name)
        norms.append(0.0 if gradient is None else gradient.double().norm().item())
    assert not gradients
    return torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("name", GLIDE)
def test_glide(name: str) -> None:
    ours = glide.build(name)
    x, timesteps, conditions = glide.inputs(name)
    model = plain_unet(ours)
    x.requires_grad_()
    tokens, mask = conditions["tokens"], conditions.get("mask", torch.ones_like(conditions["tokens"]).bool())
    out = model(x, timesteps, **{**conditions, "mask": mask})
    assert_close(out, name, "out")
    projection = normal("projection", tuple(out.shape), entry(name)["weights_seed"])
    (grad,) = torch.autograd.grad((out * projection).sum(), x)
    assert_close(grad, name, "grad_x")

    pooled, sequence = model.encode_text(tokens, mask)
    assert_close(sequence, name, "xf_out")
    once = {"pooled": pooled, "sequence": sequence.permute(0, 2, 1), "low_res": conditions.get("low_res")}
    torch.testing.assert_close(model(x, timesteps, **once), out, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ADM)
def test_guided_and_improved_diffusion(name: str, recompute: bool) -> None:
    ours = adm.build(name)
    assert isinstance(ours, UNet)
    model, given = plain_unet(ours, recompute_attention=recompute), adm.inputs(name)
    given["x"].requires_grad_()
    output = model(**given)
    assert_close(output, name, "out")
    (output * normal("projection", output.shape, entry(name)["weights_seed"])).sum().backward()
    assert_close(gradient_norms(model, ours), name, "param_grad_norms")


def test_clip() -> None:
    ours, image, text = clip.build("clip_vit")
    images, texts = plain_clip(ours)(image, text[: len(image)])
    assert_close(images, "clip_vit", "image_features")
    torch.testing.assert_close(texts, ours.encode_text(text[: len(image)]), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_noise_aware_clip() -> None:
    name, ours = noisy_clip.NAME, noisy_clip.glide_clip()
    x, t = normal("x", (3, 3, 32, 32), 121).requires_grad_(), noisy_clip.stored(name, "in.t")
    tokens, lengths = noisy_clip.stored(name, "in.tokens"), noisy_clip.stored(name, "in.lens")
    texts = ours.text_embeddings(tokens, lengths).detach()
    (gradient,) = torch.autograd.grad(plain_noisy_pictures(ours)(x, t, texts).sum(), x)
    assert_close(gradient * entry(name)["grad_scale"], name, "cond_grad")


def test_the_twin_has_the_networks_own_parameters_in_the_originals_order() -> None:
    ours = glide.build("glide_base")
    twin = plain_unet(ours.to(memory_format=torch.channels_last))
    assert twin.state_dict().keys() == ours.state_dict().keys()
    assert twin.time_embed[0].weight.data_ptr() == ours.state_dict()["time_embed.0.weight"].data_ptr()
    assert all(parameter.is_contiguous() for parameter in twin.parameters())


def test_in_double_precision_the_twin_is_nearer_to_the_truth() -> None:
    name = "guided_unet_new_attn"
    ours = adm.build(name)
    assert isinstance(ours, UNet)
    given = adm.inputs(name)
    exact = plain_unet(ours).double()(**{**given, "x": given["x"].double()})
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), torch.from_numpy(data(name)["out"]), rtol=1e-3, atol=1e-4)


def test_a_network_that_the_twin_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="two dimensions and no masked picture"):
        plain_unet(fill(glide.build("glide_inpaint"), 1))  # type: ignore[arg-type]
