"""Which of two kinds of guidance is better at equal diversity, from what a sweep of their scales measured.

A kind is a line of points (diversity, fidelity) in order of its scale. What counts is its frontier: the
best fidelity on the line that keeps at least some diversity. Two kinds are compared by the mean difference of
their frontiers over the diversities that both reach, once a seed; a Student interval says how sure that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEPS = 201  # diversities at which frontiers are compared
_STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # 97.5 %, 1 .. 9 degrees of freedom
_NORMAL = 1.96


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % confidence interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: ArrayLike) -> Interval:
        """Student's interval of at least two values that are normal and independent.

        Raises:
            ValueError: fewer than two values.
        """
        found = np.asarray(values, dtype=np.float64)
        if found.ndim != 1 or len(found) < 2:
            raise ValueError(f"an interval of {found.shape} values is undefined; give at least 2")
        freedom = len(found) - 1
        quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL + 2.7 / freedom
        return cls(mean=float(found.mean()), half=float(quantile * found.std(ddof=1) / math.sqrt(len(found))))

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half


def frontier(points: Sequence[tuple[float, float]], diversities: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best fidelity on the line through the points with at least each diversity; -inf where none has."""
    best = np.full(len(diversities), -np.inf)
    for diversity, fidelity in points:
        best = np.where(diversity >= diversities, np.maximum(best, fidelity), best)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 != x1:
            share = (diversities - x0) / (x1 - x0)
            crossed = (share >= 0) & (share <= 1)
            best = np.where(crossed, np.maximum(best, y0 + share * (y1 - y0)), best)
    return best


def advantage(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """The mean lead in fidelity of the first kind over the second at the diversities that both reach.

    Raises:
        ValueError: they have no diversity in common; lines that begin at the same point always have.
    """
    low = max(min(x for x, _ in points) for points in (first, second))
    high = min(max(x for x, _ in points) for points in (first, second))
    if low > high:
        raise ValueError(f"one line ends at diversity {high:.3g}, the other begins at {low:.3g}")
    diversities = np.linspace(low, high, STEPS)
    return float((frontier(first, diversities) - frontier(second, diversities)).mean())
