"""Pixel distances and ranks on pictures whose order is known."""

from __future__ import annotations

import numpy as np
import pytest

from glide_fast.evaluation import nearest_rank, squared_distances


def pictures(*levels: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), level, dtype=np.uint8) for level in levels])


def test_distances_are_mean_squares() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    b = generator.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    expected = [[((x.astype(float) - y) ** 2).mean() for y in b] for x in a]
    np.testing.assert_allclose(squared_distances(a, b), expected, rtol=1e-12)


def test_equal_pictures_have_distance_zero_exactly() -> None:
    a = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert (np.diag(squared_distances(a, a)) == 0).all()


def test_rank_counts_the_strictly_nearer_pictures() -> None:
    distances = squared_distances(pictures(100), pictures(0, 90, 101, 103, 255))
    ranks = [nearest_rank(distances, np.array([own]))[0] for own in range(5)]
    assert ranks == [3, 2, 0, 1, 4]


def test_a_copy_of_the_own_picture_ties() -> None:
    distances = squared_distances(pictures(100), pictures(100, 50, 100))
    assert nearest_rank(distances, np.array([2]))[0] == 0


def test_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples are \(4, 4, 3\) and pictures \(8, 8, 3\)"):
        squared_distances(pictures(0), np.zeros((1, 8, 8, 3), dtype=np.uint8))
