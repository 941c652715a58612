"""Random masks for inpainting: which part of a picture is known, and which is to be painted.

Boxes and free-form strokes, as GLIDE erases random regions of its training pictures (arXiv 2112.10741,
section 3.4); strokes are lines of a brush that turns this way and that (arXiv 1806.03589, appendix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Mask = NDArray[np.uint8]  # [size, size]: 1 known, 0 to paint


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How likely a picture is unknown as a whole, or in a box; else it is erased along strokes.

    Raises:
        ValueError: the two are no shares, or are more than everything.
    """

    nothing_known: float = 0.2
    boxes: float = 0.4

    def __post_init__(self) -> None:
        if not (self.nothing_known >= 0 and self.boxes >= 0 and self.nothing_known + self.boxes <= 1):
            raise ValueError(
                f"nothing_known {self.nothing_known} and boxes {self.boxes} must be shares, both at most 1"
            )


def random_mask(size: int, config: MaskConfig, generator: np.random.Generator) -> Mask:
    """One mask of ``size`` x ``size`` pixels, of a kind drawn by its share."""
    kind = generator.random()
    if kind < config.nothing_known:
        return np.zeros((size, size), dtype=np.uint8)
    if kind < config.nothing_known + config.boxes:
        return box_mask(size, generator)
    return stroke_mask(size, generator)


def box_mask(size: int, generator: np.random.Generator) -> Mask:
    """A box to paint, with sides from a quarter of the picture to all of it, anywhere."""
    mask = np.ones((size, size), dtype=np.uint8)
    height, width = generator.integers(max(1, size // 4), size + 1, 2)
    top, left = generator.integers(0, size - height + 1), generator.integers(0, size - width + 1)
    mask[top : top + height, left : left + width] = 0
    return mask


def stroke_mask(size: int, generator: np.random.Generator) -> Mask:
    """One to four strokes to paint, each of a few lines, round at their ends."""
    picture = Image.new("L", (size, size), 1)
    draw = ImageDraw.Draw(picture)
    for _ in range(generator.integers(1, 5)):
        width = max(1, round(size * generator.uniform(0.08, 0.25)))
        point, angle = generator.uniform(0, size, 2), generator.uniform(0, 2 * math.pi)
        for _ in range(generator.integers(1, 6)):
            angle += generator.uniform(0.25, 1.0) * math.pi
            length = size * generator.uniform(0.1, 0.4)
            end = np.clip(point + length * np.array([math.cos(angle), math.sin(angle)]), 0, size - 1)
            draw.line([*point.tolist(), *end.tolist()], fill=0, width=width)
            for x, y in (point, end):
                draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=0)
            point = end
    return np.array(picture, dtype=np.uint8)
