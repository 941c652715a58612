"""An input that comes in two parts, one's channels behind the other's: joined, and its gradient told apart.

A decoder's block reads the map before it and an encoder's. In training both are kept as they are, their
gradient is written as one map, and each gets its channels of it as a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glide_fast.ops.dispatch import has_kernel


def joined(x: Tensor, second: Tensor | None, dim: int) -> Tensor:
    """The two parts side by side along a dimension."""
    return x if second is None else torch.cat([x, second], dim=dim)


def width(x: Tensor, second: Tensor | None, dim: int) -> int:
    """The size of both parts along a dimension."""
    return int(x.shape[dim]) + (0 if second is None else int(second.shape[dim]))


def stay_apart(x: Tensor) -> bool:
    """Whether training reads x and another map where they lie: by kernels that do, in eager code.

    Elsewhere every backward pass joins them again, and to join them once before all is cheaper.
    """
    return has_kernel("norm_convolution_backward", x)


def apart(gradient: Tensor, x: Tensor, second: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """The parts' gradients as views of that of both."""
    if second is None:
        return gradient, None
    size = x.shape[dim]
    return gradient.narrow(dim, 0, size), gradient.narrow(dim, size, second.shape[dim])


def together(
    grad_x: Tensor | None, grad_second: Tensor | None, x: Tensor, second: Tensor, dim: int
) -> Tensor | None:
    """The gradient of both: where theirs are neighbours in one tensor, that part of it as it lies."""
    if grad_x is None and grad_second is None:
        return None
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
    grad_second = torch.zeros_like(second) if grad_second is None else grad_second
    behind = grad_x.storage_offset() + grad_x.shape[dim] * grad_x.stride(dim)
    neighbours = grad_x.stride() == grad_second.stride() and grad_second.storage_offset() == behind
    if grad_x._base is None or grad_x._base is not grad_second._base or not neighbours:
        return torch.cat([grad_x, grad_second], dim=dim)
    shape = list(x.shape)
    shape[dim] = width(x, second, dim)
    return grad_x.as_strided(shape, grad_x.stride(), grad_x.storage_offset())
