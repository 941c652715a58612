"""Two copies of a model side by side: outputs and every gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import glide_fast
from glide_fast.accelerate import report


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, zero-initialised layers too, so that every input shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            offset = 0.0 if parameter.ndim > 1 else 0.5
            parameter.copy_(offset + spread * torch.randn(parameter.shape, generator=generator))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output, and gradients of all parameters and floating inputs for a scalar that weighs it."""
    model.zero_grad()
    leaves = [each.clone().requires_grad_() if each.is_floating_point() else each for each in inputs]
    output = model(*leaves)
    (output * noise(*output.shape, seed=5).to(output)).sum().backward()
    found = {"output": output.detach()}
    found |= {str(index): each.grad for index, each in enumerate(leaves) if each.grad is not None}
    found |= {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return found


def assert_same_training(model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    """Accelerated, ``model`` has the outputs and gradients of a plain copy; restored, the very same."""
    plain = copy.deepcopy(model)
    expected = gradients(plain, inputs)
    assert glide_fast.accelerate(model) is model
    assert report(model).served
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        allowed = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=allowed, msg=lambda text, n=name: n + text
        )
    assert glide_fast.restore(model) is model
    assert not report(model).served
    for name, value in gradients(model, inputs).items():
        assert torch.equal(value, expected[name]), name


def kinds(model: nn.Module) -> dict[str, int]:
    """How many modules of each class are served."""
    counts: dict[str, int] = {}
    for entry in report(model).served:
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return counts


def plain_and_served(model: nn.Module) -> tuple[nn.Module, Any]:
    """A plain copy of the model, and the model accelerated."""
    return copy.deepcopy(model), glide_fast.accelerate(model)
