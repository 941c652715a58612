"""The one in-memory form of a training set: pictures, their captions and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["CaptionedPictures"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedPictures:
    """Pictures of one size with one caption and one unique name each.

    ``images`` is uint8 RGB [N, H, W, 3]; ``captions`` and ``names`` have N entries, as have ``labels``, the
    pictures' class indices, where there are classes.
    Raises ValueError when they do not fit together.
    """

    images: NDArray[np.uint8]  # N H W 3
    captions: list[str]
    names: list[str]
    labels: NDArray[np.int64] | None = None  # N

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(f"images are {dtype} {list(shape)}; they must be uint8 [N, H, W, 3]")
        if not shape[0] == len(self.captions) == len(self.names):
            raise ValueError(
                f"{shape[0]} images, {len(self.captions)} captions and {len(self.names)} names; "
                "there must be one caption and one name a picture"
            )
        if self.labels is not None and self.labels.shape != (shape[0],):
            raise ValueError(
                f"labels are {list(self.labels.shape)}; there must be one for each of {shape[0]}"
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
            labels=None if self.labels is None else self.labels[chosen],
        )

    def label_tensor(self) -> Tensor:
        """The labels as int64 [N]; ValueError where there are none."""
        if self.labels is None:
            raise ValueError("these pictures have no labels, which a model with classes learns from")
        return torch.from_numpy(self.labels)
