"""How many were right, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """``right`` of ``count`` samples."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of the share (Wilson 1927)."""
        z, n, share = 1.96, self.count, self.share
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return centre - half, centre + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:6.1%}  ({self.right} of {self.count}; 95 % interval {low:.0%} to {high:.0%})"
