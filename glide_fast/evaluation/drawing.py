"""N pictures for a judgement, drawn by any number of processes, stopped and gone on with at any moment.

    torchrun --nproc-per-node 8 --no-python glide-fast draw 10000 --out samples

The pictures lie in shards, files that are either whole or not there. Which pictures a shard holds, their
captions, seeds and batches follow from its number alone, so that the processes need not agree on anything
and the result does not depend on how many there are: of so many processes, each takes every so-many-th shard,
and skips those that exist.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from glide_fast.files import replacing
from glide_fast.training.distributed import World

MANIFEST = "draw.json"
SHARD = 64  # pictures a file, unless a plan says otherwise

Paint = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]  # prompts, seeds -> [B, H, W, 3]


class Shard(NamedTuple):
    """Pictures uint8 [n, H, W, 3] with the caption of each."""

    pictures: NDArray[np.uint8]
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class DrawingPlan:
    """Which pictures: the k-th has the seed SEED + k and a caption of ``captions``.

    The captions are taken in a random order that depends on the seed alone, all of them before any of them
    again. ``made_by`` says by which models and options, as JSON; it must be the same when a drawing goes on.
    """

    number: int
    captions: Sequence[str]
    seed: int = 0
    batch: int = 8
    shard: int = SHARD
    made_by: dict[str, Any]

    def check(self) -> None:
        """Raise ValueError for a number, batch or seed out of range, or without captions."""
        if self.number < 1 or self.batch < 1 or self.shard < 1:
            raise ValueError(
                f"number {self.number}, batch {self.batch} and shard {self.shard} must be at least 1"
            )
        if not 0 <= self.seed < 2**63 - self.number:
            raise ValueError(f"seed {self.seed} must lie in 0 .. 2^63 - {self.number}")
        if not self.captions:
            raise ValueError('no captions; give at least one, "" to draw without')

    @property
    def shards(self) -> int:
        """The number of files."""
        return -(-self.number // self.shard)

    def members(self, shard: int) -> range:
        """The numbers of the pictures in a shard."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.number))

    def captions_of(self, pictures: range) -> list[str]:
        """The captions of these pictures."""
        count = len(self.captions)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(count)
            for epoch in {picture // count for picture in pictures}
        }
        return [self.captions[orders[picture // count][picture % count]] for picture in pictures]

    def manifest(self) -> dict[str, Any]:
        """What identifies the pictures."""
        listed = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()
        return {
            "number": self.number,
            "seed": self.seed,
            "batch": self.batch,
            "shard": self.shard,
            "captions_sha256": listed,
            **self.made_by,
        }


def draw(paint: Paint, plan: DrawingPlan, folder: Path, world: World, *, progress: bool = False) -> None:
    """Draw what is missing of this process's share, and wait for the others'.

    Raises:
        ValueError: the plan is impossible, or the folder holds a drawing of another (the fields that differ
            are named).
        OSError: the folder cannot be written.
    """
    plan.check()
    world.first(lambda: _claim(plan, folder))
    own = range(world.rank, plan.shards, world.size)
    for shard in tqdm(own, desc="drawing", unit="shard", disable=not progress):
        members = plan.members(shard)
        path = _path(folder, shard)
        if path.is_file() and _read(path, len(members)) is not None:
            continue
        captions = plan.captions_of(members)
        parts = []
        for start in range(0, len(members), plan.batch):
            rows = slice(start, start + plan.batch)
            parts.append(paint(captions[rows], [plan.seed + picture for picture in members[rows]]))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=np.concatenate(parts), captions=np.array(captions))
    world.objects(None)  # everybody is here
    if world.rank == 0:
        for leftover in folder.glob(".shard-*"):  # of writers that were killed
            leftover.unlink(missing_ok=True)


def is_drawing(folder: Path) -> bool:
    """Whether the folder is one that :func:`draw` made."""
    return (folder / MANIFEST).is_file()


def read_drawing(folder: Path) -> Iterator[Shard]:
    """The shards in order.

    Raises:
        ValueError: a shard is missing or damaged; the same drawing once more mends it.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    number, size = int(manifest["number"]), int(manifest["shard"])
    for shard in range(-(-number // size)):
        path = _path(folder, shard)
        found = _read(path, min(size, number - shard * size)) if path.is_file() else None
        if found is None:
            raise ValueError(
                f"{path} is missing or damaged; the same `glide-fast draw` once more completes {folder}"
            )
        yield found


def _claim(plan: DrawingPlan, folder: Path) -> None:
    """Write the manifest, or see that the one that is there is the same."""
    path, wanted = folder / MANIFEST, plan.manifest()
    if path.is_file():
        present = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in wanted if present.get(key) != wanted[key]]
        if differing:
            facts = ", ".join(f"{key} {present.get(key)!r}, not {wanted[key]!r}" for key in differing)
            raise ValueError(f"{folder} holds a drawing with {facts}; choose another folder or delete it")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.npz"


def _read(path: Path, count: int) -> Shard | None:
    """A shard, its checksums right; None, with a warning, where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = Shard(stored["arr_0"], [str(caption) for caption in stored["captions"]])
        if not len(found.pictures) == len(found.captions) == count:
            raise ValueError(f"it holds {len(found.pictures)} pictures instead of {count}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{path} is damaged: {error}", stacklevel=3)
        return None
    return found
