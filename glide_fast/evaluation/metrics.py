"""Metrics as pure functions of features [N, D]: FID, sFID, KID, Inception Score, CLIP score, R-precision.

All compute in float64. Precision and recall are in :mod:`glide_fast.evaluation.neighbours`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from glide_fast.evaluation.features import Features, check_widths, checked
from glide_fast.evaluation.moments import Gaussian, Moments
from glide_fast.evaluation.score import Score

CLIP_SCORE_SCALE = 2.5
_SUM_TOLERANCE = 1e-2  # of probabilities from float16


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over parts of the data, and the standard deviation between the parts."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.deviation:.2g}"


def fid(samples: ArrayLike, references: ArrayLike) -> float:
    """Fréchet distance of the Gaussians of samples [N, D] and references [M, D], at least 2 rows each.

    On Inception's pooled features it is FID (Heusel et al. 2017, arXiv 1706.08500); on those of
    :func:`~glide_fast.evaluation.features.spatial_features` it is sFID. It is biased upwards for few samples:
    compare only at equal numbers.

    Raises:
        ValueError: too few rows, different widths, or features that are not finite.
    """
    samples, references = (
        checked(each, name, least=2) for each, name in ((samples, "samples"), (references, "references"))
    )
    return frechet_distance(Moments.of(samples).gaussian, Moments.of(references).gaussian)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean a - mean b|² + tr(A + B - 2 (A B)^½) for covariances A and B, of any rank (Dowson & Landau 1982).

    With A = F Fᵀ and B = G Gᵀ, the trace of (A B)^½ is the sum of the singular values of Fᵀ G: no root of a
    product that is not symmetric, and no imaginary part to drop.

    Raises:
        ValueError: the two have different widths.
    """
    check_widths(len(a.mean), "samples", len(b.mean), "references")
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return max(float(distance), 0.0)


def kid(
    samples: ArrayLike, references: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Kernel distance of samples [N, D] and references [M, D] (Bińkowski et al. 2018, arXiv 1801.01401).

    The unbiased squared MMD of the kernel (x · y / D + 1)³, over ``subsets`` random subsets of each set,
    drawn with ``seed`` without repetition. Equal distributions have 0, so that an estimate may be negative.

    Raises:
        ValueError: subsets larger than a set, different widths, or features that are not finite.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets {subsets} must be at least 1 and subset_size {subset_size} at least 2")
    samples, references = checked(samples, "samples"), checked(references, "references")
    check_widths(samples.shape[1], "samples", references.shape[1], "references")
    fewest = min(len(samples), len(references))
    if subset_size > fewest:
        raise ValueError(
            f"subset_size {subset_size} is more than the {fewest} pictures of the smaller set; "
            "use a smaller one or give more pictures"
        )
    generator = np.random.default_rng(seed)
    distances = [
        _squared_mmd(
            *(each[generator.choice(len(each), subset_size, replace=False)] for each in (samples, references))
        )
        for _ in range(subsets)
    ]
    return Estimate(mean=float(np.mean(distances)), deviation=float(np.std(distances)))


def inception_score(probabilities: ArrayLike, *, splits: int = 10) -> Estimate:
    """exp of the mean KL(p(y | x) || p(y)) over ``splits`` parts (Salimans et al. 2016, arXiv 1606.03498).

    ``probabilities`` [N, classes] are those of a classifier for each picture, in the order of sampling; see
    :func:`softmax`. Between 1 and the number of classes.

    Raises:
        ValueError: fewer pictures than splits, or rows that are no probabilities.
    """
    if splits < 1:
        raise ValueError(f"splits {splits} must be at least 1")
    p = checked(probabilities, "probabilities", least=splits)
    sums = p.sum(axis=1)
    if p.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
        raise ValueError(
            f"probabilities lie in {p.min():.3g} .. {p.max():.3g} and their rows add up to "
            f"{sums.min():.3g} .. {sums.max():.3g}; they must be >= 0 and add up to 1: give softmax(logits)"
        )
    scores = [
        np.exp(_entropy(part.mean(axis=0)) - _entropy(part).mean())  # the mean divergence from the mean
        for part in np.array_split(p / sums[:, None], splits)
    ]
    return Estimate(mean=float(np.mean(scores)), deviation=float(np.std(scores)))


def softmax(logits: ArrayLike) -> Features:
    """The probabilities of logits [N, classes].

    Raises:
        ValueError: logits that are not finite, or not [N >= 1, classes].
    """
    found = checked(logits, "logits")
    powers = np.exp(found - found.max(axis=1, keepdims=True))
    probabilities: Features = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def clip_score(pictures: ArrayLike, captions: ArrayLike) -> float:
    """The mean of 2.5 max(cosine, 0) over pairs of embeddings [N, D] (Hessel et al. 2021, arXiv 2104.08718).

    Raises:
        ValueError: the shapes differ, or embeddings are zero or not finite.
    """
    pictures, captions = _unit(pictures, "pictures"), _unit(captions, "captions")
    check_widths(pictures.shape[1], "pictures", captions.shape[1], "captions")
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions; give each picture its own")
    return float(CLIP_SCORE_SCALE * np.maximum((pictures * captions).sum(axis=1), 0).mean())


def r_precision(
    pictures: ArrayLike,
    captions: ArrayLike,
    own: NDArray[np.int64] | None = None,
    *,
    distractors: int = 99,
    seed: int = 0,
) -> Score:
    """How many pictures [N, D] are nearer to their own caption than to ``distractors`` others, by cosine.

    Picture n shows ``captions[own[n]]`` of the captions [M, D], by default ``captions[n]``. Its distractors
    are drawn with ``seed`` from the other captions; a tie is not right. Chance is 1 / (distractors + 1).
    From AttnGAN (Xu et al. 2017, arXiv 1711.10485), which takes 99.

    Raises:
        ValueError: too few captions, captions that occur twice, an ``own`` that names none, different widths,
            or embeddings that are zero or not finite.
    """
    pictures, captions = _unit(pictures, "pictures"), _unit(captions, "captions")
    check_widths(pictures.shape[1], "pictures", captions.shape[1], "captions")
    own = _owners(own, len(pictures), len(captions))
    _check_distinct(captions)
    if not 1 <= distractors < len(captions):
        raise ValueError(
            f"distractors {distractors} must lie in 1 .. {len(captions) - 1}, the captions that are not the "
            "picture's own; ask for fewer or give more captions"
        )
    generator = np.random.default_rng(seed)
    right = 0
    for picture, caption in zip(pictures, own, strict=True):
        others = generator.choice(len(captions) - 1, distractors, replace=False, shuffle=False)
        others += others >= caption
        right += int((captions[others] @ picture).max() < captions[caption] @ picture)
    return Score(right=right, count=len(pictures))


def _factor(covariance: Features) -> Features:
    """F [D, rank] with F Fᵀ = covariance; eigenvalues that rounding may have made are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > np.finfo(np.float64).eps * len(values) * max(values[-1], 0.0)
    factor: Features = vectors[:, kept] * np.sqrt(values[kept])
    return factor


def _squared_mmd(x: Features, y: Features) -> float:
    """Unbiased squared MMD of two sets [n, D] under the kernel (x · y / D + 1)³."""
    n = len(x)
    within = sum((kernel.sum() - np.trace(kernel)) / (n * (n - 1)) for kernel in (_cubic(x, x), _cubic(y, y)))
    return float(within - 2 * _cubic(x, y).mean())


def _cubic(x: Features, y: Features) -> Features:
    kernel: Features = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _entropy(p: Features) -> Features:
    """Over the last axis, in nats; 0 log 0 is 0."""
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropy: Features = -(p * logs).sum(axis=-1)
    return entropy


def _unit(embeddings: ArrayLike, name: str) -> Features:
    """Embeddings [N, D] of length one."""
    found = checked(embeddings, name)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(
            f"{name} have an embedding of length 0 in row {lengths.argmin()}, which has no direction; "
            "leave it out"
        )
    unit: Features = found / lengths
    return unit


def _owners(own: NDArray[np.int64] | None, pictures: int, captions: int) -> NDArray[np.int64]:
    """The row of each picture's caption, checked."""
    if own is None:
        if pictures != captions:
            raise ValueError(f"{pictures} pictures and {captions} captions; name each picture's in own")
        return np.arange(pictures)
    own = np.asarray(own)
    if own.shape != (pictures,) or own.dtype.kind not in "iu":
        raise ValueError(f"own is {own.dtype} {list(own.shape)}; it must be whole numbers [{pictures}]")
    if own.min() < 0 or own.max() >= captions:
        raise ValueError(f"own names captions {own.min()} .. {own.max()}; there are 0 .. {captions - 1}")
    return own.astype(np.int64)


def _check_distinct(captions: Features) -> None:
    _, first, copies = np.unique(captions, axis=0, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[copies.reshape(-1)] != np.arange(len(captions)))
    if len(repeated):
        twin = first[copies.reshape(-1)[repeated[0]]]
        raise ValueError(
            f"captions {twin} and {repeated[0]} have the same embedding; "
            "give each caption once and name it in own"
        )
