"""The resumable checkpoint of a run: everything the next step depends on, whole or not there.

It is one file, ``checkpoint.pt``, unless the weights are sharded: see :mod:`glide_fast.training.sharded`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glide_fast.config import from_dict, to_dict
from glide_fast.diffusion import TimestepSampler
from glide_fast.files import replacing
from glide_fast.models.checkpoint import check_fits
from glide_fast.training import sharded
from glide_fast.training.config import TrainConfig
from glide_fast.training.distributed import World
from glide_fast.training.ema import ExponentialMovingAverage
from glide_fast.training.scaling import LossScale
from glide_fast.training.sources import Source, merged

FILE = "checkpoint.pt"
ENTRIES = ("config", "step", "model", "ema", "optimizer", "timesteps")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, for each parameter
FREE_TO_CHANGE = (
    "steps",
    "save_every",
    "samples",
    "weighting",
    "timesteps",
    "compute_dtype",
    "scaling",
    "accumulate",
    "sharding",
    "checkpoint_activations",
    "optimizer.decay_steps",
    "optimizer.learning_rate",
)


@dataclass(kw_only=True)
class TrainingState:
    """Model, average, optimiser, loss scale, timestep sampler and data source after ``step`` optimiser steps.

    ``unlogged`` holds the numbers of the steps since the last line of the log, which the next line averages.
    Random numbers need no state of their own: they are functions of the seed and the step.
    """

    model: nn.Module
    ema: ExponentialMovingAverage
    optimizer: torch.optim.Optimizer
    scale: LossScale
    timesteps: TimestepSampler
    source: Source
    world: World
    step: int = 0
    unlogged: list[dict[str, float]] = field(default_factory=list)

    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write the checkpoint, replacing an older one only when it is complete.

        Raises:
            OSError: it cannot be written, on every process; the older one stays.
        """
        positions = self.world.objects(self.source.state_dict())
        values = {
            "config": to_dict(config),
            "step": self.step,
            "timesteps": self.timesteps.state_dict(),
            "unlogged": self.unlogged,
            "scale": self.scale.state_dict(),
            "source": merged(positions),
        }
        if self.is_sharded:
            sharded.save(directory, self.step, self.tensors(), values, self.world)
            self.world.first(lambda: (directory / FILE).unlink(missing_ok=True))
            return
        values["model"] = self.model.state_dict()
        values["ema"] = self.ema.state_dict()
        values["optimizer"] = self.optimizer.state_dict()

        def write() -> None:
            with replacing(directory / FILE) as temporary:
                torch.save(values, temporary)
            sharded.remove(directory)

        self.world.first(write)

    @staticmethod
    def saved(directory: Path) -> Path | None:
        """The checkpoint that a run there goes on from: the newest, where a kill left two kinds."""
        file, shards = directory / FILE, sharded.newest(directory)
        if shards is None or not file.exists():
            return file if file.exists() else shards
        return file if _read(file)["step"] >= sharded.step_of(shards) else shards

    def resume(self, directory: Path, config: TrainConfig) -> None:
        """Continue from the checkpoint in ``directory``, if any, written by any number of processes.

        Raises:
            ValueError: it is broken, or its config differs in more than the length of the run.
        """
        path = self.saved(directory)
        if path is None:
            return
        values = sharded.read_values(path) if path.is_dir() else _read(path)
        wanted = [name for name in ENTRIES if not path.is_dir() or name in ("config", "step", "timesteps")]
        missing = [name for name in wanted if not isinstance(values, dict) or name not in values]
        if missing:
            raise ValueError(f"{path} is not the checkpoint of a training run: it has no {missing[0]!r}")
        before = from_dict(
            TrainConfig, values["config"], f"the config in {path}"
        )  # newer fields: their defaults
        difference = first_difference(to_dict(before), to_dict(config))
        if difference is not None:
            raise ValueError(f"{path} belongs to another config: {difference}; use another run directory")
        if path.is_dir():
            sharded.load(path, self.tensors())
        else:
            self._load(values, path)
        self.timesteps.load_state_dict(values["timesteps"])
        self.source.load_state_dict(values.get("source", {}))
        self.scale.load_state_dict(values.get("scale", {}))
        self.step = values["step"]
        self.unlogged = list(values.get("unlogged", []))

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of the weights."""
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name; moments that are not there yet are made."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), device=parameter.device)
                for moment in MOMENTS[1:]:
                    moments[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            found[f"model.{name}"] = parameter.detach()
            found[f"ema.{name}"] = self.ema.average[name]
            found |= {f"optimizer.{name}.{moment}": moments[moment] for moment in MOMENTS}
        return found

    def _load(self, values: dict[str, Any], path: Path) -> None:
        check_fits(self.model, values["model"], str(path))
        check_fits(self.model, values["ema"], f"the average in {path}")
        if not self.is_sharded:
            self.model.load_state_dict(values["model"])
            self.ema.load_state_dict(values["ema"])
            self.optimizer.load_state_dict(values["optimizer"])
            return
        tensors = self.tensors()
        for index, (name, _) in enumerate(self.model.named_parameters()):
            _fill(tensors[f"model.{name}"], values["model"][name])
            _fill(tensors[f"ema.{name}"], values["ema"][name])
            for moment, value in values["optimizer"]["state"].get(index, {}).items():
                _fill(tensors[f"optimizer.{name}.{moment}"], value)


def _fill(target: Tensor, value: Tensor) -> None:
    """Copy the whole ``value`` into a tensor of which this process may have a shard."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        value = distribute_tensor(value.contiguous(), target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {part} is wrong")
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    return values


def first_difference(
    old: dict[str, Any], new: dict[str, Any], path: str = "", free: Sequence[str] = FREE_TO_CHANGE
) -> str | None:
    """The first field in which two configs differ, with both values; ``free`` fields do not count."""
    for name in {**old, **new}:
        where = f"{path}{name}"
        before, now = old.get(name), new.get(name)
        if where in free or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            nested = first_difference(before, now, f"{where}.", free)
            if nested is not None:
                return nested
            continue
        return f"{where} was {before!r} and is now {now!r}"
    return None
