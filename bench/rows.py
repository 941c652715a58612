"""What a run has to say: rows of speed and of memory, peers that cannot do a case, gates that were red."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.timing import Duel, Spread
from glide_fast.files import replacing

LIMITS = {"GFLOP/s": "peak_gflops", "GB/s": "copy_gbs"}
MEBI = 1 << 20


_ORDER = ("upstream", "upstream, text once", "compile", "openvino", "onnxruntime")  # of a case's rows


def _place(peer: str) -> int:
    return _ORDER.index(peer) if peer in _ORDER else len(_ORDER)


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A case against a peer.

    Times are seconds a call. ``ratio`` is that of the pairs, peer / ours: above 1 we are faster. Rates count
    the work of the plain computation, whoever does it by what means, so that a rate may exceed the peak;
    shares are of the measured limit. Errors are parts of what the gate allows. Memory is what a call needs
    besides what is resident, in MiB.
    """

    suite: str
    case: str
    peer: str
    ratio: Spread
    ours: Spread
    theirs: Spread
    pairs: int
    unit: str
    rate: float
    peer_rate: float
    share: float | None
    peer_share: float | None
    intensity: float | None
    error: float
    peer_error: float
    memory: float | None
    peer_memory: float | None

    @classmethod
    def of(
        cls,
        labels: Labels,
        duel: Duel,
        errors: tuple[float, float],
        facts: dict[str, Any],
    ) -> SpeedRow:
        """The row of a duel; ``errors`` are ours and the peer's."""
        ours, theirs = Spread.of(duel.ours), Spread.of(duel.peer)
        limit = facts.get(LIMITS[labels.unit])
        rate, peer_rate = (labels.work / each.median / 1e9 for each in (ours, theirs))
        return cls(
            suite=labels.suite,
            case=labels.case,
            peer=labels.peer,
            ratio=Spread.of(duel.ratios),
            ours=ours,
            theirs=theirs,
            pairs=len(duel.ours),
            unit=labels.unit,
            rate=rate,
            peer_rate=peer_rate,
            share=rate / limit if limit else None,
            peer_share=peer_rate / limit if limit else None,
            intensity=labels.intensity,
            error=errors[0],
            peer_error=errors[1],
            memory=_mebibytes(duel.ours_memory),
            peer_memory=_mebibytes(duel.peer_memory),
        )


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a duel was about; ``work`` is what a call has to compute or move, in ``unit`` without its giga.

    ``intensity``: FLOPs a byte that cannot be avoided, where it is known.
    """

    suite: str
    case: str
    peer: str
    work: float
    unit: str = "GFLOP/s"
    intensity: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """An amount of memory, ours and a peer's, in the ``unit`` that it is counted in."""

    case: str
    peer: str
    ours: float
    theirs: float
    unit: str

    @property
    def ratio(self) -> float:
        """Ours / peer: below 1 we need less."""
        return self.ours / self.theirs


@dataclass
class Record:
    """Everything of one run."""

    facts: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    speed: list[SpeedRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    absent: list[tuple[str, str, str]] = field(default_factory=list)  # case, peer, reason
    red: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON, a case's rows together; each row carries the facts about the machine."""
        cases = list(dict.fromkeys((row.suite, row.case) for row in self.speed))
        self.speed.sort(key=lambda row: (cases.index((row.suite, row.case)), _place(row.peer)))
        content = {
            "facts": self.facts,
            "quick": self.quick,
            "speed": [{**asdict(row), **_spreads(row), **self.facts} for row in self.speed],
            "memory": [{**asdict(row), **self.facts} for row in self.memory],
            "absent": self.absent,
            "red": self.red,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what :meth:`save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        speed = []
        for each in content["speed"]:
            row = {name: each[name] for name in SpeedRow.__dataclass_fields__}
            speed.append(SpeedRow(**{**row, **{name: Spread(**each[name]) for name in SPREADS}}))
        memory = [
            MemoryRow(**{name: each[name] for name in MemoryRow.__dataclass_fields__})
            for each in content["memory"]
        ]
        return cls(
            facts=content["facts"],
            quick=content["quick"],
            speed=speed,
            memory=memory,
            absent=[(case, peer, reason) for case, peer, reason in content["absent"]],
            red=content["red"],
        )


SPREADS = ("ratio", "ours", "theirs")


def _spreads(row: SpeedRow) -> dict[str, dict[str, float]]:
    return {name: getattr(row, name)._asdict() for name in SPREADS}


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / MEBI
