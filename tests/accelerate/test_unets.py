"""Foreign U-Nets of every dialect: served, they compute and learn what they computed and learned before."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import glide_fast
from glide_fast.accelerate import report
from glide_fast.models import UNet as OurUNet
from glide_fast.models import UNetConfig
from tests.accelerate.compare import assert_same_training, kinds, noise, plain_and_served, randomised
from tests.accelerate.foreign import AttentionBlock, GroupNorm32, ResBlock, UNet

TEXT = 24
CASES: dict[str, dict[str, Any]] = {
    "guided": {"dialect": "guided"},
    "guided, new order": {"dialect": "guided", "new_order": True},
    "guided, added embedding": {"dialect": "guided", "film": False},
    "guided, checkpoints": {"dialect": "guided", "checkpoint": True},
    "improved": {"dialect": "improved", "heads": 4},
    "improved, added embedding": {"dialect": "improved", "film": False, "heads": 1},
    "glide": {"dialect": "glide", "text": TEXT},
    "glide, added embedding": {"dialect": "glide", "text": TEXT, "film": False},
}


def build(case: str, **options: Any) -> UNet:
    model = UNet(**{**CASES[case], **options})
    randomised(model)
    return model


def inputs_of(case: str, size: int = 8) -> tuple[Tensor, ...]:
    given = (noise(2, 3, size, size), torch.tensor([3, 700]))
    return (*given, noise(2, TEXT, 5, seed=2)) if "text" in CASES[case] else given


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_model(case: str) -> None:
    assert_same_training(build(case), inputs_of(case))


@pytest.mark.parametrize("case", CASES)
def test_every_block_norm_and_attention_is_served(case: str) -> None:
    model = glide_fast.accelerate(build(case))
    served = kinds(model)
    assert served.pop("ResBlock") == 10
    assert served.pop("Sequential") == 1
    assert sorted(served.values()) == [4, 4], "a norm and a core of each attention block"
    assert not report(model).left


@pytest.mark.parametrize("case", ["guided", "guided, new order", "improved", "glide"])
def test_it_computes_what_our_own_model_computes_with_the_same_weights(case: str) -> None:
    model = glide_fast.accelerate(build(case))
    text = TEXT if "text" in CASES[case] else None
    ours = OurUNet(
        UNetConfig(
            image_size=8,
            channels=16,
            channel_mult=(1, 2),
            res_blocks=1,
            attention_strides=(2,),
            head_channels=None,
            heads=CASES[case].get("heads", 2),
            attention_order="by_role" if CASES[case].get("new_order") else "by_head",
            norm_groups=8,
        )
    )
    state = {key: value for key, value in model.state_dict().items() if "encoder_kv" not in key}
    ours.load_state_dict(state)
    given = inputs_of(case)[:2]
    torch.testing.assert_close(model(*given), ours(*given), rtol=1e-4, atol=2e-5)
    assert text is None or model(*inputs_of(case)).sub(model(*given)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["guided, new order", "improved", "glide"])
def test_a_half_precision_torso_is_as_exact_as_before(case: str, dtype: torch.dtype) -> None:
    model, given = build(case), inputs_of(case)
    exact = copy.deepcopy(model)(*given)
    plain, served = plain_and_served(model.torso_to(dtype))
    output = served(*given)
    assert output.dtype == torch.float32
    assert (output - exact).abs().mean() <= 1.5 * (plain(*given) - exact).abs().mean()


def test_weights_converted_afterwards_are_followed() -> None:
    plain, served = plain_and_served(build("guided"))
    given = inputs_of("guided")
    torch.testing.assert_close(
        served.torso_to(torch.bfloat16)(*given), plain.torso_to(torch.bfloat16)(*given), rtol=0, atol=0.1
    )
    assert served.input_blocks[1][0].in_layers[2].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_residual_blocks_in_every_dimension(dims: int, resample: Literal["up", "down"] | None) -> None:
    block = ResBlock("guided", 16, 12, 24, film=True, resample=resample, dims=dims)
    randomised(block)
    assert_same_training(block, (noise(2, 16, *(4, 6, 8)[-dims:]), noise(2, 12, seed=2)))


def test_dropout_draws_what_it_drew() -> None:
    plain, served = plain_and_served(build("guided", dropout=0.4).train())
    given = inputs_of("guided")
    torch.manual_seed(3)
    expected = plain(*given)
    torch.manual_seed(3)
    torch.testing.assert_close(served(*given), expected, rtol=0, atol=2e-5)
    torch.manual_seed(4)
    assert (served(*given) - expected).abs().max() > 1e-2


def test_channels_last_stays_channels_last() -> None:
    plain, served = plain_and_served(ResBlock("guided", 16, 12, film=True))
    x = noise(2, 16, 8, 8).to(memory_format=torch.channels_last)
    embedding = noise(2, 12, seed=2)
    output = served(x, embedding)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, plain(x, embedding), rtol=0, atol=2e-5)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize(("pictures", "timesteps"), [(3, 1), (1, 3), (0, 1)])
def test_one_timestep_serves_many_pictures_and_the_reverse(film: bool, pictures: int, timesteps: int) -> None:
    block = ResBlock("guided", 16, 12, 24, film=film)
    randomised(block)
    plain, served = plain_and_served(block)
    x, embedding = noise(pictures, 16, 4, 4), noise(timesteps, 12, seed=2)
    torch.testing.assert_close(served(x, embedding), plain(x, embedding), rtol=0, atol=2e-5)
    torch.testing.assert_close(served(x, emb=embedding), plain(x, emb=embedding), rtol=0, atol=2e-5)


def test_training_steps_go_the_same_way() -> None:
    plain, served = plain_and_served(build("glide"))
    *given, target = *inputs_of("glide"), noise(2, 6, 8, 8, seed=7)
    losses: list[list[float]] = [[], []]
    for model, curve in zip((plain, served), losses, strict=True):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(4):
            loss = (model(*given) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_text_may_come_by_name_or_not_at_all() -> None:
    block = AttentionBlock("glide", 16, 2, text=TEXT)
    randomised(block)
    plain, served = plain_and_served(block)
    x, text = noise(2, 16, 3, 3), noise(2, TEXT, 5, seed=2)
    torch.testing.assert_close(served(x), plain(x))
    torch.testing.assert_close(served(x, encoder_out=text), plain(x, encoder_out=text), rtol=0, atol=2e-5)
    assert kinds(served) == {"SwishNorm": 1, "QKVAttention": 1}


def test_output_layers_of_a_classifier_keep_their_tail() -> None:
    head = nn.Sequential(
        nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 5, 1), nn.Flatten()
    )
    randomised(head)
    assert_same_training(head, (noise(2, 16, 4, 4),))


def test_groups_and_epsilon_are_the_norms_own() -> None:
    assert_same_training(randomised(GroupNorm32(2, 16, eps=0.3)), (noise(2, 16, 4, 4),))
    block = ResBlock("improved", 16, 12)
    block.in_layers[0], block.out_layers[0] = GroupNorm32(2, 16, eps=0.3), GroupNorm32(16, 16, eps=0.1)
    assert_same_training(randomised(block), (noise(2, 16, 4, 4), noise(2, 12, seed=2)))


def test_a_norm_of_flat_features_runs_as_it_did() -> None:
    layers = nn.Sequential(nn.Linear(6, 16), nn.GroupNorm(4, 16), nn.SiLU())
    plain, served = plain_and_served(layers)
    assert kinds(served) == {"GroupNorm": 1}
    assert torch.equal(served(noise(3, 6)), plain(noise(3, 6)))
