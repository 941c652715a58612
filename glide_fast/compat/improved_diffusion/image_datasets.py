"""Batches of a folder's pictures, never flipped; what improved-diffusion's module of this name offers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from glide_fast.compat import image_folders
from glide_fast.compat.image_folders import _list_image_files_recursively

__all__ = ["ImageDataset", "_list_image_files_recursively", "load_data"]


load_data = partial(image_folders.load_data, random_flip=False)


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
