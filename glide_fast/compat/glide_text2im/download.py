"""The published checkpoints; what glide-text2im's module of this name offers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glide_fast.download import cache_folder, fetch

__all__ = ["MODEL_PATHS", "default_cache_dir", "fetch_file_cached", "load_checkpoint"]

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
MODEL_PATHS = {
    "base": f"{ADDRESS}/base.pt",
    "upsample": f"{ADDRESS}/upsample.pt",
    "base-inpaint": f"{ADDRESS}/base_inpaint.pt",
    "upsample-inpaint": f"{ADDRESS}/upsample_inpaint.pt",
    "clip/image-enc": f"{ADDRESS}/clip_image_enc.pt",
    "clip/text-enc": f"{ADDRESS}/clip_text_enc.pt",
}


def default_cache_dir() -> str:
    """The folder under which downloads are kept where no ``cache_dir`` is given."""
    return str(cache_folder())


def fetch_file_cached(
    url: str,
    progress: bool = True,
    cache_dir: str | None = None,
    chunk_size: int = 4096,  # noqa: ARG001
) -> str:
    """The path of the file at ``url``, downloaded unless it is there; ``chunk_size`` has no effect."""
    return str(fetch(url, folder=None if cache_dir is None else Path(cache_dir), progress=progress))


def load_checkpoint(
    checkpoint_name: str,
    device: torch.device | str,
    progress: bool = True,
    cache_dir: str | None = None,
    chunk_size: int = 4096,
) -> dict[str, Tensor]:
    """The state dict of a published model, on ``device``.

    Raises:
        ValueError: lists the known names.
    """
    if checkpoint_name not in MODEL_PATHS:
        raise ValueError(
            f"Unknown checkpoint name {checkpoint_name}. Known names are: {', '.join(MODEL_PATHS)}."
        )
    path = fetch_file_cached(MODEL_PATHS[checkpoint_name], progress, cache_dir, chunk_size)
    state: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)
    return state
