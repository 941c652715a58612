"""A picture of what was counted and predicted: each step's kernels, bytes and time beside the original's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu_static.report import SIDES, Count
from glide_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0
_COLOURS = dict(zip(SIDES, ("#1f5fa8", "#8c8c8c", "#dd8452"), strict=True))


def work(counts: Sequence[Count], path: Path) -> bool:
    """Kernels, bytes and predicted times as shares of the original's; False if there is nothing to draw."""
    originals = {count.step: count for count in counts if count.side == SIDES[1]}
    pairs = [(count, originals[count.step]) for count in counts if count.step in originals]
    if not pairs:
        return False
    from matplotlib.figure import Figure

    steps = list(dict.fromkeys(count.step for count, _ in pairs))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.9 * len(steps)), layout="constrained")
    titles = ("kernels\n(counted)", "bytes\n(counted)", "time in a CUDA graph\n(predicted, H100)")
    for axes, title, part in zip(figure.subplots(1, 3, sharey=True), titles, range(3), strict=True):
        for index, side in enumerate(SIDES):
            mine = [
                (steps.index(count.step), *_share(count, other, part))
                for count, other in pairs
                if count.side == side
            ]
            places = [place + 0.27 * index for place, *_ in mine]
            axes.barh(places, [share for _, share, _ in mine], 0.25, color=_COLOURS[side], label=side)
            for place, (_, share, words) in zip(places, mine, strict=True):
                axes.annotate(
                    words, (share, place), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, 1.5)
        axes.set_xticks([0, 0.5, 1])
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks([place + 0.27 for place in range(len(steps))], steps)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    used = [index for index, handle in enumerate(handles) if len(handle)]
    figure.legend(
        [handles[index] for index in used],
        [labels[index] for index in used],
        loc="outside lower center",
        title="shares of the original's",
        ncols=3,
        frameon=False,
    )
    _save(figure, path)
    return True


def _share(count: Count, original: Count, part: int) -> tuple[float, str]:
    """The share of the original's kernels, bytes or time, and ours in words."""
    values = [
        (each.totals.kernels, each.totals.kernel_bytes / 1e9, 1e3 * each.prediction.graph)
        for each in (count, original)
    ]
    words = (f"{values[0][0]}", f"{values[0][1]:.2f} GB", f"{values[0][2]:.2f} ms")
    return values[0][part] / values[1][part], words[part]


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
