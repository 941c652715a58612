"""Sums over the rows of a gradient, kept by who wrote it for who needs them: the gradient of a bias.

What is added to every row, a pixel or a token, has for its gradient the sum of the rows' gradients. The
kernel that writes those has them at hand; read once more they would cost the whole map. They are kept beside
the very tensor that they are of, die with it, and count only while it is as it was.

Only backward passes of autograd keep and look up sums, never the ops that they call: compiled code reuses
the memory of tensors without raising their versions, and calls ops alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glide_fast.ops.dispatch import has_kernel

# A residual block's last convolution and the 1x1 beside it get the same gradient, and each keeps its bias's.
COPIES = 2


@dataclass(frozen=True)
class _Sums:
    version: int
    copies: Tensor  # [n, C]
    in_rows: bool  # the gradient is dense, and a row's channels are adjacent
    taken: list[tuple[int, int, int]] = field(default_factory=list)  # copy, first channel, behind the last

    def take(self, first: int, last: int) -> Tensor | None:
        """These channels of a copy of which nobody has them; None without one."""
        for number, copy in enumerate(self.copies.unbind()):
            if all(number != other or last <= low or high <= first for other, low, high in self.taken):
                self.taken.append((number, first, last))
                return copy[first:last]
        return None


_remembered: Any = WeakTensorKeyDictionary()


def wanted(op: str, x: Tensor, *, learning: bool) -> int:
    """How many copies of its sums an op shall make beside a gradient like x: none if it had to read it.

    Nor where its own parameters are not ``learning``: the biases before it will hardly do so either.
    """
    return COPIES if learning and has_kernel(op, x) else 0


def remember(gradient: Tensor, dim: int, sums: Tensor) -> None:
    """Keep the sums [n, C] over all dimensions of a gradient but ``dim``; each copy is handed out once."""
    if len(sums):
        in_rows = _are_rows(gradient, dim % gradient.ndim, sums.shape[1])
        _remembered[gradient] = _Sums(gradient._version, sums, in_rows)


def bias_gradient(gradient: Tensor, dim: int) -> Tensor:
    """The sum [C] over all dimensions but ``dim``; no work where it, or what it is a view of, has sums."""
    dim %= gradient.ndim
    kept = _recall(gradient, dim)
    if kept is not None:
        return kept
    if dim == gradient.ndim - 1:
        return gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return gradient.sum([each for each in range(gradient.ndim) if each != dim])


def _recall(gradient: Tensor, dim: int) -> Tensor | None:
    whole = gradient if gradient in _remembered or gradient._base is None else gradient._base
    if whole not in _remembered or gradient.numel() == 0:
        return None
    sums: _Sums = _remembered[whole]
    if sums.version != whole._version:
        return None
    pitch, width = sums.copies.shape[1], gradient.shape[dim]
    if gradient is whole:
        return sums.take(0, pitch)
    first = int(gradient.storage_offset() - whole.storage_offset())
    complete = gradient.numel() // width == whole.numel() // pitch and first + width <= pitch
    if not (sums.in_rows and complete and _are_rows(gradient, dim, pitch)):
        return None
    return sums.take(first, first + width)


def _are_rows(tensor: Tensor, dim: int, pitch: int) -> bool:
    """Whether channels are adjacent, and the other dimensions' rows in order, ``pitch`` numbers apart."""
    if tensor.stride(dim) != 1:
        return False
    for each in reversed(range(tensor.ndim)):
        if each != dim and tensor.shape[each] != 1:
            if tensor.stride(each) != pitch:
                return False
            pitch *= tensor.shape[each]
    return True
