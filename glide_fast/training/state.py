"""The one resumable checkpoint of a run: everything the next step depends on, whole or not there."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glide_fast.config import from_dict, to_dict
from glide_fast.diffusion import TimestepSampler
from glide_fast.files import replacing
from glide_fast.models.checkpoint import check_fits
from glide_fast.training.config import TrainConfig
from glide_fast.training.ema import ExponentialMovingAverage

ENTRIES = ("config", "step", "model", "ema", "optimizer", "timesteps")
FREE_TO_CHANGE = (
    "steps",
    "save_every",
    "samples",
    "weighting",
    "timesteps",
    "compute_dtype",
    "optimizer.decay_steps",
    "optimizer.learning_rate",
)


@dataclass(kw_only=True)
class TrainingState:
    """Model, average, optimiser and timestep sampler after ``step`` optimiser steps.

    ``unlogged`` holds the numbers of the steps since the last line of the log, which the next line averages.
    Random numbers and the data position need no state of their own: both are functions of the seed and the
    step.
    """

    model: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    step: int = 0
    unlogged: list[dict[str, float]] = field(default_factory=list)

    def save(self, path: Path, config: TrainConfig) -> None:
        """Write the checkpoint, replacing an older one only when it is complete."""
        values = {
            "config": to_dict(config),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "timesteps": self.timesteps.state_dict(),
            "unlogged": self.unlogged,
        }
        with replacing(path) as temporary:
            torch.save(values, temporary)

    def resume(self, path: Path, config: TrainConfig) -> None:
        """Continue from a checkpoint of the same config.

        Raises:
            ValueError: the file is broken, or its config differs in more than the length of the run.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {part} is wrong")
            values = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
        missing = [name for name in ENTRIES if not isinstance(values, dict) or name not in values]
        if missing:
            raise ValueError(f"{path} is not the checkpoint of a training run: it has no {missing[0]!r}")
        before = from_dict(
            TrainConfig, values["config"], f"the config in {path}"
        )  # newer fields: their defaults
        difference = first_difference(to_dict(before), to_dict(config))
        if difference is not None:
            raise ValueError(f"{path} belongs to another config: {difference}; use another run directory")
        check_fits(self.model, values["model"], str(path))
        check_fits(self.model, values["ema"], f"the average in {path}")
        self.model.load_state_dict(values["model"])
        self.ema.load_state_dict(values["ema"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.timesteps.load_state_dict(values["timesteps"])
        self.step = values["step"]
        self.unlogged = list(values.get("unlogged", []))


def first_difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str | None:
    """The first field in which two configs differ, with both values; fields free to change do not count."""
    for name in {**old, **new}:
        where = f"{path}{name}"
        before, now = old.get(name), new.get(name)
        if where in FREE_TO_CHANGE or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            nested = first_difference(before, now, f"{where}.")
            if nested is not None:
                return nested
            continue
        return f"{where} was {before!r} and is now {now!r}"
    return None
