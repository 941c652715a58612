"""Whole networks as the suites compare them: inputs, work, gates, peers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bench import learning, networks, pictures
from bench.networks import small
from bench.parity import PEER_FACTOR, ParityError, picture_excess
from bench.peers.runtimes import PEERS, Unavailable, forget, prepare
from bench.subject import Plain, Subject
from glide_fast.models import UNetConfig
from glide_fast.models.presets import preset

TINY = replace(small(preset("glide-base").unet, channels=32, size=8), attention_strides=(2,))
TINY_ADM = replace(small(preset("guided-64x64-diffusion").unet, channels=32, size=8), attention_strides=(2,))


def test_every_case_of_the_targets_is_there_once_and_also_quickly() -> None:
    for quick in (False, True):
        names = [case.name for case in networks.cases(quick=quick)]
        assert len(set(names)) == len(names) == 6
    full = " ".join(case.name for case in networks.cases(quick=False))
    for part in ("64 px base, CFG batch 2", "256 px upsampler, batch 1", "ADM 64 px", "ViT-B/32", "guidance"):
        assert part in full


@pytest.mark.parametrize("upsampler", [False, True])
def test_a_step_with_text_is_the_same_by_us_and_by_both_forms_of_the_original(upsampler: bool) -> None:
    subject = networks.text_step(replace(TINY, low_res=upsampler), 2)
    assert subject.once is not None
    assert 0 < subject.gate("a step", "ours", subject.ours()) <= 1
    torch.testing.assert_close(subject.plain.call(), subject.once.call(), rtol=1e-5, atol=1e-5)
    assert subject.flops == subject.once.flops() < subject.plain.flops()


def test_a_step_with_labels_and_one_of_clip_guidance() -> None:
    subject = networks.step(TINY_ADM, 2)
    assert 0 < subject.gate("a step", "ours", subject.ours()) <= 1
    config = replace(
        preset("glide-clip", networks.NoisyCLIPConfig),
        image_size=8,
        image_heads=1,
        image_layers=1,
        text_heads=1,
        text_layers=1,
        vocabulary=16,
    )
    subject = networks.noisy_clip_guidance(config, 2)
    assert 0 < subject.gate("a gradient", "ours", subject.ours()) <= 1
    assert subject.flops > 0


def test_no_part_of_a_network_is_idle() -> None:
    network = networks.built(TINY)
    assert all(parameter.any() for parameter in network.parameters())
    again = networks.built(TINY)
    pairs = zip(network.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_work_of_a_network_is_counted_by_its_products() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    plain = Plain(module=module.requires_grad_(False), inputs=(torch.zeros(2, 3, 4, 4),))
    forward = 2 * 2 * (16 * 8 * 27 + 128 * 5)
    assert plain.flops() == forward
    assert replace(plain, gradient=True).flops() == 2 * forward


def test_the_gate_of_a_network_is_red_for_a_wrong_answer() -> None:
    subject = networks.step(TINY_ADM, 1)
    (output,) = subject.ours()
    with pytest.raises(ParityError, match=r"a step: the error of ours is .* nothing is timed"):
        subject.gate("a step", "ours", (output * 1.001,))


def test_a_peer_in_bfloat16_is_seen() -> None:
    subject = networks.step(TINY_ADM, 1)
    plain = subject.plain
    x, *rest = plain.inputs
    rounded = plain.module(x.bfloat16().float(), *rest).detach()
    with pytest.raises(ParityError, match=r"the error of a peer is"):
        subject.gate("a step", "a peer", (rounded,), factor=PEER_FACTOR)


def test_pictures_at_sixty_decibels_are_just_good_enough() -> None:
    picture = torch.zeros(1, 3, 4, 4)
    assert picture_excess(picture + 2e-3, picture) == pytest.approx(1.0)  # 60 dB: a thousandth of the range
    assert picture_excess(picture * torch.nan, picture) == float("inf")


def line(gradient: bool = False) -> Plain:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)).requires_grad_(False).eval()
    return Plain(module=module, inputs=(torch.randn(2, 4),), gradient=gradient)


@pytest.mark.parametrize("peer", [name for name in PEERS if name != "compile"])
def test_every_peer_gives_the_plain_networks_answer_on_any_input(peer: str) -> None:
    plain = line()
    try:
        function = prepare(peer, plain)
    except Unavailable as reason:
        pytest.skip(str(reason))
    other = torch.randn(2, 4)
    torch.testing.assert_close(function(other), (plain.module(other),), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_networks_too_outside_and_inside_inference_mode(gradient: bool) -> None:
    plain = line(gradient)
    function = prepare("compile", plain)
    torch.testing.assert_close(function(*plain.inputs), plain.call(), rtol=1e-5, atol=1e-6)
    if not gradient:
        with torch.inference_mode():
            torch.testing.assert_close(function(*plain.inputs), plain.call(), rtol=1e-5, atol=1e-6)
    forget()


@pytest.mark.parametrize("peer", ["openvino", "onnxruntime"])
def test_what_a_peer_cannot_do_has_a_reason(peer: str) -> None:
    with pytest.raises(Unavailable, match="computes no gradients"):
        prepare(peer, line(gradient=True))


def test_a_peer_that_breaks_is_unavailable_with_its_own_words() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"no way with {x.shape[0]} rows\nand more")

    plain = Plain(module=Broken(), inputs=(torch.zeros(2),))
    with pytest.raises(Unavailable, match=r"^RuntimeError: no way with 2 rows$"):
        prepare("upstream", plain)


def training_config() -> UNetConfig:
    return replace(learning.small_adm(quick=True), image_size=8, channels=32, channel_mult=(1, 2))


def test_a_training_step_has_the_originals_gradients_and_changes_the_parameters() -> None:
    config = training_config()
    start, example = learning.network(config), learning.Example.of(config, 2)
    ours, plain = learning.our_learner(start), learning.plain_learner(start)
    pairs = list(zip(ours.gradients(example), plain.gradients(example), strict=True))
    assert len(pairs) == 1 + len(ours.parameters)
    for ours_gradient, plains in pairs:
        torch.testing.assert_close(ours_gradient, plains, rtol=1e-3, atol=1e-5)
    before = [parameter.clone() for parameter in ours.parameters]
    ours.step(example)
    changed = [not torch.equal(*pair) for pair in zip(before, ours.parameters, strict=True)]
    assert all(changed)
    assert torch.equal(plain.parameters[0], start.state_dict()[plain.names[0].removeprefix(learning.OUTER)])


def test_saved_bytes_count_each_memory_once_and_no_parameter() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor, _timesteps: Tensor, _labels: Tensor) -> Tensor:
            y = x * self.weight  # keeps x (the weight is a parameter)
            return torch.cat([y * y, y.sin()], dim=1)  # both keep y, which counts once

    config = training_config()
    example = learning.Example.of(config, 2)
    squares, convolution = Squares(), nn.Conv2d(3, 6, 1)
    first = learning.saved_bytes(learning.Learner(squares, squares), example)
    second = learning.saved_bytes(learning.Learner(convolution, lambda x, *_: convolution(x)), example)
    assert first - second == 4 * example.pictures.numel()  # besides x, which a convolution keeps as well


def test_the_pipeline_with_peers_paints_our_pictures() -> None:
    models = pictures.ours()
    expected = pictures.sampling(models, 1, 2)()
    for peer in ("upstream", "upstream, text once"):
        painted = pictures.sampling(pictures.of_peer(models, peer, 1), 1, 2)()
        assert picture_excess(painted, expected) < 1
    assert pictures.flops(models, 1, 2) > 1e9


def test_what_is_compared_is_named_alike() -> None:
    subject = Subject(ours=lambda: line().call(), plain=line())
    assert subject.needed is subject.plain
    assert subject.truth[1][0].dtype == torch.float64
    assert subject.intensity > 0
