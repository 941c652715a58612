"""Where a run's pictures come from: which ones a step sees follows from the run's seed and the step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glide_fast.data import emoji
from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.folder import load_dataset
from glide_fast.data.labels import labelled
from glide_fast.data.shards import Example, Lane, Position, RawSample, decode, is_shards, list_shards
from glide_fast.training.config import TrainConfig

Rows = NDArray[np.int64]
MOST_LANES = 64
MOST_FAILURES = 1000  # samples that cannot be read, one after another


class Source(Protocol):
    """The pictures of a run. ``pictures`` are all of them where they are in memory."""

    pictures: CaptionedPictures | None

    def take(self, step: int, part: slice) -> CaptionedPictures:
        """The pictures at the places ``part`` of the step's batch; steps are asked for in order."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on behind the last step taken."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``."""


class Memory:
    """Pictures in memory, in batches of one size; every epoch is a new permutation of all."""

    def __init__(self, pictures: CaptionedPictures, batch: int, seed: int) -> None:
        self.pictures: CaptionedPictures | None = pictures
        self._all = pictures
        self._batch = batch
        self._seed = seed

    def take(self, step: int, part: slice) -> CaptionedPictures:
        rows = rows_of_step(step, self._batch, len(self._all), self._seed)
        return self._all.select(rows[part].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Shards:
    """Shards dealt to lanes; each fills a part of its own of every batch.

    The lanes are as many for any number of processes, which read those that their places belong to.
    """

    pictures: CaptionedPictures | None = None

    def __init__(self, config: TrainConfig) -> None:
        shards = list_shards(config.data.source)
        batch = config.batch
        most = min(len(shards), MOST_LANES)
        count = max(number for number in range(1, most + 1) if batch % number == 0)
        self._each = batch // count  # pictures of a batch from one lane
        self._lanes = [
            Lane(shards=shards, number=number, lanes=count, seed=config.seed, window=config.data.window)
            for number in range(count)
        ]
        self._size = config.image_size
        self._classes = config.classes
        self._needed = "cls" if self._classes is not None else "txt" if config.reads_captions else None
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._ahead: tuple[int, slice, Future[_Taken]] | None = None
        self._positions: dict[str, list[int]] = {}

    def take(self, step: int, part: slice) -> CaptionedPictures:
        """As :class:`Source`; the next step's pictures are read in the background meanwhile.

        Raises:
            OSError, ValueError: nothing can be read from a shard, or from all of a lane; names it.
        """
        if self._ahead is None or self._ahead[:2] != (step, part):
            self._ahead = step, part, self._reader.submit(self._read, part)
        taken = self._ahead[2].result()
        self._ahead = step + 1, part, self._reader.submit(self._read, part)
        self._positions |= taken.positions
        return taken.pictures

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last step taken of each lane that this process reads."""
        return dict(self._positions)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, position in state.items():
            self._lanes[int(name)].position = Position(*position)
        self._positions = dict(state)

    def _read(self, part: slice) -> _Taken:
        first, last = part.start // self._each, -(-part.stop // self._each)
        examples = [example for lane in self._lanes[first:last] for example in self._of_lane(lane)]
        examples = examples[part.start - first * self._each : part.stop - first * self._each]
        pictures = CaptionedPictures(
            images=np.stack([each.picture for each in examples]),
            captions=[each.caption for each in examples],
            names=[each.name for each in examples],
            labels=np.array([each.label for each in examples], dtype=np.int64),
        )
        positions = {str(lane.number): list(lane.position) for lane in self._lanes[first:last]}
        return _Taken(pictures, positions)

    def _of_lane(self, lane: Lane) -> list[Example]:
        """The lane's next pictures; those that cannot be read are named in a warning, and others taken."""
        found: list[Example] = []
        failures = 0
        while len(found) < self._each:
            samples = [lane.next() for _ in range(self._each - len(found))]
            for example in self._decoders.map(self._decoded, samples):
                if isinstance(example, ValueError):
                    failures += 1
                    warnings.warn(f"{example}; left out", stacklevel=2)
                    if failures > MOST_FAILURES:
                        raise ValueError(f"more than {MOST_FAILURES} samples one after another: {example}")
                else:
                    found.append(example)
                    failures = 0
        return found

    def _decoded(self, sample: RawSample) -> Example | ValueError:
        try:
            example = decode(sample, self._size, needed=self._needed)
        except ValueError as error:
            return error
        if self._classes is not None and not 0 <= example.label < self._classes:
            name, label = example.name, example.label
            return ValueError(f"class {label} of sample {name!r} is none of the model's {self._classes}")
        return example


class _Taken(NamedTuple):
    pictures: CaptionedPictures
    positions: dict[str, list[int]]


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``state_dict`` of a source from those of all processes: of each lane, how far anybody has come."""
    found: dict[str, Any] = {}
    for state in states:
        for name, position in state.items():
            found[name] = max(position, found.get(name, position))
    return found


def rows_of_step(step: int, batch: int, count: int, seed: int) -> Rows:
    """The ``batch`` pictures (of ``count``) that a step sees; every epoch is a new permutation of all."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // count
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set(epochs.tolist())
    }
    pairs = zip(epochs.tolist(), (positions % count).tolist(), strict=True)
    return np.array([orders[epoch][place] for epoch, place in pairs], dtype=np.int64)


def open_source(config: TrainConfig) -> Source:
    """The pictures of a config, without the held-out captions where it says so."""
    if is_shards(config.data.source):
        return Shards(config)
    pictures = load_dataset(config.data.source, config.image_size)
    if config.data.source == "emoji" and config.data.hold_out:
        pictures = emoji.split(pictures)[0]
    if config.classes is not None:
        pictures, names = labelled(pictures, config.data.source)
        if len(names) != config.classes:
            field = "classifier.trunk.out_channels" if config.classifier else "model.unet.classes"
            raise ValueError(
                f"{field} {config.classes} is not the number of classes of {config.data.source!r}; "
                f"use {len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
            )
    return Memory(pictures, config.batch, config.seed)
