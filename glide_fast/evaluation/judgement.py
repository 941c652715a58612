"""Everything that the metrics say about a set of pictures, with one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glide_fast.evaluation.extractors import Extractor, PictureFeatures, extract_all
from glide_fast.evaluation.features import Features, clip_captions
from glide_fast.evaluation.metrics import (
    Estimate,
    clip_score,
    frechet_distance,
    inception_score,
    kid,
    r_precision,
)
from glide_fast.evaluation.moments import Gaussian, Moments
from glide_fast.evaluation.neighbours import Overlap, precision_recall
from glide_fast.evaluation.pictures import PictureSet
from glide_fast.evaluation.score import Score

NEIGHBOURS = 3
KID_SUBSET = 1000
INCEPTION_SPLIT = 5000  # pictures, as in OpenAI's evaluation
DISTRACTORS = 99


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found; a metric is None where it cannot be had. ``str(judgement)`` is for a person.

    ``fid`` is the Fréchet distance of the features that were used: FID itself if they are Inception's.
    """

    samples: int
    references: int
    features: str
    fid: float
    sfid: float | None = None
    inception_score: Estimate | None = None
    kid: Estimate | None = None
    overlap: Overlap | None = None
    clip: str | None = None
    clip_score: float | None = None
    r_precision: Score | None = None

    def __str__(self) -> str:
        against = f"{self.references} references" if self.references else "published statistics"
        lines = [f"{self.samples} pictures against {against}, features of {self.features}"]
        lines.append(f"  Fréchet distance   {self.fid:.4g}")
        if self.sfid is not None:
            lines.append(f"  sFID               {self.sfid:.4g}")
        if self.inception_score is not None:
            lines.append(f"  Inception Score    {self.inception_score}")
        if self.kid is not None:
            lines.append(f"  KID                {self.kid}")
        if self.overlap is not None:
            for name, value in asdict(self.overlap).items():
                lines.append(f"  {name:<18} {value:.3f}")
        if self.r_precision is not None:
            lines.append(f"captions, by {self.clip}")
            lines.append(f"  CLIP score         {self.clip_score:.4f}")
            lines.append(f"  R-precision        {str(self.r_precision).strip()}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain values; R-precision with its share and 95 % interval."""
        found = asdict(self)
        if self.r_precision is not None:
            found["r_precision"] |= {"share": self.r_precision.share, "interval": self.r_precision.interval}
        return found


def judge(
    samples: PictureSet,
    reference: PictureSet,
    extractor: Extractor,
    *,
    clip: Extractor | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Judgement:
    """Compare the samples with a reference, and with their captions where they have any.

    Args:
        extractor: whose features distances, precision and recall are taken of.
        clip: who compares pictures with captions; by default the extractor, if it is a CLIP.
        seed: of KID's subsets and the captions that R-precision distracts with.

    Raises:
        ValueError: too few pictures, or statistics of other features.
    """
    if samples.count < 2:
        raise ValueError(f"{samples.name} holds {samples.count} pictures; a distribution needs more")
    found = extract_all(extractor, samples.chunks(), samples.count, progress=progress)
    compared = _compared(found, samples, reference, extractor, seed=seed, progress=progress)
    clip = extractor if clip is None else clip
    if clip.clip is not None and samples.captions is not None and len(set(samples.captions)) > 1:
        pictures = found.pooled
        if clip.identity != extractor.identity:
            pictures = extract_all(clip, samples.chunks(), samples.count, progress=progress).pooled
        compared |= _captioned(pictures, samples.captions, clip, seed)
    if found.probabilities is not None:
        splits = max(1, samples.count // INCEPTION_SPLIT)
        compared["inception_score"] = inception_score(found.probabilities, splits=splits)
    return Judgement(samples=samples.count, references=reference.count, features=extractor.name, **compared)


def _compared(
    found: PictureFeatures,
    samples: PictureSet,
    reference: PictureSet,
    extractor: Extractor,
    *,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """The metrics that need a reference: its statistics where they are of such features, its pictures."""
    width = found.pooled.shape[1]
    statistics = reference.statistics
    if statistics is not None and len(statistics.pooled.mean) != width:
        if not reference.count:
            raise ValueError(
                f"{reference.name} holds statistics of {len(statistics.pooled.mean)} features, "
                f"{extractor.name} gives {width}; OpenAI's are of --features inception"
            )
        statistics = None
    metrics: dict[str, Any] = {}
    real: PictureFeatures | None = None
    if reference.count:
        real = extract_all(extractor, reference.chunks(), reference.count, progress=progress)
        fewest = min(samples.count, reference.count)
        metrics["kid"] = kid(found.pooled, real.pooled, subset_size=min(KID_SUBSET, fewest), seed=seed)
        if fewest > NEIGHBOURS:
            metrics["overlap"] = precision_recall(found.pooled, real.pooled, neighbours=NEIGHBOURS)
    pooled = statistics.pooled if statistics is not None else _gaussian(real and real.pooled, reference)
    metrics["fid"] = frechet_distance(_gaussian(found.pooled, samples), pooled)
    if found.spatial is not None:
        spatial = None if statistics is None else statistics.spatial
        if spatial is None and real is not None:
            spatial = _gaussian(real.spatial, reference)
        if spatial is not None:
            metrics["sfid"] = frechet_distance(_gaussian(found.spatial, samples), spatial)
    return metrics


def _gaussian(rows: Any, pictures: PictureSet) -> Gaussian:
    if rows is None or len(rows) < 2:
        raise ValueError(f"{pictures.name} holds {pictures.count} pictures; a distribution needs more")
    return Moments.of(rows).gaussian


def _captioned(pictures: Any, captions: Sequence[str], clip: Extractor, seed: int) -> dict[str, Any]:
    """How well the pictures show their captions."""
    if clip.clip is None:
        raise ValueError(f"{clip.name} reads no captions; choose a CLIP")
    distinct = sorted(set(captions))
    row = {caption: index for index, caption in enumerate(distinct)}
    own = np.array([row[caption] for caption in captions])
    texts: Features = clip_captions(clip.clip, distinct).astype(np.float64)
    distractors = min(DISTRACTORS, len(distinct) - 1)
    return {
        "clip": clip.name,
        "clip_score": clip_score(pictures, texts[own]),
        "r_precision": r_precision(pictures, texts, own, distractors=distractors, seed=seed),
    }
