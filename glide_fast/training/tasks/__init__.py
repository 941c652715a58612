"""What can be learned: a task turns pictures into a model's inputs and its answers into losses."""

from __future__ import annotations

from collections.abc import Callable

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.training.config import TaskName, TrainConfig
from glide_fast.training.tasks.clip import ClipTask
from glide_fast.training.tasks.diffusion import DiffusionTask, UpsamplerTask
from glide_fast.training.tasks.task import Batch, Task

__all__ = ["TASKS", "Batch", "ClipTask", "DiffusionTask", "Task", "UpsamplerTask"]

TASKS: dict[TaskName, Callable[[TrainConfig, CaptionedPictures | None], Task]] = {
    "base": DiffusionTask,
    "adm": DiffusionTask,
    "upsampler": UpsamplerTask,
    "clip": ClipTask,
}
