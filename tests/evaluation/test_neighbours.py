"""Precision, recall, density and coverage on clusters whose overlap is known, and against loops."""

from __future__ import annotations

import numpy as np
import pytest

from glide_fast.evaluation import Overlap, neighbours, precision_recall


def cluster(seed: int, centre: float, count: int) -> np.ndarray:
    return centre + np.random.default_rng(seed).uniform(-1, 1, (count, 2))


def by_loops(samples: np.ndarray, references: np.ndarray, k: int) -> Overlap:
    def radius(points: np.ndarray, row: int) -> float:
        others = np.delete(points, row, axis=0)
        return float(np.sort(np.linalg.norm(others - points[row], axis=1))[k - 1])

    def inside(points: np.ndarray, centres: np.ndarray) -> np.ndarray:  # [points, balls]
        radii = [radius(centres, row) for row in range(len(centres))]
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)] for p in points])  # noqa: B905

    real, fake = inside(samples, references), inside(references, samples)
    return Overlap(
        precision=real.any(axis=1).mean(),
        recall=fake.any(axis=1).mean(),
        density=real.sum() / (k * len(samples)),
        coverage=real.any(axis=0).mean(),
    )


def test_a_set_covers_itself() -> None:
    features = np.random.default_rng(0).standard_normal((50, 20)) + 1e3
    found = precision_recall(features, features)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(4 / 3, rel=0.3)  # its own ball and about k others


def test_copies_of_one_picture_cover_each_other() -> None:
    """Copies up to the last digit, as batches of other sizes make them: their distances are noise."""
    generator = np.random.default_rng(1)
    picture, other = generator.standard_normal((2, 1, 70))
    copies, samples = (picture * (1 + 4e-16 * generator.integers(0, 3, (9, 70))) for _ in range(2))
    found = precision_recall(samples, np.concatenate([copies, other]), neighbours=1)
    assert (found.precision, found.recall) == (1, 0.9)  # no sample shows the other picture
    assert found.density >= 9  # a sample lies in the ball of every copy


def test_far_sets_do_not_overlap() -> None:
    found = precision_recall(cluster(0, 0, 30), cluster(1, 100, 40))
    assert found == Overlap(precision=0, recall=0, density=0, coverage=0)


def test_a_lost_mode_costs_recall_only() -> None:
    """Samples fill one of two clusters of references: all are real, and half of what is real is missing."""
    one, other = cluster(2, 0, 400), cluster(3, 100, 400)
    found = precision_recall(cluster(4, 0, 400), np.concatenate([one, other]))
    assert found.precision > 0.95
    assert 0.45 < found.recall <= 0.5
    assert 0.4 < found.coverage <= 0.5


def test_an_invented_mode_costs_precision_only() -> None:
    found = precision_recall(np.concatenate([cluster(5, 0, 400), cluster(6, 100, 400)]), cluster(7, 0, 400))
    assert 0.45 < found.precision <= 0.5
    assert found.recall > 0.95


def test_equal_distributions_have_density_one() -> None:
    found = precision_recall(cluster(8, 0, 500), cluster(9, 0, 500), neighbours=5)
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage > 0.9


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("entries", [1, 50, 1 << 22])
def test_equals_the_definition_in_blocks_of_any_size(
    k: int, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_ENTRIES", entries)
    samples, references = cluster(10, 0, 17), cluster(11, 0.7, 23)
    found, expected = precision_recall(samples, references, neighbours=k), by_loops(samples, references, k)
    assert 0 < expected.precision < 1
    assert found == expected


@pytest.mark.parametrize(
    ("samples", "references", "k", "message"),
    [
        (cluster(0, 0, 3), cluster(1, 0, 9), 3, "samples have 3 rows, this needs at least 4"),
        (cluster(0, 0, 9), cluster(1, 0, 3), 3, "references have 3 rows, this needs at least 4"),
        (cluster(0, 0, 9), cluster(1, 0, 9)[:, :1], 3, "samples have 2 features and references 1"),
        (cluster(0, 0, 9), cluster(1, np.inf, 9), 3, "references are not finite in 9 of 9 rows"),
        (cluster(0, 0, 9), cluster(1, 0, 9), 0, "neighbours 0 must be at least 1"),
    ],
)
def test_errors(samples: np.ndarray, references: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        precision_recall(samples, references, neighbours=k)
