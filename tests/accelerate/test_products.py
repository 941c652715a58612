"""`conv="triton"`: which weights are chosen, and where the option is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import glide_fast
from glide_fast import ops
from glide_fast.accelerate import products
from glide_fast.models import UNet, UNetConfig
from glide_fast.ops import Implementation, chosen
from tests.accelerate.foreign import UNet as ForeignUNet

CONFIG = UNetConfig(image_size=16, channels=32, channel_mult=(1, 2), res_blocks=1, attention_strides=(2,))


def served_by(name: str, reason: str = "a reason") -> Any:
    return lambda: [Implementation(op="norm_convolution", device="CUDA", name=name, reason=reason)]


def test_weights_on_the_cpu_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementations", served_by("Triton"))
    model = nn.Sequential(UNet(CONFIG))
    with pytest.raises(ValueError, match=r'weights on cpu; call model\.to\("cuda"\) first'):
        glide_fast.accelerate(model, conv="triton")
    assert not any(chosen.is_chosen(weight) for weight in model.parameters())


def test_a_machine_without_kernels_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "implementations", served_by("reference", "Triton is not installed"))
    with pytest.raises(ValueError, match="not possible here: Triton is not installed; use conv"):
        glide_fast.accelerate(UNet(CONFIG), conv="triton")


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown conv 'cudnn'; use one of library, triton"):
        glide_fast.accelerate(UNet(CONFIG), conv="cudnn")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [lambda: UNet(CONFIG), lambda: ForeignUNet("guided")], ids=["own", "foreign"]
)
def test_the_weights_of_products_are_chosen_and_given_back(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glide_fast.accelerate.walk.check_products", lambda *_: None)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    glide_fast.accelerate(model, conv="triton")
    report = glide_fast.accelerate.report(model)
    kernels = [value for value in model.parameters() if value.shape[2:] == (3, 3) and chosen.is_chosen(value)]
    assert kernels
    assert report.by_triton == report.products
    assert f"{report.products} of {report.products} weights" in str(report)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    glide_fast.accelerate(model)
    assert glide_fast.accelerate.report(model).by_triton == 0
    glide_fast.accelerate(model, conv="triton")
    glide_fast.restore(model)
    assert not any(chosen.is_chosen(value) for value in model.parameters())
    assert all(value.is_contiguous() for value in kernels)


def test_the_library_needs_no_kernels() -> None:
    products.check_products(UNet(CONFIG), "library")
