"""Nearest pictures by pixel distance: the plainest judge of a model that should know its training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.float64]


def squared_distances(samples: NDArray[np.uint8], pictures: NDArray[np.uint8]) -> Distances:
    """Mean squared differences of samples [N, H, W, 3] to pictures [M, H, W, 3]: [N, M], in 0 .. 255².

    The sums are exact integers, so that equal pictures have equal distances.

    Raises:
        ValueError: the two sizes differ.
    """
    if samples.shape[1:] != pictures.shape[1:]:
        raise ValueError(
            f"samples are {samples.shape[1:]} and pictures {pictures.shape[1:]}; resize one of them"
        )
    rows, columns = (images.reshape(len(images), -1).astype(np.float64) for images in (samples, pictures))
    squares = (rows**2).sum(1)[:, None] + (columns**2).sum(1)[None] - 2 * rows @ columns.T
    distances: Distances = squares / rows.shape[1]
    return distances


def nearest_rank(distances: Distances, own: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many pictures are strictly nearer to sample n than picture own[n]: [N, M], [N] -> [N]; 0 = nearest.

    A picture that occurs twice in the data ties with its copy, and both are the nearest.
    """
    mine = distances[np.arange(len(own)), own]
    ranks: NDArray[np.int64] = (distances < mine[:, None]).sum(1)
    return ranks
