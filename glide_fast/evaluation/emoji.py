"""What an emoji model learned: captions it was trained on, and skin tones in combinations it never saw.

A sample is right when its caption's picture is the nearest training picture. Its skin tone is right when the
picture in that tone is the nearest among the same person's five. Distances are taken at 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji import SKIN_TONES, load_emoji, skin_tone, split, tone_siblings
from glide_fast.data.images import to_tensor, to_uint8
from glide_fast.evaluation.nearest import nearest_rank, squared_distances
from glide_fast.evaluation.score import Score

SIZE = 32
BATCH = 32
Paint: TypeAlias = Callable[
    [Sequence[str], Sequence[int]], NDArray[np.uint8]
]  # prompts, seeds -> [B, H, W, 3]


@dataclass(frozen=True, kw_only=True)
class EmojiReport:
    """The scores of one model; ``str(report)`` is the text for a person."""

    top1: Score
    top5: Score
    tone: Score
    pictures: int  # training pictures that a sample is compared with

    def __str__(self) -> str:
        tones = len(SKIN_TONES)
        return "\n".join(
            [
                f"captions of the training set, nearest of {self.pictures} pictures at {SIZE} px:",
                f"  top-1  {self.top1}; chance {1 / self.pictures:.2%}",
                f"  top-5  {self.top5}; chance {5 / self.pictures:.2%}",
                f"captions held out of training, nearest of the same person's {tones} skin tones:",
                f"  tone   {self.tone}; chance {1 / tones:.0%}",
            ]
        )


def evaluate_emoji(
    paint: Paint, *, captions: int = 256, seed: int = 0, progress: bool = False
) -> EmojiReport:
    """Paint ``captions`` training captions, drawn with ``seed``, and the 100 held-out ones, and judge them.

    Needs the emoji font and the package ``emoji`` (extra ``train``).

    Raises:
        ValueError: more captions than there are, or pictures whose size is no multiple of 32.
    """
    everything = load_emoji(SIZE)
    training, held_out = split(everything)
    if not 1 <= captions <= len(training):
        raise ValueError(f"captions {captions} must lie in 1 .. {len(training)}, the training pictures")
    own = np.sort(np.random.default_rng(seed).choice(len(training), captions, replace=False))
    texts = [training.captions[index] for index in own] + held_out.captions
    samples = _paint_small(paint, texts, seed, progress=progress)
    ranks = nearest_rank(squared_distances(samples[:captions], training.images), own)
    return EmojiReport(
        top1=Score(right=int((ranks < 1).sum()), count=captions),
        top5=Score(right=int((ranks < 5).sum()), count=captions),
        tone=tone_score(samples[captions:], held_out.captions, everything),
        pictures=len(training),
    )


def _paint_small(paint: Paint, texts: Sequence[str], seed: int, *, progress: bool) -> NDArray[np.uint8]:
    """One sample a text, averaged to 32 px: uint8 [N, 32, 32, 3]; text k has seed ``seed + k``."""
    parts = []
    for start in tqdm(range(0, len(texts), BATCH), desc="painting", unit="batch", disable=not progress):
        part = texts[start : start + BATCH]
        pictures = paint(part, range(seed + start, seed + start + len(part)))
        factor, rest = divmod(pictures.shape[1], SIZE)
        if rest:
            raise ValueError(
                f"pictures of {pictures.shape[1]} px cannot be averaged to {SIZE} px; use a multiple"
            )
        parts.append(to_uint8(avg_pool2d(to_tensor(pictures), factor)))
    return np.concatenate(parts)


def tone_score(samples: NDArray[np.uint8], captions: Sequence[str], everything: CaptionedPictures) -> Score:
    """How many samples are nearest to the caption's own skin tone, among the five of the same person."""
    index = {caption: row for row, caption in enumerate(everything.captions)}
    right = 0
    for sample, caption in zip(samples, captions, strict=True):
        siblings = everything.images[[index[sibling] for sibling in tone_siblings(caption)]]
        own = np.array([SKIN_TONES.index(skin_tone(caption) or "")])
        right += int(nearest_rank(squared_distances(sample[None], siblings), own)[0] == 0)
    return Score(right=right, count=len(captions))
