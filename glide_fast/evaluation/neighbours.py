"""Fidelity and diversity by nearest neighbours in feature space.

A set is taken to fill the balls around each of its pictures that reach the k-th nearest other one.
Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) and density and coverage (Naeem et al. 2020,
arXiv 2002.09797) ask which pictures of one set lie in the balls of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from glide_fast.evaluation.features import Features, check_widths, checked

_BLOCK_ENTRIES = 1 << 22  # distances held at a time: 32 MiB


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How two sets of pictures cover each other; all but the density lie in 0 .. 1.

    precision: share of samples in the ball of some reference. recall: share of references in the ball of some
    sample. density: balls of references around a sample, over k: about 1 for equal distributions, but not
    bounded. coverage: share of references whose ball holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(samples: ArrayLike, references: ArrayLike, *, neighbours: int = 3) -> Overlap:
    """Precision, recall, density and coverage of samples [N, D] against references [M, D].

    ``neighbours`` is k, 3 for precision and recall in their paper; density and coverage take 5 in theirs. All
    depend on N and M: compare only at equal numbers. Time grows with N * M, memory with N + M.

    Raises:
        ValueError: too few rows for k neighbours, different widths, or features that are not finite.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours {neighbours} must be at least 1")
    fake = checked(samples, "samples", least=neighbours + 1)
    real = checked(references, "references", least=neighbours + 1)
    check_widths(fake.shape[1], "samples", real.shape[1], "references")
    centre = real.mean(axis=0)  # distances stay, and lose fewer digits
    fake, real = fake - centre, real - centre
    fake_radii, real_radii = _radii(fake, neighbours), _radii(real, neighbours)
    balls = np.empty(len(fake), dtype=np.int64)  # of references, around each sample
    recalled, covered = np.zeros(len(real), dtype=np.bool_), np.zeros(len(real), dtype=np.bool_)
    for rows, squares in _blocks(fake, real):
        inside = squares <= real_radii
        balls[rows] = inside.sum(axis=1)
        covered |= inside.any(axis=0)
        recalled |= (squares <= fake_radii[rows, None]).any(axis=0)
    return Overlap(
        precision=float((balls > 0).mean()),
        recall=float(recalled.mean()),
        density=float(balls.mean() / neighbours),
        coverage=float(covered.mean()),
    )


def _radii(points: Features, neighbours: int) -> Features:
    """The squared distance of each point [N, D] to its k-th nearest other point: [N]."""
    radii = np.empty(len(points))
    for rows, squares in _blocks(points, points):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(squares, neighbours - 1, axis=1)[:, neighbours - 1]
    return radii


def _blocks(a: Features, b: Features) -> Iterator[tuple[slice, Features]]:
    """Squared distances of [N, D] to [M, D], some rows [R, M] at a time; what rounding may have left is 0."""
    height = max(1, _BLOCK_ENTRIES // len(b))
    rounding = np.finfo(np.float64).eps * a.shape[1]
    b_squares = (b**2).sum(axis=1)
    for start in range(0, len(a), height):
        rows = slice(start, min(start + height, len(a)))
        sums = (a[rows] ** 2).sum(axis=1)[:, None] + b_squares
        squares = sums - 2 * a[rows] @ b.T
        squares[squares < rounding * sums] = 0
        yield rows, squares
