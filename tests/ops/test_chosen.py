"""Which weights our GPU kernels multiply by: the choice is the parameter's, and ends with it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from glide_fast.ops import chosen


def test_the_choice_is_the_parameters_and_that_of_what_is_made_of_it() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    other = nn.Parameter(torch.randn(4, 4))
    chosen.choose([weight])
    assert chosen.is_chosen(weight)
    assert chosen.is_chosen(weight.to(torch.bfloat16)), "mixed precision converts at use"
    assert not chosen.is_chosen(other)
    assert not chosen.is_chosen(other.to(torch.bfloat16))
    chosen.forget([weight, other])
    assert not chosen.is_chosen(weight)


def test_convolutions_are_laid_out_as_the_kernel_reads_them_and_back() -> None:
    convolution, pointwise = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 1)
    before = convolution.weight.detach().clone()
    weights = [convolution.weight, pointwise.weight]
    chosen.choose(weights)
    chosen.choose(weights)
    assert convolution.weight is weights[0]
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolution.weight, before)
    chosen.forget(weights)
    assert convolution.weight.is_contiguous()
    assert torch.equal(convolution.weight, before)


def test_a_layout_that_was_there_stays() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    chosen.choose([layer.weight])
    chosen.forget([layer.weight])
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_choices_end_with_their_weights() -> None:
    before = len(chosen._chosen)
    layer = nn.Linear(4, 4)
    chosen.choose([layer.weight])
    assert len(chosen._chosen) == before + 1
    del layer
    gc.collect()
    assert len(chosen._chosen) == before
