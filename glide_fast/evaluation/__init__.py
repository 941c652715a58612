"""Judging pictures: does a sample show what its caption says?"""

from glide_fast.evaluation.emoji import EmojiReport, evaluate_emoji
from glide_fast.evaluation.nearest import nearest_rank, squared_distances

__all__ = ["EmojiReport", "evaluate_emoji", "nearest_rank", "squared_distances"]
