"""``glide-fast evaluate``: how good a model's pictures are."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial

from tyro.conf import OmitArgPrefixes

from glide_fast.cli.painter import Painter
from glide_fast.evaluation import evaluate_emoji


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Paint emoji captions and count how many are recognised by their nearest picture."""

    captions: int = 256
    """Captions drawn from the training set."""
    seed: int = 0
    """Seed of that draw and of the pictures."""
    painter: OmitArgPrefixes[Painter] = field(default_factory=Painter)

    def run(self) -> None:
        model = self.painter.load()
        paint = partial(self.painter.paint, model)
        print(evaluate_emoji(paint, captions=self.captions, seed=self.seed, progress=sys.stderr.isatty()))
        print(f"{self.painter.sampler}, {self.painter.steps} steps, guidance {self.painter.scale(model):g}")
