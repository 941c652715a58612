"""Layer norms that hand on what they read: blocks learn alike, and autograd has no sums left to make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from glide_fast.models import clip, layer_norm, noisy_clip, transformer
from glide_fast.models.layer_norm import LayerNorm, Norm, normed

BLOCKS = {
    "glide": lambda: transformer.TransformerBlock(64, 2),
    "clip": lambda: clip.ClipBlock(64, 2, causal=True),
    "noisy": lambda: noisy_clip.Block(64, 2, causal=False),
}


class Counted(TorchDispatchMode):
    """Context that counts calls by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, and call."""
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = BLOCKS[request.param]()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


def learned(function: Any, block: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of x and all parameters."""
    y = function(x)
    arriving = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], arriving)]


def apart(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return norm(x), x


def use_separate_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transformer, clip, noisy_clip):
        monkeypatch.setattr(module, "normed", apart)


def test_a_block_learns_to_the_bit_as_with_separate_sums(
    block: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(2, 9, 64)
    found = learned(block, block, x)
    use_separate_sums(monkeypatch)
    for actual, expected in zip(found, learned(block, block, x), strict=True):
        assert torch.equal(actual, expected)


def test_autograd_adds_no_residual_gradients(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def sums() -> int:
        with Counted() as counted:
            learned(block, block, tokens(2, 9, 64))
        assert counted.calls["layer_norm_backward"] == 2
        return counted.calls["add"]

    fused = sums()
    use_separate_sums(monkeypatch)
    assert sums() == fused + 2


def test_single_tokens_learn_as_with_separate_sums(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(block, "at"):
        pytest.skip("GLIDE's blocks compute all tokens")
    x, places = tokens(3, 9, 64), torch.tensor([0, 8, 4])
    found = learned(lambda x: block.at(x, places), block, x)
    use_separate_sums(monkeypatch)
    expected = learned(lambda x: block.at(x, places), block, x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients(block: nn.Module) -> None:
    x = tokens(2, 9, 64)
    kept = learned(block, block, x)
    again = learned(lambda x: checkpoint(block, x, use_reentrant=False), block, x)
    assert all(torch.equal(*pair) for pair in zip(again, kept, strict=True))


def test_a_block_in_training_compiles_into_one_graph(block: nn.Module) -> None:
    torch._dynamo.reset()
    x = tokens(2, 9, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(learned(compiled, block, x), learned(block, block, x), rtol=1e-5, atol=1e-5)


def test_hooks_see_the_norms_and_gradients_stay(block: nn.Module) -> None:
    x = tokens(2, 9, 64)
    expected = learned(block, block, x)
    seen: list[torch.Size] = []
    for module in block.modules():
        if isinstance(module, LayerNorm | Norm):
            module.register_forward_hook(lambda *call: seen.append(call[2].shape))
    torch.testing.assert_close(learned(block, block, x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [(2, 9, 64)] * 2


class Shifted(LayerNorm):
    """A norm of another class."""

    def forward(self, x: Tensor) -> Tensor:
        """Add 1 behind the norm."""
        return super().forward(x) + 1


def test_norms_of_other_classes_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(5, 64)
    for norm in (Shifted(64), nn.LayerNorm(64), nn.Identity()):
        y, same = normed(norm, x)
        assert same is x
        assert torch.equal(y, norm(x))
    patched = LayerNorm(64)
    monkeypatch.setattr(patched, "forward", lambda x: 3 * x)
    y, same = normed(patched, x)
    assert same is x
    assert torch.equal(y, 3 * x)


@pytest.mark.parametrize("kind", [LayerNorm, Norm])
def test_ours_hand_on_what_they_read(
    kind: type[LayerNorm] | type[Norm], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    beside = layer_norm.ops.layer_norm_beside

    def count(*inputs: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        calls.append(eps)
        return beside(*inputs, eps=eps)

    monkeypatch.setattr(layer_norm.ops, "layer_norm_beside", count)
    norm, x = kind(64), tokens(5, 64)
    if isinstance(norm, LayerNorm):
        norm.eps = 0.5
    y, same = normed(norm, x)
    assert calls == [norm.eps if isinstance(norm, LayerNorm) else 1e-5]
    assert torch.equal(y, norm(x))
    assert torch.equal(same, x)
