"""A transformer's bias gradients where backward ops give the sums: the same, and nothing is read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models.layer_norm import LayerNorm
from glide_fast.models.transformer import Transformer
from glide_fast.ops import column_sums

WIDTH, LAYERS = 12, 3


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    network(leaf).sin().sum().backward()
    assert leaf.grad is not None
    return {"x": leaf.grad, **{name: each.grad for name, each in network.named_parameters()}}  # type: ignore[dict-item]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(Transformer(WIDTH, LAYERS, 2), LayerNorm(WIDTH))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.double()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every backward op gives sums; how many gradients of biases are found, and how many are read."""
    counted: Counter[str] = Counter()
    recall: Callable[[Tensor, int], Tensor | None] = column_sums._recall

    def spy(gradient: Tensor, dim: int) -> Tensor | None:
        kept = recall(gradient, dim)
        counted["read" if kept is None else "found"] += 1
        return kept

    monkeypatch.setattr(column_sums, "_recall", spy)
    monkeypatch.setattr(column_sums, "wanted", lambda _op, _x, *, learning: column_sums.COPIES * learning)
    return counted


def test_every_layers_bias_gradient_is_found(network: nn.Module, request: pytest.FixtureRequest) -> None:
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    expected = gradients(network, x)
    counted = request.getfixturevalue("found")
    for _ in range(2):
        counted.clear()
        actual = gradients(network, x)
        assert counted == {"found": 4 * LAYERS}
        for name, each in expected.items():
            torch.testing.assert_close(actual[name], each, msg=name)


def test_gradients_of_biases_are_added_up_over_two_passes(network: nn.Module, found: Counter[str]) -> None:
    x = torch.randn(2, 2, 5, WIDTH, dtype=torch.float64)
    once = [gradients(network, each) for each in x]
    network.zero_grad(set_to_none=True)
    for each in x:
        network(each).sin().sum().backward()
    assert found["read"] == 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, once[0][name] + once[1][name], msg=name)
