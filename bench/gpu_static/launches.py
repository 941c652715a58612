"""Kernel launches with the bytes they move and the FLOPs they do.

A call of a library may be several kernels (cuDNN's convolution and PyTorch's sum of its bias). Its first
one is the call, the others are ``further``: counts of calls compare with other people's counts of
operators, counts of kernels are what a GPU sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel on the device; ``op`` is the operator that launched it."""

    kernel: str
    op: str
    moved: int  # bytes read and written, each address once
    flops: int = 0
    half: bool = True  # whether the FLOPs are of 16-bit operands
    further: bool = False


@dataclass(frozen=True)
class Totals:
    """The sums over a computation; the bytes of calls are those of the first kernels."""

    calls: int
    kernels: int
    call_bytes: int
    kernel_bytes: int
    flops: int

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> Totals:
        """Of all launches."""
        first = [each for each in launches if not each.further]
        return cls(
            calls=len(first),
            kernels=len(launches),
            call_bytes=sum(each.moved for each in first),
            kernel_bytes=sum(each.moved for each in launches),
            flops=sum(each.flops for each in launches),
        )


def footprint(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those that are there many times by a stride of zero once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def moved(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors that are on a GPU, each once."""
    distinct = {id(each): each for each in tensors if each is not None and each.is_cuda}
    return sum(map(footprint, distinct.values()))


def is_half(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the operands of a product have 16 bits."""
    return any(each is not None and each.dtype in (torch.float16, torch.bfloat16) for each in tensors)
