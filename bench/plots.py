"""Two pictures of a run: bars against every peer, and where each case stands below the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.rows import Record
from glide_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0
_BAR = 0.25
_COLOURS = {
    "upstream": "#8c8c8c",
    "upstream, text once": "#bfbfbf",
    "compile": "#dd8452",
    "openvino": "#55a868",
    "onnxruntime": "#8172b3",
    "ours, 1 thread": "#64b5cd",
}
_SUITES = {"ops": "#55a868", "models": "#1f5fa8", "sampling": "#8172b3", "training": "#dd8452"}


def bars(record: Record, path: Path) -> bool:
    """How many times faster ours is than each peer, with the pairs' spread; False if there is nothing."""
    rows = [row for row in record.speed if row.suite != "ops"]
    if not rows:
        return False
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(WIDTH, 1 + _BAR * (len(rows) + len(names))), layout="constrained")
    axes = figure.add_subplot()
    position, ticks, seen = 0.0, [], set()
    for name in names:
        mine = [row for row in rows if row.case == name]
        ticks.append(position + (len(mine) - 1) / 2)
        for row in mine:
            median, low, high = row.ratio
            error = [[max(median - low, 0)], [max(high - median, 0)]]
            label = None if row.peer in seen else row.peer
            colour = _COLOURS.get(row.peer, "#c44e52")
            axes.barh(position, median, xerr=error, color=colour, label=label, error_kw={"lw": 0.8})
            axes.annotate(f"{median:.2f}", (high, position), (3, 0), textcoords="offset points", va="center")
            seen.add(row.peer)
            position += 1
        position += 1
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("times faster than the peer (median; 20 % to 80 % of the pairs)")
    figure.legend(title="against", loc="outside lower center", ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def roofline(record: Record, path: Path) -> bool:
    """Effective GFLOP/s over FLOPs a byte, ours and the original's; False if there is nothing to draw."""
    peak, copy = record.facts.get("peak_gflops"), record.facts.get("copy_gbs")
    rows = [row for row in record.speed if row.peer == "upstream" and row.intensity]
    if not rows or not peak or not copy:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH * 0.7), layout="constrained")
    axes = figure.add_subplot()
    intensities = [row.intensity for row in rows if row.intensity]
    reach = [min(*intensities, 1) / 2, max(*intensities, peak / copy) * 2]
    corner = peak / copy
    axes.plot([reach[0], corner, reach[1]], [reach[0] * copy, peak, peak], color="black", lw=1)
    axes.annotate(f"{peak:.0f} GFLOP/s", (reach[1], peak), (0, 4), textcoords="offset points", ha="right")
    axes.annotate(f"{copy:.0f} GB/s", (reach[0], reach[0] * copy), (6, 12), textcoords="offset points")
    for number, row in enumerate(rows, 1):
        here = row.intensity or 0.0
        factor = 1.0 if row.unit == "GFLOP/s" else here  # GB/s times FLOPs a byte
        ours, theirs = row.rate * factor, row.peer_rate * factor
        colour = _SUITES.get(row.suite, "#c44e52")
        axes.plot([here, here], [theirs, ours], color=colour, lw=0.8, zorder=1)
        axes.scatter(here, theirs, s=22, facecolor="white", edgecolor=colour, zorder=2)
        axes.scatter(here, ours, s=22, color=colour, zorder=2, label=f"{number}  {row.case}")
        axes.annotate(str(number), (here, ours), (4, 2), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte of weights, input and output")
    axes.set_ylabel("effective GFLOP/s: ours filled, the original's hollow")
    figure.legend(loc="outside lower center", fontsize=6, ncols=2, frameon=False)
    _save(figure, path)
    return True


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
