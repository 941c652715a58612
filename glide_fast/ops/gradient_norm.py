"""The norm of all gradients together, which decides whether they are clipped.

    norm = sqrt(sum over all tensors and their elements of g^2)

Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013), section 3.2,
https://arxiv.org/abs/1211.5063.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glide_fast.ops import reference_elements as reference
from glide_fast.ops.dispatch import define


def _fake(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float32)


NORM = define("gradient_norm", "(Tensor[] gradients) -> Tensor", reference.gradient_norm, _fake)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, one float32 number on their device. Not differentiable.

    Args:
        gradients: any shapes and strides; their dtypes may differ, sums are float32.

    Raises:
        ValueError: there is no gradient, or they are on several devices.
    """
    devices = {gradient.device for gradient in gradients}
    if len(devices) != 1:
        told = ", ".join(sorted(map(str, devices))) or "none at all"
        raise ValueError(f"the norm takes gradients of one device but these are on: {told}")
    norm: Tensor = NORM(list(gradients))
    return norm
