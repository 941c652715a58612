"""Where a run's pictures come from: which ones a step sees follows from the run's seed and the step."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glide_fast.data import emoji
from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.folder import load_dataset
from glide_fast.data.labels import labelled
from glide_fast.training.config import TrainConfig

Rows = NDArray[np.int64]


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
