"""How many pictures of which seeds, and the files that they become."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from glide_fast import doctor
from glide_fast.data.images import grid, save_png
from glide_fast.files import replacing, sha256_of

LARGEST_COUNT = 10_000


@dataclass(frozen=True, kw_only=True)
class Order:
    """The pictures that are wanted: the k-th of a prompt has the seed SEED + k, whatever their number."""

    number: Annotated[int, arg(aliases=("-n",))] = 1
    """Pictures a prompt."""
    seed: int = 0
    """Seed of the first picture of each prompt."""
    batch: int = 8
    """Pictures painted at a time."""
    out: Path = Path("samples")
    """Folder for the files; it replaces those of the same names."""

    def check(self) -> None:
        """Raise ValueError for a number, seed or batch out of range."""
        if not 1 <= self.number <= LARGEST_COUNT:
            raise ValueError(f"number {self.number} must lie in 1 .. {LARGEST_COUNT}")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if not 0 <= self.seed < 2**63 - self.number:
            raise ValueError(f"seed {self.seed} must lie in 0 .. 2^63 - {self.number}")

    def paint(
        self,
        prompts: Sequence[str],
        paint: Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]],
    ) -> Painted:
        """All pictures of the prompts, batch by batch, by a function from prompts and seeds to pictures."""
        rows = [(prompt, self.seed + k) for prompt in prompts for k in range(self.number)]
        parts = []
        for start in range(0, len(rows), self.batch):
            texts, seeds = zip(*rows[start : start + self.batch], strict=True)
            parts.append(paint(texts, seeds))
        return Painted(order=self, rows=rows, pictures=np.concatenate(parts))


@dataclass(frozen=True, kw_only=True, eq=False)
class Painted:
    """Pictures [N, H, W, 3] with the prompt and seed of each."""

    order: Order
    rows: list[tuple[str, int]]
    pictures: NDArray[np.uint8]

    def write(
        self, verb: str, options: dict[str, Any], models: Sequence[Path], inputs: Sequence[Path] = ()
    ) -> None:
        """PNG files, a grid, and VERB.json with what gives the same pictures again."""
        out, number = self.order.out, self.order.number
        out.mkdir(parents=True, exist_ok=True)
        listed = []
        for index, (picture, (prompt, seed)) in enumerate(zip(self.pictures, self.rows, strict=True)):
            name = f"{index:04d}-{_slug(prompt)}-{seed}.png"
            save_png(out / name, picture)
            listed.append({"file": name, "prompt": prompt, "seed": seed})
        save_png(out / "grid.png", grid(self.pictures, number if number > 1 else 4))
        sidecar = {
            "command": shlex.join(["glide-fast", *sys.argv[1:]]),
            "pictures": listed,
            "options": {**options, "size": int(self.pictures.shape[1]), "batch": self.order.batch},
            "input_sha256": {str(path): sha256_of(path) for path in inputs},
            "model_sha256": {path.name: sha256_of(path) for path in models},
            "versions": doctor.versions(),
        }
        with replacing(out / f"{verb}.json") as temporary:
            temporary.write_text(json.dumps(sidecar, indent=2, default=str) + "\n", encoding="utf-8")
        print(f"{len(self.pictures)} pictures in {out}, all of them on {out / 'grid.png'}")


def _slug(prompt: str) -> str:
    """A short file name made of the prompt's words."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "unconditional"
