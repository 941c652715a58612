"""Dropout inside other kernels: what is kept is computed again where it is needed, and never stored.

The words are those of `glide_fast.ops.dropped_group_norm.kept`: one counter of Philox-4x32-10 serves four
neighbouring channels. A thread that holds all four computes the ten rounds, of two wide products each, once:
the compiler sees that the counters of its lanes are the same number.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from glide_fast.ops.dropped_group_norm import WORDS, largest_dropped

_WORDS: Any = tl.constexpr(WORDS)


@triton.jit
def kept(seed, largest_dropped, batch, pixel, first_channel, channels, LANES: tl.constexpr):
    """Which elements of a tile [ROWS pixels, LANES channels] stay; its first channel is a multiple of 4."""
    lane = tl.arange(0, LANES)
    block = first_channel // _WORDS + lane // _WORDS
    place = pixel[:, None] * tl.cdiv(channels, _WORDS) + block[None, :]
    none = place * 0
    first, second, third, fourth = tl.philox(seed, place, none + batch, none, none)
    number = (lane % _WORDS)[None, :]
    word = tl.where(number < 2, tl.where(number == 0, first, second), tl.where(number == 2, third, fourth))
    return word > largest_dropped.to(tl.uint32)


def arguments(dropout: float, seed: int) -> dict[str, Any]:
    """What kernels are told of it; without dropout nothing of this is read."""
    return {
        "seed": seed, "largest_dropped": largest_dropped(dropout),
        "factor": 1 / (1 - dropout) if dropout < 1 else 0.0, "DROPOUT": dropout > 0,
    }  # fmt: skip


# Numbers that change from call to call or by the model: one compiled kernel serves them all.
PLAIN = ("seed", "largest_dropped")
