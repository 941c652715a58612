"""The judge of the emoji model, judged by painters whose score is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from glide_fast.data.emoji import find_font, held_out_captions, load_emoji, split
from glide_fast.evaluation.emoji import evaluate_emoji
from glide_fast.evaluation.score import Score

pytest.importorskip("emoji", reason="the package emoji (extra 'train') is not installed")


@pytest.fixture(autouse=True)
def _font() -> None:
    try:
        find_font()
    except FileNotFoundError as error:
        pytest.skip(f"the emoji font is not installed: {error}")


class Copyist:
    """Paints the picture that a caption, changed by ``alter``, has in the data, at 64 px."""

    def __init__(self, alter: dict[str, str] | None = None) -> None:
        everything = load_emoji(64)
        self.pictures = dict(zip(everything.captions, everything.images, strict=True))
        self.alter = alter or {}
        self.seeds: list[int] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        self.seeds += seeds
        return np.stack([self.pictures[self.alter.get(prompt, prompt)] for prompt in prompts])


def test_a_perfect_painter_is_always_right() -> None:
    painter = Copyist()
    report = evaluate_emoji(painter, captions=40, seed=3)
    assert (report.top1, report.top5) == (Score(right=40, count=40), Score(right=40, count=40))
    assert report.tone == Score(right=100, count=100)
    assert painter.seeds == list(range(3, 143))


def test_the_wrong_tone_is_never_right() -> None:
    wrong = {
        caption: caption.replace("medium-dark skin", "light skin")
        if "medium-dark" in caption
        else f"{caption.rsplit(', ', 1)[0]}, medium-dark skin tone"
        for caption in held_out_captions()
    }
    assert evaluate_emoji(Copyist(wrong), captions=1).tone == Score(right=0, count=100)


def test_a_painter_of_one_picture_is_at_chance() -> None:
    training, _ = split(load_emoji(32))
    always = dict.fromkeys([*training.captions, *held_out_captions()], "red apple")
    report = evaluate_emoji(Copyist(always), captions=256)
    assert report.top1.right <= 3
    assert report.tone.share < 0.5


def test_the_report_states_counts_intervals_and_chance() -> None:
    text = str(evaluate_emoji(Copyist(), captions=8))
    assert "top-1  100.0%  (8 of 8; 95 % interval 68% to 100%); chance 0.03%" in text
    assert "tone   100.0%  (100 of 100; 95 % interval 96% to 100%); chance 20%" in text


def test_wilson_interval_of_a_known_case() -> None:
    low, high = Score(right=81, count=263).interval  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("captions", [0, 10_000])
def test_an_impossible_number_of_captions_is_refused(captions: int) -> None:
    with pytest.raises(ValueError, match=rf"captions {captions} must lie in 1 \.\. "):
        evaluate_emoji(Copyist(), captions=captions)
