"""Judging pictures: do they show what their captions say, and are they as good and as varied as the data?"""

from glide_fast.evaluation.emoji import EmojiReport, evaluate_emoji
from glide_fast.evaluation.features import (
    FeatureFunction,
    clip_captions,
    clip_features,
    spatial_features,
)
from glide_fast.evaluation.metrics import (
    Estimate,
    clip_score,
    fid,
    frechet_distance,
    inception_score,
    kid,
    r_precision,
    softmax,
)
from glide_fast.evaluation.moments import Gaussian, Moments
from glide_fast.evaluation.nearest import nearest_rank, squared_distances
from glide_fast.evaluation.neighbours import Overlap, precision_recall
from glide_fast.evaluation.reference import Reference, read_reference, write_reference
from glide_fast.evaluation.score import Score

__all__ = [
    "EmojiReport",
    "Estimate",
    "FeatureFunction",
    "Gaussian",
    "Moments",
    "Overlap",
    "Reference",
    "Score",
    "clip_captions",
    "clip_features",
    "clip_score",
    "evaluate_emoji",
    "fid",
    "frechet_distance",
    "inception_score",
    "kid",
    "nearest_rank",
    "precision_recall",
    "r_precision",
    "read_reference",
    "softmax",
    "spatial_features",
    "squared_distances",
    "write_reference",
]
