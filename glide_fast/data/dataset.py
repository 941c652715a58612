"""The one in-memory form of a training set: pictures, their captions and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CaptionedPictures"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedPictures:
    """Pictures of one size with one caption and one unique name each.

    ``images`` is uint8 RGB [N, H, W, 3]; ``captions`` and ``names`` have N entries.
    Raises ValueError when the three do not fit together.
    """

    images: NDArray[np.uint8]  # N H W 3
    captions: list[str]
    names: list[str]

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"images are {dtype} {list(shape)}; they must be uint8 [N, H, W, 3]")
        if not shape[0] == len(self.captions) == len(self.names):
            raise ValueError(
                f"{shape[0]} images, {len(self.captions)} captions and {len(self.names)} names; "
                "there must be one caption and one name a picture"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> CaptionedPictures:
        """Return the pictures at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return CaptionedPictures(
            images=self.images[chosen],
            captions=[self.captions[index] for index in chosen],
            names=[self.names[index] for index in chosen],
        )
