"""One product for all blocks: the same numbers, from weights that stay the layers' own and may change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models import UNet
from glide_fast.models.blocks import ResBlock
from glide_fast.models.modulation import joined, modulations, projected
from tests.models.tiny import noise, prompt, tiny

T = torch.tensor([3, 700])


def blocks_of(network: UNet) -> list[ResBlock]:
    return [layer for stage in network.stages() for layer in stage if isinstance(layer, ResBlock)]


class Share(nn.Parameter):
    """As a process has it of a weight that is spread over several."""

    placements = ()


def filled(**changes: bool) -> UNet:
    torch.manual_seed(0)
    network = tiny(**changes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)


def test_projections_are_those_of_the_layers_and_follow_their_weights() -> None:
    network = filled()
    blocks, embedding = blocks_of(network), noise(2, 4 * network.config.channels)
    assert len(blocks) == sum(isinstance(module, ResBlock) for module in network.modules())
    before = {name: each.clone() for name, each in network.state_dict().items()}
    for change in (1.0, 2.0):
        for parameter in network.parameters():
            parameter.mul_(change)
        found = projected(blocks, embedding, torch.float32)
        for block in blocks:
            expected = block.emb_layers["1"](embedding)
            torch.testing.assert_close(torch.cat(found[block], dim=1), expected, rtol=1e-5, atol=1e-6)
            assert [each.shape[1] for each in found[block]] == block.modulation_widths
    for name, each in network.state_dict().items():
        torch.testing.assert_close(each, 2 * before[name], rtol=0, atol=0)


def test_parameters_are_laid_out_once_and_again_when_one_was_replaced() -> None:
    parameters = [nn.Parameter(noise(rows, 5, seed=rows)) for rows in (2, 3, 4)]
    expected = torch.cat([each.detach().clone() for each in parameters])
    whole = joined(parameters)
    assert torch.equal(whole, expected)
    assert joined(parameters).data_ptr() == whole.data_ptr() == parameters[0].data_ptr()
    assert all(each.requires_grad and each.is_leaf for each in parameters)
    parameters[1].data = torch.zeros(3, 5)
    expected[2:5] = 0
    assert torch.equal(joined(parameters), expected)


def test_what_was_laid_out_while_sampling_can_be_trained() -> None:
    network = filled().requires_grad_(True)
    with torch.inference_mode():
        projected(blocks_of(network), noise(2, 4 * network.config.channels), torch.float32)
    given = prompt(2)
    network(noise(2, 3, 8, 8), T, **given).square().mean().backward()
    layer = blocks_of(network)[1].emb_layers["1"]
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()
    assert copy.deepcopy(network).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_learns_the_same_from_one_product(
    scale_shift_norm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = filled(scale_shift_norm=scale_shift_norm).requires_grad_(True)
    network.compute_dtype = dtype
    x, found = noise(2, 3, 8, 8), []
    for together in (False, True):
        if together:
            monkeypatch.setattr("glide_fast.models.trunk.modulations", projected)
        network.zero_grad(set_to_none=True)
        network(x, T, **prompt(2)).square().mean().backward()
        found.append({name: each.grad for name, each in network.named_parameters()})
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    for name, expected in found[0].items():
        assert expected is not None
        difference = (found[1][name] - expected).norm()
        assert difference <= tolerance * expected.norm() + 1e-9, name


def test_on_the_cpu_blocks_get_the_embedding_itself() -> None:
    network = filled()
    embedding = noise(2, 4 * network.config.channels)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert modulations(blocks_of(network), embedding, torch.float32) is embedding


@pytest.mark.parametrize("gradients", [False, True])
def test_a_projection_that_is_watched_or_spread_over_processes_is_called_itself(gradients: bool) -> None:
    network = filled().to("meta")
    embedding = torch.empty(2, 4 * network.config.channels, device="meta")
    blocks = blocks_of(network)
    with torch.set_grad_enabled(gradients):
        assert isinstance(modulations(blocks, embedding, torch.float32), dict)
        handle = blocks[2].emb_layers["1"].register_forward_hook(lambda *_: None)
        assert modulations(blocks, embedding, torch.float32) is embedding
        handle.remove()
        assert isinstance(modulations(blocks, embedding, torch.float32), dict)
        layer = blocks[1].emb_layers["1"]
        layer._parameters["weight"] = Share(layer.weight)
        assert modulations(blocks, embedding, torch.float32) is embedding


@pytest.mark.parametrize("given", ["text", "text and embedding"])
def test_a_network_is_the_same_with_its_projections_made_before(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = filled(), noise(2, 3, 8, 8)
    with torch.no_grad():
        text = network.text(**prompt(2))
        assert text.projections == ()
        expected: Tensor = network(x, T, text=text)
        if given == "text and embedding":
            monkeypatch.setattr("glide_fast.models.trunk.modulations", projected)
        again = text._replace(projections=network.projections(text.sequence))
        assert again.projections
        torch.testing.assert_close(network(x, T, text=again), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="zip"):
            network(x, T, text=again._replace(projections=again.projections[1:]))
