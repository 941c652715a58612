"""What accelerate keeps for inference on CPU: how much, until when, and what it does without room."""

from __future__ import annotations

import pytest
import torch

import glide_fast
from glide_fast import doctor
from glide_fast.models import UNet, UNetConfig, kept
from glide_fast.ops import dispatch, packed
from tests.accelerate.foreign import UNet as ForeignUNet

pytestmark = pytest.mark.skipif(dispatch.cpp_library() is None, reason="the C++ library is not built")
CONFIG = UNetConfig(image_size=16, channels=32, channel_mult=(1, 2), res_blocks=1, attention_strides=(2,))


def own() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@torch.inference_mode()
def paint(model: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([10, 500]))  # type: ignore[no-any-return]


def test_what_is_kept_changes_no_bit_and_is_given_back() -> None:
    model, before = own(), packed.kept_bytes()
    expected = paint(model)
    for memory, keeps in (("full", True), ("low", False)):
        glide_fast.accelerate(model, memory=memory)
        assert torch.equal(paint(model), expected)
        assert (packed.kept_bytes() > before) is keeps
    glide_fast.accelerate(model)
    paint(model)
    size = packed.kept_bytes() - before
    assert 0 < size <= kept.packed_bytes(kept.weights_to_pack(model.modules()))
    assert f"{packed.kept_bytes() / 1e6:.1f} MB" in doctor.examine()
    glide_fast.restore(model)
    assert packed.kept_bytes() == before
    assert torch.equal(paint(model), expected)


def test_a_foreign_models_convolutions_are_kept_too() -> None:
    model, before = ForeignUNet("guided").eval(), packed.kept_bytes()
    glide_fast.accelerate(model)
    with torch.inference_mode():
        model(torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4]))
    assert packed.kept_bytes() > before
    glide_fast.restore(model)
    assert packed.kept_bytes() == before


def test_weights_in_training_are_not_kept() -> None:
    model, before = glide_fast.accelerate(own()), packed.kept_bytes()
    model(torch.randn(2, 3, 16, 16), torch.tensor([10, 500])).sum().backward()
    assert packed.kept_bytes() == before
    glide_fast.restore(model)


def test_changed_weights_are_noticed_after_acceleration() -> None:
    model = glide_fast.accelerate(own())
    paint(model)
    for change in (lambda value: value.mul_(1.1), lambda value: value.data.mul_(1.1)):
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter)
        fresh = UNet(CONFIG).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(paint(model), paint(fresh))


def test_too_little_memory_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match='memory="low"'):
        glide_fast.accelerate(own())
    model, before = own(), packed.kept_bytes()
    kept.keep_if_it_fits(model)
    paint(model)
    assert packed.kept_bytes() == before
    with pytest.raises(ValueError, match="unknown memory 'little'"):
        glide_fast.accelerate(model, memory="little")  # type: ignore[arg-type]


def test_the_text_is_projected_once_for_a_prompt() -> None:
    weight, calls = torch.nn.Parameter(torch.randn(4, 3)), []
    source, other = torch.randn(2, 5, 3), torch.randn(2, 5, 3)

    def project(given: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            calls.append(given)
            return given @ weight.t()

        return packed.projected(weight, given, compute)

    with torch.inference_mode():
        project(source)
        assert len(calls) == 1
        packed.keep([weight])
        for given in (source, source, other, other, source):
            torch.testing.assert_close(project(given), given @ weight.t())
        assert len(calls) == 4
        source.mul_(2)
        torch.testing.assert_close(project(source), source @ weight.t())
        weight.data.add_(1)
        torch.testing.assert_close(project(source), source @ weight.t())
        assert len(calls) == 6
