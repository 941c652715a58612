"""Batches of a folder's pictures, never flipped; what improved-diffusion's module of this name offers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from torch import Tensor

from glide_fast.compat import image_folders
from glide_fast.compat.image_folders import _list_image_files_recursively

__all__ = ["ImageDataset", "_list_image_files_recursively", "load_data"]


def load_data(
    *,
    data_dir: str | os.PathLike[str],
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless batches: pictures [B, 3, H, W] in [-1, 1], and {"y": classes [B]} with ``class_cond``."""
    return image_folders.load_data(
        data_dir=data_dir,
        batch_size=batch_size,
        image_size=image_size,
        class_cond=class_cond,
        deterministic=deterministic,
        random_flip=False,
    )


class ImageDataset(image_folders.ImageDataset):
    """Pictures of some paths, their central squares; every ``num_shards``-th from ``shard`` on."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__(resolution, image_paths, classes, shard, num_shards, random_flip=False)
