"""A run as a Markdown table, and the README's part that holds it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.marked import Markers
from bench.rows import MemoryRow, Record, SpeedRow
from bench.timing import Spread

PLACE = Markers.of("bench", "make bench")
README_SUITES = ("models", "sampling", "training", "end to end")
_SPEED_HEAD = (
    "case",
    "against",
    "ours",
    "theirs",
    "ratio",
    "20 % to 80 %",
    "rate, ours",
    "theirs",
    "of the limit",
    "memory of a call, ours / theirs",
    "error",
)
_SHORT_HEAD = ("case", "against", "ours", "theirs", "ratio", "20 % to 80 %", "of the limit")
_MEMORY_HEAD = ("memory", "against", "ours", "theirs", "ratio")


def table(record: Record) -> str:
    """Everything that the run has to say."""
    parts = [_machine(record)]
    for suite in dict.fromkeys(row.suite for row in record.speed):
        rows = [row for row in record.speed if row.suite == suite]
        parts.append(f"### {suite}\n\n" + markdown(_SPEED_HEAD, map(_long, rows)))
    return "\n\n".join([*parts, *_rest(record)]) + "\n"


def short_table(record: Record) -> str:
    """What the README shows: whole networks, pictures, training."""
    rows = [row for row in record.speed if row.suite in README_SUITES]
    return "\n\n".join([markdown(_SHORT_HEAD, map(_short, rows)), *_rest(record), _machine(record)])


def update_readme(path: Path, record: Record, pictures: str) -> None:
    """Put the short table and links to ``pictures`` (Markdown) between the README's two markers.

    Raises:
        ValueError: the run was quick, a gate was red, or a marker is missing or out of place.
    """
    if record.quick:
        raise ValueError("a quick run measures reduced shapes; run the whole suites to update the README")
    if record.red:
        raise ValueError(f"a gate was red ({record.red[0]}); the README keeps what it says")
    PLACE.fill(path, "\n\n".join(part for part in (short_table(record), pictures) if part))


def _rest(record: Record) -> list[str]:
    parts = []
    if record.memory:
        parts.append(markdown(_MEMORY_HEAD, map(_memory, record.memory)))
    if record.absent:
        reasons = (f"- {case}, {peer}: {reason}" for case, peer, reason in record.absent)
        parts.append("Not in the table:\n\n" + "\n".join(reasons))
    if record.red:
        parts.append("**Red gates**:\n\n" + "\n".join(f"- {reason}" for reason in record.red))
    return parts


def _machine(record: Record) -> str:
    facts = dict(record.facts)
    if not facts:
        return "Nothing was measured."
    limits = ""
    if "peak_gflops" in facts:
        peak, probe, copy = facts.pop("peak_gflops"), facts.pop("peak_probe"), facts.pop("copy_gbs")
        limits = (
            f" The limits: {peak:.0f} GFLOP/s ({probe}), {copy:.0f} GB/s (a copy). Rates count the plain "
            "computation's work, so that one that does less of it can exceed the limit."
        )
    device, isa, threads = (facts.pop(name) for name in ("device", "isa", "threads"))
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    return (
        f"{device}, our kernels in {isa}, {threads} threads, float32; {versions}. "
        f"Ratios above 1 mean that ours is faster.{limits}"
    )


def _long(row: SpeedRow) -> list[str]:
    return [
        row.case,
        row.peer,
        _time(row.ours),
        _time(row.theirs),
        *_ratio(row.ratio),
        f"{row.rate:.1f} {row.unit}",
        f"{row.peer_rate:.1f} {row.unit}",
        _share(row),
        "–"
        if row.memory is None or row.peer_memory is None
        else f"{row.memory:.0f} / {row.peer_memory:.0f} MiB",
        f"{row.error:.2f}",
    ]


def _short(row: SpeedRow) -> list[str]:
    return [row.case, row.peer, _time(row.ours), _time(row.theirs), *_ratio(row.ratio), _share(row)]


def _memory(row: MemoryRow) -> list[str]:
    amounts = (f"{value:.2f} {row.unit}" for value in (row.ours, row.theirs))
    return [row.case, row.peer, *amounts, f"{row.ratio:.2f}"]


def _time(spread: Spread) -> str:
    return f"{spread.median:.2f} s" if spread.median >= 1 else f"{1e3 * spread.median:.3g} ms"


def _ratio(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.2f}", f"{spread.p20:.2f}–{spread.p80:.2f}"


def _share(row: SpeedRow) -> str:
    return "–" if row.share is None else f"{100 * row.share:.0f} %"


def markdown(head: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
