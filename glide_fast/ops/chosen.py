"""Weights whose products on a GPU were asked of our own kernels, in place of cuDNN's and cuBLAS's.

What is kept is the choice alone, beside the parameter and no longer than it: no values are copied, so none
can go stale. Where a layer converts its weight at use, as mixed precision does, the choice is that of the
parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Weight -> its layout before, where that was changed.
_chosen: Any = WeakTensorKeyDictionary()


def choose(weights: Iterable[Tensor]) -> None:
    """From now on our kernels compute the products with these weights on a GPU.

    Weights of 3x3 convolutions are laid out channels-last, as the kernel reads them.
    """
    for weight in weights:
        unlike = weight.shape[2:] == (3, 3) and not weight.is_contiguous(memory_format=torch.channels_last)
        if unlike:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        _chosen[weight] = unlike or _chosen.get(weight, False)


def forget(weights: Iterable[Tensor]) -> None:
    """Leave the products with these weights to the device's library again; lay them out as they were."""
    for weight in weights:
        if _chosen.pop(weight, False):
            weight.data = weight.data.contiguous()


def is_chosen(weight: Tensor) -> bool:
    """Whether our kernels compute the products with a weight, or with the one it was converted from."""
    return bool(_chosen) and (weight in _chosen or _origin(weight) in _chosen)


def _origin(weight: Tensor) -> Tensor:
    """The parameter that autograd saw converted into this weight; the weight itself without one."""
    node: Any = weight.grad_fn
    if node is None or not node.next_functions:
        return weight
    return getattr(node.next_functions[0][0], "variable", weight)
