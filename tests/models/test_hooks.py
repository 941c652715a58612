"""Layers that are computed together are still called one by one where somebody watches or replaces them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models.blocks import ResBlock
from glide_fast.models.branch import Block
from glide_fast.models.clip import CLIP, ClipBlock, CLIPConfig, VisionTransformer, VisionTransformerConfig
from glide_fast.models.layers import Conv2d, Linear
from glide_fast.models.noisy_clip import Block as NoisyBlock
from glide_fast.models.transformer import TransformerBlock


def block() -> ResBlock:
    torch.manual_seed(0)
    made = ResBlock(32, 32, 16)
    nn.init.normal_(made.out_layers["3"].weight, std=0.1)
    return made.eval()


@torch.no_grad()
def run(made: ResBlock) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, embedding = torch.randn(2, 32, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
    return made(x, embedding)  # type: ignore[no-any-return]


def test_a_hook_sees_its_layer_and_the_result_stays() -> None:
    made = block()
    expected = run(made)
    for name in ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3"):
        seen: list[Tensor] = []
        hook = made.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
        torch.testing.assert_close(run(made), expected, rtol=1e-4, atol=1e-4)
        hook.remove()
        assert len(seen) == 1, name


def test_a_replaced_layer_is_called() -> None:
    class Doubled(Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    made = block()
    x = run(made)
    doubled = Doubled(32, 32, 3, padding=1)
    doubled.load_state_dict(made.out_layers["3"].state_dict())
    made.out_layers["3"] = doubled
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 32, 16, 16, generator=generator)
    torch.testing.assert_close(run(made) - start, 2 * (x - start), rtol=1e-3, atol=1e-3)


WATCHED = {
    "attn.c_proj": "attention",
    "attn": "attention",
    "mlp.c_fc": "hidden",
    "mlp.c_proj": "perceptron",
    "mlp": "perceptron",
}


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", WATCHED)
@torch.no_grad()
def test_a_hook_sees_a_branch_without_what_is_added_to_it(name: str) -> None:
    torch.manual_seed(0)
    made, x = TransformerBlock(32, 2), tokens(2, 40, 32)
    attention = made.attn(made.ln_1(x))
    hidden = made.mlp.c_fc(made.ln_2(x + attention))
    perceptron = made.mlp.c_proj(nn.functional.gelu(hidden))
    expected = {"attention": attention, "hidden": hidden, "perceptron": perceptron}[WATCHED[name]]
    result = made(x)
    seen: list[Tensor] = []
    made.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(made(x), result, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen, [expected], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result, x + attention + perceptron, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_replaced_linear_layer_is_called() -> None:
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    torch.manual_seed(0)
    made, x = TransformerBlock(32, 2), tokens(2, 40, 32)
    before = made(x)
    for name, width in (("c_fc", 32), ("c_proj", 128)):
        doubled = Doubled(width, getattr(made.mlp, name).out_features)
        doubled.load_state_dict(getattr(made.mlp, name).state_dict())
        setattr(made.mlp, name, doubled)
    middle = x + made.attn(made.ln_1(x))
    hidden = made.mlp.c_fc(made.ln_2(middle))
    torch.testing.assert_close(made(x), middle + made.mlp.c_proj(nn.functional.gelu(hidden)))
    assert float((made(x) - before).abs().max()) > 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [ClipBlock, NoisyBlock], ids=["clip", "noisy"])
def test_a_block_answers_for_single_tokens_as_for_all(
    kind: type[ClipBlock] | type[NoisyBlock], causal: bool
) -> None:
    torch.manual_seed(0)
    made: Block = kind(64, 2, causal=causal)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, places = tokens(3, 40, 64).requires_grad_(), torch.tensor([0, 39, 7])
    rows = made(x)[torch.arange(3), places]
    torch.testing.assert_close(made.at(x, places), rows, rtol=1e-4, atol=1e-4)
    leaves = [x, *made.parameters()]
    arriving = tokens(3, 64)
    expected = torch.autograd.grad(rows, leaves, arriving)
    for actual, value in zip(
        torch.autograd.grad(made.at(x, places), leaves, arriving), expected, strict=True
    ):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


@torch.no_grad()
def test_hooks_in_the_last_block_of_a_tower_see_all_tokens() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(
        embedding=16,
        image_size=16,
        vision=VisionTransformerConfig(width=64, layers=2, patch_size=4),
        width=32,
        layers=2,
        heads=2,
        context=12,
        vocabulary=50,
    )
    clip, image = CLIP(config).eval(), tokens(2, 3, 16, 16)
    words = torch.arange(24).view(2, 12)
    expected = clip.encode_image(image), clip.encode_text(words)
    seen: list[torch.Size] = []
    for tower in (clip.visual.transformer, clip.transformer):
        tower.resblocks[-1].mlp.register_forward_hook(lambda *call: seen.append(call[2].shape))  # type: ignore[union-attr]
    torch.testing.assert_close(
        (clip.encode_image(image), clip.encode_text(words)), expected, rtol=1e-4, atol=1e-4
    )
    assert seen == [(2, 17, 64), (2, 12, 32)]


@torch.no_grad()
def test_a_watched_patch_embedding_is_a_convolution_with_the_same_result() -> None:
    torch.manual_seed(0)
    vision = VisionTransformerConfig(width=64, layers=1, patch_size=4)
    tower, image = VisionTransformer(vision, 16, 8), tokens(2, 3, 16, 16)
    expected = tower(image)
    seen: list[torch.Size] = []
    tower.conv1.register_forward_hook(lambda *call: seen.append(call[2].shape))
    torch.testing.assert_close(tower(image), expected, rtol=1e-4, atol=1e-4)
    assert seen == [(2, 64, 4, 4)]


def dropping(dropout: nn.Module) -> ResBlock:
    made = block().train()
    made.out_layers["2"] = dropout
    return made


def by_layers(made: ResBlock) -> Tensor:
    """The block as its layers compute it one by one."""
    generator = torch.Generator().manual_seed(1)
    x, embedding = torch.randn(2, 32, 16, 16, generator=generator), torch.randn(2, 16, generator=generator)
    h = made.in_layers["2"](made.in_layers["0"](x, activation="silu"))
    scale, shift = made.emb_layers["1"](embedding).chunk(2, dim=1)
    norm, dropout, convolution = made.out_layers.values()
    return x + convolution(dropout(norm(h, scale=scale, shift=shift, activation="silu")))  # type: ignore[no-any-return]


def test_dropout_on_a_cpu_is_pytorchs_layer_and_its_draws() -> None:
    made = dropping(nn.Dropout(0.3))
    torch.manual_seed(3)
    result = run(made)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(result, by_layers(made).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(after, torch.get_rng_state())


class _Halved(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def test_a_watched_or_replaced_dropout_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[float] = []

    def count(x: Tensor, *_norm: Tensor, dropout: float, **_settings: object) -> Tensor:
        fused.append(dropout)
        return x

    monkeypatch.setattr("glide_fast.ops.dropped_group_norm", count)
    run(dropping(nn.Dropout(0.3)))
    assert fused == [0.3]
    watched = dropping(nn.Dropout(0.3))
    seen: list[Tensor] = []
    watched.get_submodule("out_layers.2").register_forward_hook(lambda *call: seen.append(call[2]))
    run(watched)
    assert [round(10 * float((each == 0).float().mean())) for each in seen] == [3]
    frozen = dropping(nn.Dropout(0.3))
    frozen.out_layers["2"].eval()
    torch.testing.assert_close(run(frozen), by_layers(frozen).detach(), rtol=1e-5, atol=1e-5)
    halved = dropping(_Halved(0.3))
    torch.testing.assert_close(run(halved), by_layers(halved).detach(), rtol=1e-5, atol=1e-5)
    run(dropping(nn.Dropout(0.3, inplace=True)))
    assert fused == [0.3]
