"""What ``accelerate`` did to a model, for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_PATHS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One module: its path in the model ("" is the model itself), its class, and what is done or why not."""

    path: str
    kind: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The modules that our ops serve, and those that were left as they are.

    ``products`` counts the weights that our ops multiply by; on a GPU our Triton kernels multiply by
    ``by_triton`` of them, and cuDNN or cuBLAS by the others.
    """

    model: str
    served: tuple[Entry, ...]
    left: tuple[Entry, ...]
    products: int = 0
    by_triton: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.served)} modules served by glide_fast, {len(self.left)} left alone"
        ]
        for title, entries in (("served", self.served), ("left alone", self.left)):
            if entries:
                lines += [title, *_rows(entries)]
        if self.by_triton:
            lines.append(
                f"{self.by_triton} of {self.products} weights are multiplied by Triton kernels on a GPU"
            )
        return "\n".join(lines)


def _rows(entries: Iterable[Entry]) -> list[str]:
    """One line for all modules of a class with the same note."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.note), []).append(entry.path or "the model")
    rows = []
    for (kind, note), paths in groups.items():
        shown = ", ".join(paths[:_PATHS_SHOWN]) + (", …" if len(paths) > _PATHS_SHOWN else "")
        rows.append(f"  {len(paths):>4} × {kind}: {note} ({shown})")
    return rows
