"""Interleaved pairs of timings: pytest-benchmark drives and stores our rounds, the peer's come in between.

Machines slow down and speed up; only what ran side by side can be compared. In every other round the peer
runs before ours, else after, so that a drift counts for both; the ratio is that of each pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from bench.place import CPU, Clock, Place

Call = Callable[[], object]
MIN_PAIRS, MAX_PAIRS = 5, 500
SAMPLE_SECONDS = 2e-3  # shorter calls are repeated, so that the clock's resolution does not matter
PAUSE_SECONDS = 10e-3  # before calls that are long enough: another runtime's threads stop spinning meanwhile
PAUSE_ABOVE = 5e-3


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Of any number of samples, interpolated linearly."""
        return cls(*(float(value) for value in np.quantile(samples, (0.5, 0.2, 0.8))))


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Seconds a call, ours and the peer's, pair by pair; working memory of a call in bytes, where known."""

    ours: list[float]
    peer: list[float]
    ours_memory: int | None
    peer_memory: int | None

    @property
    def ratios(self) -> list[float]:
        """Peer / ours of each pair: above 1 we are faster."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]


def fight(benchmark: BenchmarkFixture, ours: Call, peer: Call, *, seconds: float, place: Place = CPU) -> Duel:
    """Time pairs of calls for about ``seconds``, at least five pairs; each is called twice before.

    Both are timed by the place's clock: on a GPU that is the time between events before and after.
    """
    memory = [place.peak(call) for call in (ours, peer)]
    clock = place.clock()
    benchmark._timer = clock  # its own is for the host
    warm = [_seconds_of(call, 1, clock) for call in (ours, peer)]
    repeats = max(1, round(SAMPLE_SECONDS / min(warm)))
    pause = PAUSE_SECONDS if min(warm) > PAUSE_ABOVE else 0.0
    rounds = min(MAX_PAIRS, max(MIN_PAIRS, int(seconds / (repeats * sum(warm)))))
    peers_times: list[float] = []
    finished = 0

    def measure_peer() -> None:
        time.sleep(pause)
        peers_times.append(_seconds_of(peer, repeats, clock))

    def before() -> None:
        if finished % 2 == 0:
            measure_peer()
        time.sleep(pause)

    def round_of_ours() -> None:
        for _ in range(repeats):
            ours()

    def after() -> None:
        nonlocal finished
        if finished % 2:
            measure_peer()
        finished += 1

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        round_of_ours, setup=before, teardown=after, rounds=rounds
    )
    if benchmark.stats is None:
        raise ValueError("pytest-benchmark is disabled here; leave --benchmark-disable out, and xdist")
    times = [duration / repeats for duration in benchmark.stats.stats.data]
    benchmark.extra_info["calls_a_round"] = repeats
    benchmark.extra_info["peer_seconds"] = peers_times
    return Duel(ours=times, peer=peers_times, ours_memory=memory[0], peer_memory=memory[1])


def _seconds_of(call: Call, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
