"""Checkpoints of sharded weights: a folder a step, to which every process writes its share.

By torch.distributed.checkpoint, which reads them back for any number of processes. A folder counts once it
has its ``.metadata``, which is written last; older ones are removed after that.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from glide_fast.training.distributed import World

PREFIX = "checkpoint-"
COMPLETE = ".metadata"
VALUES = "values.pt"


def save(
    directory: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], world: World
) -> None:
    """Write ``checkpoint-STEP`` of tensors that are sharded over all processes, and ``values`` that are not.

    Raises:
        OSError: a process could not write its share; older checkpoints are untouched.
    """
    folder = directory / f"{PREFIX}{step:08d}"
    if (folder / COMPLETE).exists():
        return

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.save(values, folder / VALUES)

    world.first(prepare)
    try:
        save_shards(tensors, checkpoint_id=folder)
    except (CheckpointException, OSError) as error:
        reasons = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        raise OSError(
            f"cannot write {folder}: {next(iter(reasons))[0]}; the checkpoint before it stays"
        ) from error
    world.first(lambda: remove(directory, keep=folder))


def remove(directory: Path, keep: Path | None = None) -> None:
    """Remove the sharded checkpoints there, complete or not, but one."""
    for folder in directory.glob(f"{PREFIX}*"):
        if folder != keep:
            (folder / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def newest(directory: Path) -> Path | None:
    """The complete sharded checkpoint of the latest step, if there is one."""
    complete = [path for path in directory.glob(f"{PREFIX}*") if (path / COMPLETE).exists()]
    return max(complete, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The optimiser steps behind a sharded checkpoint."""
    return int(folder.name.removeprefix(PREFIX))


def read_values(folder: Path) -> dict[str, Any]:
    """What :func:`save` was given beside the tensors; ValueError names a broken file."""
    path = folder / VALUES
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable part of a checkpoint: {error}") from None
    return values


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, sharded in any way or not at all, from a checkpoint.

    Raises:
        ValueError: a file of it is broken or missing, or it has other entries.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it may be
            load_shards(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        reasons = error.failures.values() if isinstance(error, CheckpointException) else [(error,)]
        raise ValueError(f"{folder} is not a readable checkpoint: {next(iter(reasons))[0]}") from error
