"""``glide-fast sample``: pictures from prompts."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from glide_fast.cli.order import Order
from glide_fast.cli.painter import Painter


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Paint pictures from prompts: PNG files, a grid, and sample.json, which says how to get them again.

    The k-th picture of a prompt has the seed SEED + k and does not depend on how many are painted.
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT ...")]
    """What to paint, one or more texts; "" paints without a prompt."""
    size: int | None = None
    """Pixels: the base model's size leaves the upsampler out. Default: the largest."""
    order: OmitArgPrefixes[Order] = field(default_factory=Order)
    painter: OmitArgPrefixes[Painter] = field(default_factory=Painter)

    def run(self) -> None:
        if not self.prompts:
            raise ValueError('no prompt; give at least one, or "" to paint without')
        self.order.check()
        model = self.painter.load(self.size)
        painted = self.order.paint(
            self.prompts, partial(self.painter.paint, model, progress=sys.stderr.isatty())
        )
        options = {**asdict(self.painter), "guidance": self.painter.scale(model)}
        painted.write("sample", options, self.painter.files())
