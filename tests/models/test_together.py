"""Layers of one input as one product: the layers' own numbers and gradients, and when it may not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models import UNet
from glide_fast.models.layers import Linear, PointwiseConv
from glide_fast.models.together import can_be_together, together
from tests.models.tiny import noise, prompt, tiny

T = torch.tensor([3, 700])
WIDTHS = (4, 10, 6)


class Share(nn.Parameter):
    """As a process has it of a weight that is spread over several."""

    placements = ()


def layers_of(kind: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    return [kind(8, width).to(dtype) for width in WIDTHS]


@pytest.mark.parametrize("kind", [Linear, PointwiseConv])
@pytest.mark.parametrize(("weights", "given"), [("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("rows", [(3,), (2, 5), (0,)])
def test_values_and_gradients_are_those_of_the_layers(
    kind: Any, weights: str, given: str, rows: tuple[int, ...]
) -> None:
    layers = layers_of(kind, getattr(torch, weights))
    x = noise(*rows, 8).to(getattr(torch, given))
    if kind is PointwiseConv and len(rows) == 1:
        x = x[None]
    arriving = noise(*x.shape[:-1], sum(WIDTHS)).to(x.dtype)
    found: list[list[Tensor]] = []
    for function in (together, lambda x, layers: torch.cat([layer(x) for layer in layers], dim=-1)):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *(each for layer in layers for each in layer.parameters())]
        y = function(leaf, layers)
        found.append([y, *torch.autograd.grad(y, leaves, arriving)])
    tolerance = 1e-6 if given == "float32" else 2e-2
    for mine, expected in zip(*found, strict=True):
        assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=10 * tolerance)


def test_gradients_are_those_of_differences() -> None:
    layers = layers_of(Linear, torch.float64)
    leaves = [
        noise(3, 8).double().requires_grad_(),
        *(each for layer in layers for each in layer.parameters()),
    ]

    def function(*leaves: Tensor) -> Tensor:
        for layer, weight, bias in zip(layers, leaves[1::2], leaves[2::2], strict=True):
            layer._parameters.update(weight=weight, bias=bias)
        return together(leaves[0], layers)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_learns_nothing_gets_nothing(frozen: str) -> None:
    layers, x = layers_of(Linear), noise(3, 8).requires_grad_(frozen != "x")
    for layer in layers:
        layer.requires_grad_(frozen != "weights")
    together(x, layers).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert all(
        (each.weight.grad is None) == (each.bias.grad is None) == (frozen == "weights") for each in layers
    )


def test_others_layers_watched_ones_and_shares_are_left_alone() -> None:
    layers = layers_of(Linear)
    assert can_be_together(layers)
    assert not can_be_together([])
    assert not can_be_together([*layers, nn.Linear(8, 4)])
    assert not can_be_together([*layers, Linear(8, 4, bias=False)])
    handle = layers[0].register_forward_hook(lambda *_: None)
    assert not can_be_together(layers)
    handle.remove()
    assert can_be_together(layers)
    layers[1]._parameters["weight"] = Share(layers[1].weight)
    assert not can_be_together(layers)


def learning() -> UNet:
    torch.manual_seed(0)
    network = tiny()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.train()


def test_a_network_learns_the_same_with_its_text_projected_at_once() -> None:
    network, x, found = learning(), noise(2, 3, 8, 8), []
    for at_once in (False, True):
        network.zero_grad(set_to_none=True)
        text = network.text(**prompt(2))
        assert text.projections == ()
        if at_once:
            text = text._replace(projections=network.projections_together(text.sequence))
        network(x, T, text=text).square().mean().backward()
        found.append({name: each.grad for name, each in network.named_parameters()})
    for name, expected in found[0].items():
        assert expected is not None
        assert (found[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name


def test_it_is_done_where_launches_cost_and_nothing_is_computed_again() -> None:
    network = learning().to("meta")
    given = {name: each.to("meta") for name, each in prompt(2).items()}
    blocks = len(network._readers())
    assert len(network.text(**given).projections) == blocks > 1
    network.middle_block.recompute = True
    assert network.text(**given).projections == ()
    with torch.no_grad():
        assert len(network.text(**given).projections) == blocks
