"""The norm of all gradients together, and the factor that clips them where it is too large.

    norm = sqrt(sum over all tensors and their elements of g^2) / scale
    factor = min(1, limit / norm) / scale

Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013), section 3.2,
https://arxiv.org/abs/1211.5063.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glide_fast.ops import reference_elements as reference
from glide_fast.ops.dispatch import define


def _fake(
    gradients: list[Tensor],
    limit: float,  # noqa: ARG001 (a fake has the op's signature)
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    norm = gradients[0].new_empty((), dtype=torch.float32)
    return norm, torch.empty_like(norm)


NORM = define(
    "gradient_norm",
    "(Tensor[] gradients, float limit, float scale) -> (Tensor norm, Tensor factor)",
    reference.gradient_norm,
    _fake,
)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], limit: float, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The norm of all gradients together, and what to multiply them by so that it is ``limit`` at most.

    Args:
        gradients: any shapes and strides; their dtypes may differ, sums are float32.
        limit: the largest norm that is left as it is.
        scale: the gradients are so many times as large as they are meant; the norm is that of the meant ones,
            and multiplied by the factor they are no longer scaled.

    Returns:
        Two float32 numbers on the gradients' device. Not differentiable.

    Raises:
        ValueError: there is no gradient, or they are on several devices.
    """
    devices = {gradient.device for gradient in gradients}
    if len(devices) != 1:
        told = ", ".join(sorted(map(str, devices))) or "none at all"
        raise ValueError(f"the norm takes gradients of one device but these are on: {told}")
    norm, factor = NORM(list(gradients), limit, scale)
    return norm, factor
