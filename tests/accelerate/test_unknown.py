"""What is not known stays as it is, and the report says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glide_fast
from glide_fast.accelerate import report
from tests.accelerate.compare import noise, randomised
from tests.accelerate.foreign import (
    GroupNorm32,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    SwishNorm,
    UNet,
)
from tests.accelerate.foreign_text import AttentionPool2d, ResidualAttentionBlock
from tests.models.tiny import tiny


class GeluNorm(GroupNorm32):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class RotaryAttention(QKVAttention):
    """Turns queries and keys by their position."""

    def forward(self, qkv: Tensor) -> Tensor:
        angle = torch.arange(qkv.shape[-1], dtype=qkv.dtype) / 3
        turned = qkv * angle.cos() + qkv.roll(1, dims=1) * angle.sin()
        return super().forward(turned)


class MaskedAttention(QKVAttentionLegacy):
    def forward(self, qkv: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(qkv * mask) * scale


class ScaledBlock(ResBlock):
    """The skip connection counts less."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super()._forward(x, emb) / 2**0.5


class StochasticDepthBlock(ResBlock):
    """While training, the branch is sometimes left out."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x * 1.0 if self.training else super()._forward(x, emb)


class BypassedBlock(ResBlock):
    """``forward`` does not use ``_forward``."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return ResBlock._forward(self, x, emb)


class TupleNorm(GroupNorm32):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class BrokenNorm(GroupNorm32):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"needs a licence for {len(x)} pictures")


def gelu_block() -> ResBlock:
    block = ResBlock("guided", 16, 12, film=True)
    block.in_layers[1] = nn.GELU()
    return block


def replaced_on_the_instance() -> GroupNorm32:
    norm = GroupNorm32(4, 16)
    norm.forward = lambda x: x + 1
    return norm


IMAGE, QKV, EMBEDDING = noise(2, 16, 4, 4), noise(2, 48, 6), noise(2, 12, seed=2)
VARIANTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "norm with GELU": (lambda: GeluNorm(4, 16), (IMAGE,), "outputs differ by"),
    "norm with a steep swish": (lambda: SwishNorm(4, 16, 1.7), (IMAGE,), "outputs differ by"),
    "norm without weights": (lambda: nn.GroupNorm(4, 16, affine=False), (IMAGE,), "not a form"),
    "norm with two outputs": (lambda: TupleNorm(4, 16), (IMAGE,), "returns a tuple"),
    "norm patched by hand": (replaced_on_the_instance, (IMAGE,), "replaced on the instance"),
    "rotary attention": (lambda: RotaryAttention(2), (QKV,), "outputs differ by"),
    "attention with a mask": (lambda: MaskedAttention(2), (QKV, torch.ones(6)), "takes other arguments"),
    "attention in batches": (lambda: nn.MultiheadAttention(16, 2), (QKV.mT[..., :16],) * 3, "PyTorch's own"),
    "block with a smaller sum": (lambda: ScaledBlock("guided", 16, 12), (IMAGE, EMBEDDING), "outputs differ"),
    "block with stochastic depth": (
        lambda: StochasticDepthBlock("guided", 16, 12),
        (IMAGE, EMBEDDING),
        "while training",
    ),
    "block around its method": (
        lambda: BypassedBlock("guided", 16, 12),
        (IMAGE, EMBEDDING),
        "does not call _forward",
    ),
}


def flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_left_alone_and_reported(variant: str) -> None:
    make, inputs, reason = VARIANTS[variant]
    module = randomised(make())
    own, before = type(module), flat(module(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        glide_fast.accelerate(module)
    assert type(module) is own
    torch.testing.assert_close(flat(module(*inputs)), before, rtol=0, atol=2e-5)
    (note,) = [entry.note for entry in report(module).left if entry.path == ""]
    assert reason in note


def test_a_block_with_another_activation_keeps_it_and_its_norms_are_served() -> None:
    block = randomised(gelu_block())
    expected = block(IMAGE, EMBEDDING)
    glide_fast.accelerate(block)
    torch.testing.assert_close(block(IMAGE, EMBEDDING), expected, rtol=0, atol=2e-5)
    assert [entry.path for entry in report(block).served] == ["in_layers.0", "out_layers"]
    assert "outputs differ by" in report(block).left[0].note


def test_a_module_that_fails_its_trial_is_reported_with_the_error() -> None:
    with pytest.warns(UserWarning, match="nothing in this BrokenNorm"):
        glide_fast.accelerate(BrokenNorm(4, 16))
    assert "RuntimeError: needs a licence" in report(BrokenNorm(4, 16)).left[0].note


def test_blocks_of_batch_first_attention_are_left_alone() -> None:
    block = ResidualAttentionBlock(32, 2)
    block.attn.batch_first = True
    glide_fast.accelerate(block)
    assert [entry.path for entry in glide_fast.accelerate.report(block).served] == ["mlp"]


def test_a_pool_with_another_question_is_left_alone() -> None:
    class LastPool(AttentionPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1))

    with pytest.warns(UserWarning, match="nothing in this LastPool"):
        glide_fast.accelerate(randomised(LastPool(3, 32, 2, 12)))


def test_one_unknown_block_does_not_keep_the_others_from_being_served() -> None:
    model = UNet("guided")
    randomised(model)
    model.middle_block[1].attention = RotaryAttention(2)
    given = (noise(2, 3, 8, 8), torch.tensor([3, 700]))
    expected = model(*given)
    torch.testing.assert_close(glide_fast.accelerate(model)(*given), expected, rtol=0, atol=2e-5)
    found = report(model)
    assert len(found.served) == 18
    assert [(entry.path, entry.kind) for entry in found.left] == [
        ("middle_block.1.attention", "RotaryAttention")
    ]


def test_the_report_reads_well() -> None:
    model = UNet("guided")
    assert "19 left alone" in str(report(model))
    assert "can be served: call glide_fast.accelerate(model)" in str(report(model))
    text = str(report(glide_fast.accelerate(model)))
    assert text.splitlines()[0] == "UNet: 19 modules served by glide_fast, 0 left alone"
    assert "   8 × ResBlock: residual block: GroupNorm, FiLM, SiLU, convolution in one pass (" in text
    assert "   4 × QKVAttentionLegacy: attention over image, by head (" in text


def test_our_own_models_are_served_already() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glide_fast.accelerate(model) is model
    assert [(entry.kind, entry.note) for entry in report(model).served] == [
        ("UNet", "our own module, served already")
    ]
    wrapped = glide_fast.accelerate(nn.DataParallel(model))
    assert [entry.path for entry in report(wrapped).served] == ["module"]


def test_nothing_known_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="nothing in this Sequential is a form that glide_fast knows"):
        glide_fast.accelerate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compiled_scripts_are_left_alone() -> None:
    script = torch.jit.trace(GroupNorm32(4, 16), IMAGE)
    with pytest.warns(UserWarning, match="nothing in this"):
        glide_fast.accelerate(script)
    assert "load the model as Python code" in report(script).left[0].note


@pytest.mark.parametrize("door", [glide_fast.accelerate, glide_fast.restore, report])
def test_what_is_no_module_is_an_error(door: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"model is a str; give an nn\.Module"):
        door("model")
