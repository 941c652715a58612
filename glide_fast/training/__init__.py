"""Training: tasks, one loop, resumable state. ``train(config, directory)`` is all a recipe needs."""

from glide_fast.training.config import TrainConfig
from glide_fast.training.diagnose import NonFiniteLossError
from glide_fast.training.distributed import LostProcessError
from glide_fast.training.loop import train

__all__ = ["LostProcessError", "NonFiniteLossError", "TrainConfig", "train"]
