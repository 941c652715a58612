"""Where models compute: the options that the commands that paint have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from glide_fast.models import LoadedModel
from glide_fast.models.placement import placed


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device, and the dtype that models compute in."""

    device: Literal["cpu", "cuda"] | None = None
    """Where to paint. Default: on a GPU if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the models' activations. Default: float16 on a GPU, else float32."""

    def place(self, *stages: LoadedModel | None) -> None:
        """Move the models there.

        Raises:
            ValueError: there is no GPU that this torch can use.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this torch can use no GPU, so --device cuda is not possible; leave it out")
        if device == "cpu" and self.dtype is None:
            return
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        for stage in stages:
            if stage is not None:
                placed(stage.network, device, dtype)
