"""Memory for large results on CPU, used again once nobody holds it.

The C library hands large blocks back to the system when they are freed, and every page of a new one costs a
fault: for the maps of a 256x256 U-Net that takes as long as computing them. Blocks are kept here instead,
by size, up to a limit.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes; smaller blocks the C library keeps by itself
MOST_FREE = 1 << 30  # bytes that may wait here
_FLOAT_BYTES = 4
_ALONE = 1  # holders of a storage that nobody but this module has


class _Blocks(threading.local):
    """The blocks of a thread, by size."""

    def __init__(self) -> None:
        self.blocks: defaultdict[int, list[torch.UntypedStorage]] = defaultdict(list)

    def take(self, size: int) -> torch.UntypedStorage:
        """A block of exactly ``size`` bytes that nobody else holds."""
        for block in self.blocks[size]:
            if _is_free(block):
                return block
        self._shrink()
        block = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
        self.blocks[size].append(block)
        return block

    def free(self) -> list[torch.UntypedStorage]:
        """The blocks that wait to be used again."""
        return [block for blocks in self.blocks.values() for block in blocks if _is_free(block)]

    def drop(self, block: torch.UntypedStorage) -> None:
        """Give a block back."""
        blocks = self.blocks[block.nbytes()]
        del blocks[next(index for index, each in enumerate(blocks) if each is block)]

    def _shrink(self) -> None:
        free = self.free()
        waiting = sum(block.nbytes() for block in free)
        for block in free:
            if waiting <= MOST_FREE:
                return
            waiting -= block.nbytes()
            self.drop(block)


_blocks = _Blocks()


def _is_free(block: torch.UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(block._cdata) == _ALONE


def empty(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A float32 tensor with arbitrary contents; ``strides`` without gaps."""
    size = _FLOAT_BYTES * math.prod(shape)
    if size < SMALLEST:
        return torch.empty_strided(shape, strides, dtype=torch.float32, device="cpu")
    return torch.empty(0, dtype=torch.float32, device="cpu").set_(_blocks.take(size), 0, shape, strides)


def empty_map(batch: int, channels: int, height: int, width: int) -> Tensor:
    """A channels-last map [B, C, H, W]."""
    row = width * channels
    return empty((batch, channels, height, width), (height * row, 1, row, channels))


def kept_bytes() -> int:
    """Memory of the blocks that wait in this thread to be used again."""
    return sum(block.nbytes() for block in _blocks.free())


def release() -> None:
    """Give the waiting blocks of this thread back."""
    for block in _blocks.free():
        _blocks.drop(block)
