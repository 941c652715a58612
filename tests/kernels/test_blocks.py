"""Blocks of the models, served by all kernels together, agree with the reference in value and gradient."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from glide_fast.models import blocks
from glide_fast.models.blocks import AttentionBlock, ResBlock
from glide_fast.models.clip import ClipBlock
from glide_fast.models.layers import GroupNorm
from glide_fast.models.transformer import TransformerBlock
from glide_fast.ops import column_sums, use_reference
from tests.kernels.interpreter import DEVICE, use_kernels

Module = TypeVar("Module", bound=nn.Module)


def filled(module: Module) -> Module:
    """The module on the device, with random parameters: matrices of variance 1/fan-in, vectors around 0.5."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1
            parameter.copy_(values * parameter[0].numel() ** -0.5 if matrix else 0.5 + 0.1 * values)
    return module.to(DEVICE)


def draw(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).norm() / expected.norm()) <= 2e-6


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes leave the sums of a bias's gradient for it, and decoders' inputs stay apart."""
    monkeypatch.setattr(column_sums, "wanted", lambda _op, _x, *, learning: column_sums.COPIES * learning)
    monkeypatch.setattr(blocks, "stay_apart", lambda _x: True)


def compare(module: nn.Module, *inputs: Any) -> None:
    """Output and every gradient, by the kernels in float32 and by the reference in float64."""
    results = []
    for context, dtype in ((use_kernels(), torch.float32), (use_reference(), torch.float64)):
        module = module.to(dtype)
        leaves = [None if each is None else each.detach().to(dtype).requires_grad_() for each in inputs]
        with context:
            y = module(*leaves)
            wanted = [*(each for each in leaves if each is not None), *module.parameters()]
            results.append([y, *torch.autograd.grad(y, wanted, draw(*y.shape).to(dtype))])
    for actual, expected in zip(*results, strict=True):
        close(actual.detach(), expected.detach())


@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_a_residual_block_learns_alike(resample: Any, scale_shift_norm: bool) -> None:
    block = ResBlock(12, 24, 16, norm_groups=4, resample=resample, scale_shift_norm=scale_shift_norm)
    compare(filled(block), draw(2, 12, 6, 4), draw(2, 16))


LAYOUTS = (torch.channels_last, torch.contiguous_format)


class WithInput(nn.Module):
    """A block's map, and beside it what another reader makes of the block's input."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y, x = self.block.with_input(x, embedding)
        return torch.cat([y.flatten(1), x.square().flatten(1)], dim=1)


@pytest.mark.parametrize("resample", ["none", "down"])
def test_a_residual_block_and_another_reader_learn_alike(resample: Any) -> None:
    block = ResBlock(12, 24, 16, norm_groups=4, resample=resample)
    compare(WithInput(filled(block)), draw(2, 12, 6, 4), draw(2, 16))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_decoders_block_reads_both_inputs_where_they_lie(layout: torch.memory_format) -> None:
    block = filled(ResBlock(20, 12, 16, norm_groups=4))
    x, embedding, skip = draw(2, 12, 6, 4), draw(2, 16), draw(2, 8, 6, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        with use_kernels():
            y = block(x, embedding, skip)
        with use_reference():
            expected = block.double()(x.double(), embedding.double(), skip.double())
    close(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("channels", [13, 16])
def test_a_decoders_block_learns_alike(channels: int, resample: Any, layout: torch.memory_format) -> None:
    block = ResBlock(20, 12, 16, norm_groups=4, resample=resample)
    x, skip = draw(2, channels, 6, 4), draw(2, 20 - channels, 6, 4).contiguous(memory_format=layout)
    compare(filled(block), x, draw(2, 16), skip)


def test_a_decoders_block_without_a_projection_learns_alike() -> None:
    compare(filled(ResBlock(20, 20, 16, norm_groups=4)), draw(2, 13, 6, 4), draw(2, 16), draw(2, 7, 6, 4))


def test_an_attention_block_learns_alike() -> None:
    block = AttentionBlock(32, 2, 16, norm_groups=4)
    compare(filled(block), draw(1, 32, 4, 4), draw(1, 5, 16))


class Chain(nn.Module):
    """What a level of a U-Net does: blocks with and without a projection, attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ResBlock(8, 16, 16, norm_groups=4)
        self.attention = AttentionBlock(16, 2, norm_groups=4)
        self.second = ResBlock(16, 16, 16, norm_groups=4)
        self.norm = GroupNorm(16, 4)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y: Tensor = self.norm(self.second(self.attention(self.first(x, embedding)), embedding))
        return y


def test_no_gradient_is_read_again_for_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    plain = Tensor.sum

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        sums.append(tensor.shape)
        return plain(tensor, *args)

    chain = filled(Chain())
    x = draw(2, 8, 6, 4).requires_grad_()
    with use_kernels():
        y = chain(x, draw(2, 16))
        monkeypatch.setattr(Tensor, "sum", counted)
        y.backward(draw(2, 16, 6, 4))
    monkeypatch.undo()
    # Of queries, keys and values, and of the timestep's projections; not of maps.
    assert all(len(shape) < 4 and shape != (2, 24, 16) for shape in sums)
    compare(chain, draw(2, 8, 6, 4), draw(2, 16))


class Level(nn.Module):
    """A level of a U-Net in small: a map goes on to the next block, and beside it to a decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResBlock(8, 12, 16, norm_groups=4)
        self.middle = ResBlock(12, 16, 16, norm_groups=4)
        self.decoder = ResBlock(28, 16, 16, norm_groups=4)
        self.norm = GroupNorm(16, 4)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y, skip = self.middle.with_input(self.encoder(x, embedding), embedding)
        result: Tensor = self.norm(self.decoder(y, embedding, skip))
        return result


def test_a_level_learns_alike() -> None:
    compare(filled(Level()), draw(2, 8, 6, 4), draw(2, 16))


def test_a_decoder_joins_no_maps_and_no_bias_reads_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, parts = [], []
    plain, join = Tensor.sum, torch.cat

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        sums.append(tensor.shape)
        return plain(tensor, *args)

    def seen(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        parts.extend(each.shape for each in tensors)
        return join(tensors, *args, **kwargs)

    level = filled(Level())
    x = draw(2, 8, 6, 4).requires_grad_()
    with use_kernels():
        monkeypatch.setattr(torch, "cat", seen)
        y = level(x, draw(2, 16))
        monkeypatch.setattr(Tensor, "sum", counted)
        y.backward(draw(2, 16, 6, 4))
    monkeypatch.undo()
    assert sums == [(2, 32)] * 2 + [(2, 24)]  # of what the blocks make of the timestep
    assert all(len(shape) < 4 for shape in parts)  # float32 tokens are joined by who multiplies them


@pytest.mark.parametrize("copies", [0, 2])
def test_transformers_blocks_learn_alike(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_sums, "wanted", lambda _op, _x, *, learning: copies * learning)
    compare(filled(TransformerBlock(32, 2)), draw(2, 7, 32))
    compare(filled(ClipBlock(32, 2, causal=False)), draw(2, 7, 32))
