"""The diffusion family of GLIDE, ADM and Improved DDPM on fused kernels: models, samplers, trainer.

``glide_fast.accelerate(model)`` and ``glide_fast.restore(model)`` serve other people's live models; they are
loaded when they are first asked for, so that importing the package stays free.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "accelerate", "restore"]


def __getattr__(name: str) -> Any:
    if name not in ("accelerate", "restore"):
        raise AttributeError(f"module 'glide_fast' has no attribute {name!r}")
    door = importlib.import_module("glide_fast.accelerate")
    return door if name == "accelerate" else door.restore
