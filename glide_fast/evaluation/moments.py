"""Mean and covariance of features that come in pieces, from one process or many.

The pieces are merged as deviations from their means (Chan, Golub & LeVeque 1983), never as sums of squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from glide_fast.evaluation.features import Features, check_widths, checked


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """A mean [D] and a covariance [D, D]."""

    mean: Features
    covariance: Features


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """``count`` features with their mean [D] and ``scatter`` [D, D], the sum of outer squares of deviations.

    Add the moments of batches as they come, and those of all ranks at the end::

        moments = Moments.empty(512)
        for pictures in batches:
            moments += Moments.of(features(pictures))
    """

    count: int
    mean: Features
    scatter: Features

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Of no features yet."""
        return cls(count=0, mean=np.zeros(width), scatter=np.zeros((width, width)))

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Of features [N, D].

        Raises:
            ValueError: features that are not finite, or not [N >= 1, D].
        """
        found = checked(features, "features")
        mean = found.mean(axis=0)
        deviations = found - mean
        return cls(count=len(found), mean=mean, scatter=deviations.T @ deviations)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together.

        Raises:
            ValueError: the two have different widths.
        """
        check_widths(len(self.mean), "the first moments", len(other.mean), "the second")
        count = self.count + other.count
        if count == 0:
            return self
        shift, share = other.mean - self.mean, other.count / count
        return Moments(
            count=count,
            mean=self.mean + share * shift,
            scatter=self.scatter + other.scatter + np.outer(shift, shift) * (self.count * share),
        )

    @property
    def gaussian(self) -> Gaussian:
        """The mean and the unbiased covariance.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"a covariance of {self.count} features is undefined; give at least 2 pictures")
        return Gaussian(mean=self.mean, covariance=self.scatter / (self.count - 1))
