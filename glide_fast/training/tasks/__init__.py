"""What can be learned: a task turns pictures into a model's inputs and its answers into losses."""

from __future__ import annotations

from collections.abc import Callable

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.training.config import TaskName, TrainConfig
from glide_fast.training.tasks.classifier import ClassifierTask
from glide_fast.training.tasks.clip import ClipTask
from glide_fast.training.tasks.diffusion import DiffusionTask, UpsamplerTask
from glide_fast.training.tasks.inpaint import InpaintTask, InpaintUpsamplerTask
from glide_fast.training.tasks.task import Batch, Task

__all__ = [
    "TASKS",
    "Batch",
    "ClassifierTask",
    "ClipTask",
    "DiffusionTask",
    "InpaintTask",
    "InpaintUpsamplerTask",
    "Task",
    "UpsamplerTask",
]

TASKS: dict[TaskName, Callable[[TrainConfig, CaptionedPictures | None], Task]] = {
    "base": DiffusionTask,
    "adm": DiffusionTask,
    "upsampler": UpsamplerTask,
    "inpaint": InpaintTask,
    "inpaint_upsampler": InpaintUpsamplerTask,
    "classifier": ClassifierTask,
    "clip": ClipTask,
}
