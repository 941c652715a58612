"""FID, KID, Inception Score, CLIP score and R-precision: closed forms, loops, scipy and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from glide_fast.evaluation import (
    Gaussian,
    Score,
    clip_score,
    fid,
    frechet_distance,
    inception_score,
    kid,
    r_precision,
    softmax,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, width: int, rank: int) -> np.ndarray:
    factor = normal(seed, width, rank)
    return factor @ factor.T / rank


def gaussian(mean: np.ndarray, matrix: np.ndarray) -> Gaussian:
    return Gaussian(mean=mean, covariance=matrix)


class TestFrechetDistance:
    def test_of_commuting_gaussians(self) -> None:
        """For diagonal covariances it is |shift|² + sum (deviation a - deviation b)²."""
        a = gaussian(np.array([1.0, 0.0, 2.0]), np.diag([4.0, 1.0, 0.0]))
        b = gaussian(np.array([0.0, 3.0, 2.0]), np.diag([1.0, 9.0, 25.0]))
        assert frechet_distance(a, b) == pytest.approx(1 + 9 + 1 + 4 + 25, rel=1e-12)

    def test_of_rotated_gaussians(self) -> None:
        """In two dimensions tr (AB)^½ = sqrt(tr AB + 2 sqrt(det AB))."""
        a, b = covariance(0, 2, 5), covariance(1, 2, 5)
        root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
        expected = np.trace(a) + np.trace(b) - 2 * root
        assert frechet_distance(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b)) == pytest.approx(
            expected, rel=1e-10
        )

    def test_of_points_is_the_squared_shift(self) -> None:
        a, b = (gaussian(np.full(3, mean), np.zeros((3, 3))) for mean in (1.0, 3.0))
        assert frechet_distance(a, b) == 12

    def test_of_low_ranks_without_common_directions_adds_the_traces(self) -> None:
        first, second = np.diag([3.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 7.0, 0.0])
        turn, _ = np.linalg.qr(normal(2, 4, 4))
        a, b = (gaussian(np.zeros(4), turn @ each @ turn.T) for each in (first, second))
        assert frechet_distance(a, b) == pytest.approx(12, abs=1e-12)

    @pytest.mark.parametrize(("rank", "tolerance"), [(40, 1e-10), (7, 1e-5)])
    def test_equals_the_root_of_the_product(self, rank: int, tolerance: float) -> None:
        linalg = pytest.importorskip("scipy.linalg")
        a, b = (gaussian(normal(seed, 20), covariance(seed, 20, rank)) for seed in (3, 4))
        root = linalg.sqrtm(a.covariance @ b.covariance + 1e-14 * np.eye(20)).real
        expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)

    def test_is_symmetric(self) -> None:
        a, b = (gaussian(normal(seed, 9), covariance(seed, 9, 4)) for seed in (5, 6))
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


class TestFid:
    @pytest.mark.parametrize("count", [400, 12])  # more and fewer than features
    def test_of_a_set_and_itself_is_zero(self, count: int) -> None:
        features = 10 * normal(0, count, 30) + 100
        assert fid(features, features) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("count", [400, 12])
    def test_of_a_shifted_set_is_the_squared_shift(self, count: int) -> None:
        features, shift = normal(1, count, 30).astype(np.float32), np.linspace(-1, 2, 30)
        assert fid(features.astype(float) + shift, features) == pytest.approx((shift**2).sum(), rel=1e-10)

    def test_of_a_stretched_set(self) -> None:
        """Twice the deviation: (2 - 1)² times the trace of the covariance."""
        features = normal(2, 50, 8)
        features -= features.mean(axis=0)
        assert fid(2 * features, features) == pytest.approx(np.trace(np.cov(features.T)), rel=1e-12)

    def test_falls_to_zero_with_the_number_of_samples(self) -> None:
        distances = [fid(normal(3, n, 5), normal(4, n, 5)) for n in (20, 200, 20_000)]
        assert distances[0] > 5 * distances[1] > 25 * distances[2] > 0

    def test_float16_is_computed_in_float64(self) -> None:
        samples, references = (300 * normal(seed, 60, 6) for seed in (5, 6))
        exact = fid(samples.astype(np.float16).astype(float), references.astype(np.float16).astype(float))
        assert fid(samples.astype(np.float16), references.astype(np.float16)) == exact


class TestKid:
    @staticmethod
    def by_loops(x: np.ndarray, y: np.ndarray) -> float:
        def kernel(a: np.ndarray, b: np.ndarray) -> float:
            return float((a @ b / len(a) + 1) ** 3)

        n = len(x)
        pairs = [(i, j) for i in range(n) for j in range(n)]
        within = [sum(kernel(z[i], z[j]) for i, j in pairs if i != j) / (n * (n - 1)) for z in (x, y)]
        return sum(within) - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / n**2

    def test_equals_the_definition(self) -> None:
        x, y = normal(0, 6, 3), normal(1, 6, 3) + 0.5
        found = kid(x, y, subsets=4, subset_size=6)
        assert found.mean == pytest.approx(self.by_loops(x, y), rel=1e-12)
        assert found.deviation == pytest.approx(0, abs=1e-12)  # every subset is the whole set

    def test_of_two_constant_sets(self) -> None:
        """k(a, a) + k(b, b) - 2 k(a, b) for sets of one repeated point each."""
        a, b = np.full((4, 2), 1.0), np.full((5, 2), -2.0)
        assert kid(a, b, subsets=1, subset_size=4).mean == pytest.approx(2**3 + 5**3 - 2 * (-1) ** 3)

    def test_is_unbiased(self) -> None:
        """Over many pairs of independent equal sets the mean is 0 within its error, and half are negative."""
        found = np.array(
            [kid(*normal(seed, 2, 20, 4), subsets=1, subset_size=20).mean for seed in range(400)]
        )
        assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))
        assert 0.3 < (found < 0).mean() < 0.8

    def test_subsets_have_the_mean_and_spread_of_the_whole(self) -> None:
        x, y = normal(2, 300, 4), normal(3, 300, 4) + 1
        whole = kid(x, y, subsets=1, subset_size=300).mean
        found = kid(x, y, subsets=200, subset_size=50)
        assert abs(found.mean - whole) < 4 * found.deviation / math.sqrt(200)
        assert found.deviation > 0

    def test_the_seed_draws_the_subsets(self) -> None:
        x, y = normal(4, 50, 4), normal(5, 50, 4)
        first, again, other = (kid(x, y, subsets=3, subset_size=10, seed=seed) for seed in (0, 0, 1))
        assert first == again != other

    def test_reads_as_a_mean_and_a_spread(self) -> None:
        assert str(kid(np.ones((3, 2)), np.ones((3, 2)), subsets=2, subset_size=2)) == "0 ± 0"


class TestInceptionScore:
    def test_of_a_classifier_that_cannot_tell_is_one(self) -> None:
        assert inception_score(np.full((20, 5), 0.2)).mean == pytest.approx(1)

    def test_of_sure_and_balanced_answers_is_the_number_of_classes(self) -> None:
        found = inception_score(np.eye(5)[np.arange(50) % 5], splits=2)
        assert (found.mean, found.deviation) == (pytest.approx(5), pytest.approx(0, abs=1e-12))

    def test_of_one_class_is_one(self) -> None:
        assert inception_score(np.eye(5)[np.zeros(10, dtype=int)], splits=1).mean == pytest.approx(1)

    def test_is_the_exponential_of_the_mean_divergence(self) -> None:
        p = softmax(3 * normal(0, 30, 7))
        scores = []
        for part in (p[:10], p[10:20], p[20:]):
            mean = part.mean(axis=0)
            scores.append(math.exp(np.mean([(row * np.log(row / mean)).sum() for row in part])))
        found = inception_score(p, splits=3)
        assert (found.mean, found.deviation) == (
            pytest.approx(np.mean(scores)),
            pytest.approx(np.std(scores)),
        )

    def test_softmax(self) -> None:
        expected = [[0.25, 0.75], [0.5, 0.5], [1, 0]]
        np.testing.assert_allclose(softmax([[0, math.log(3)], [1e4, 1e4], [1000, 0]]), expected, atol=1e-300)


class TestClipScore:
    def test_of_known_angles(self) -> None:
        """60°, the same direction, opposite directions (counted as 0): 2.5 times the mean of 0.5, 1, 0."""
        pictures = np.array([[2.0, 0.0], [3.0, 3.0], [1.0, 2.0]])
        captions = np.array([[0.5, math.sqrt(0.75)], [0.1, 0.1], [-2.0, -4.0]])
        assert clip_score(pictures, captions) == pytest.approx(2.5 * 0.5)

    def test_numbers_must_agree(self) -> None:
        with pytest.raises(ValueError, match="3 pictures and 2 captions; give each picture its own"):
            clip_score(normal(0, 3, 4), normal(1, 2, 4))


class TestRPrecision:
    def test_of_embeddings_that_agree_is_perfect(self) -> None:
        captions = normal(0, 120, 16)
        assert r_precision(3 * captions, captions) == Score(right=120, count=120)

    def test_of_noise_is_at_chance(self) -> None:
        score = r_precision(normal(1, 4000, 16), normal(2, 50, 16), np.arange(4000) % 50, distractors=9)
        low, high = score.interval
        assert low < 0.1 < high
        assert score.count == 4000

    def test_every_other_caption_can_be_a_distractor_but_never_the_own(self) -> None:
        """One caption a picture fools it: with all captions as distractors nothing is right, else some is."""
        captions = np.eye(6)
        pictures = np.eye(6) + 2 * np.roll(np.eye(6), 1, axis=1)
        assert r_precision(pictures, captions, distractors=5).right == 0
        many = np.arange(3000) % 6
        score = r_precision(pictures[many], captions, many, distractors=2)
        low, high = score.interval
        assert low < 1 - 2 / 5 < high

    def test_own_names_the_caption(self) -> None:
        captions, own = normal(3, 30, 8), np.array([4, 4, 29, 0])
        assert r_precision(captions[own], captions, own, distractors=29).right == 4
        assert r_precision(captions[own], captions, (own + 1) % 30, distractors=29).right == 0

    def test_a_tie_is_not_right(self) -> None:
        captions = np.array([[1.0, 1.0], [1.0, -1.0]])
        assert r_precision(np.array([[1.0, 0.0]] * 2), captions, distractors=1).right == 0

    def test_the_seed_draws_the_distractors(self) -> None:
        pictures, captions = normal(4, 200, 3), normal(5, 200, 3)
        rights = [r_precision(pictures, captions, distractors=3, seed=seed).right for seed in (0, 0, 1, 2, 3)]
        assert rights[0] == rights[1]
        assert len(set(rights)) > 1


class Averages(torch.nn.Module):
    """Pictures [N, 3, H, W] to their averages over four quarters, [N, 12]."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures.double(), 2).flatten(1) / 25


@pytest.mark.filterwarnings("ignore::UserWarning")  # that they keep features, and have one split
def test_agrees_with_torchmetrics() -> None:
    distance, kernel, inception = (
        pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid", "inception")
    )
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    fake = torch.randint(20, 230, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    features = Averages()
    metrics = {
        "fid": distance.FrechetInceptionDistance(feature=features),
        "kid": kernel.KernelInceptionDistance(feature=features, subsets=1, subset_size=40),
    }
    for metric in metrics.values():
        metric.set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(fake, real=False)
    samples, references = features(fake).numpy(), features(real).numpy()
    assert fid(samples, references) == pytest.approx(metrics["fid"].compute().item(), rel=1e-4)
    found = kid(samples, references, subsets=1, subset_size=40).mean
    assert found == pytest.approx(metrics["kid"].compute()[0].item(), rel=1e-4)
    score = inception.InceptionScore(feature=features, splits=1)
    score.update(fake)
    found = inception_score(softmax(samples), splits=1).mean
    assert found == pytest.approx(score.compute()[0].item(), rel=1e-5)


GOOD = normal(9, 8, 3)
BROKEN = np.where(np.arange(8)[:, None] == 5, np.nan, GOOD)
ZERO = np.where(np.arange(8)[:, None] == 2, 0, GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fid(GOOD[:1], GOOD), "samples have 1 rows, this needs at least 2"),
        (lambda: fid(GOOD, GOOD[:, :2]), "samples have 3 features and references 2; take both from the same"),
        (lambda: fid(GOOD, BROKEN), "references are not finite in 1 of 8 rows, first in row 5"),
        (lambda: fid(GOOD[0], GOOD), r"samples are \[3\]; features are \[N, D\]"),
        (lambda: kid(GOOD, GOOD), "subset_size 1000 is more than the 8 pictures of the smaller set"),
        (lambda: kid(GOOD, GOOD, subset_size=1), "subset_size 1 at least 2"),
        (lambda: kid(GOOD, GOOD, subsets=0, subset_size=4), "subsets 0 must be at least 1"),
        (lambda: inception_score(np.abs(GOOD)), "probabilities have 8 rows, this needs at least 10"),
        (lambda: inception_score(GOOD, splits=1), r"add up to 1: give softmax\(logits\)"),
        (lambda: inception_score(np.full((4, 2), 0.4), splits=1), "rows add up to 0.8 .. 0.8"),
        (lambda: inception_score(np.full((4, 2), 0.5), splits=0), "splits 0 must be at least 1"),
        (lambda: softmax(BROKEN), "logits are not finite in 1 of 8 rows"),
        (lambda: clip_score(ZERO, GOOD), "pictures have an embedding of length 0 in row 2"),
        (lambda: clip_score(GOOD, GOOD[:, :2]), "pictures have 3 features and captions 2"),
        (lambda: r_precision(GOOD, GOOD), r"distractors 99 must lie in 1 \.\. 7"),
        (lambda: r_precision(GOOD, GOOD, distractors=0), r"distractors 0 must lie in 1 \.\. 7"),
        (lambda: r_precision(GOOD[:5], GOOD, distractors=2), "5 pictures and 8 captions; name each"),
        (
            lambda: r_precision(GOOD, GOOD, np.arange(8) + 1, distractors=2),
            r"own names captions 1 \.\. 8; there are 0 \.\. 7",
        ),
        (
            lambda: r_precision(GOOD, GOOD, np.arange(3), distractors=2),
            r"own is int64 \[3\]; it must be whole numbers \[8\]",
        ),
        (
            lambda: r_precision(GOOD, GOOD[[0, 1, 2, 3, 4, 1, 6, 7]], distractors=2),
            "captions 1 and 5 have the same embedding",
        ),
    ],
)
def test_errors_name_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
