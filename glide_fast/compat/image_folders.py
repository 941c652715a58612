"""Batches of a folder's pictures without captions, as the original projects' ``image_datasets`` cut them."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glide_fast.compat.distributed import rank, world_size

__all__ = [
    "ImageDataset",
    "_list_image_files_recursively",
    "center_crop_arr",
    "load_data",
    "random_crop_arr",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")


def load_data(
    *,
    data_dir: str | os.PathLike[str],
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless batches: pictures [B, 3, H, W] in [-1, 1], and {"y": classes [B]} with ``class_cond``.

    The class of a file is its name up to the first underscore; classes count in order of name. Each process
    reads its share. ``deterministic`` keeps the order of the files.

    Raises:
        ValueError: no folder is given, or it has too few pictures for a batch.
    """
    if not data_dir:
        raise ValueError("unspecified data directory; give data_dir, a folder of pictures")
    paths = _list_image_files_recursively(data_dir)
    classes = None
    if class_cond:
        names = [os.path.basename(path).split("_")[0] for path in paths]
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        classes = [numbers[name] for name in names]
    dataset = ImageDataset(
        image_size,
        paths,
        classes=classes,
        shard=rank(),
        num_shards=world_size(),
        random_crop=random_crop,
        random_flip=random_flip,
    )
    if len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} pictures of {os.fspath(data_dir)!r} for a batch of {batch_size}; "
            "use a smaller batch, or more pictures"
        )
    loader = DataLoader(
        dataset, batch_size=batch_size, shuffle=not deterministic, num_workers=1, drop_last=True
    )
    return _forever(loader)


class ImageDataset(Dataset[tuple[npt.NDArray[np.float32], dict[str, Any]]]):
    """Pictures of some paths, cut to squares of ``resolution``; every ``num_shards``-th from ``shard`` on."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """float32 [3, resolution, resolution] in [-1, 1], and {"y": class} where there are classes."""
        with Image.open(self.local_images[idx]) as opened:
            picture = opened.convert("RGB")
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(picture, self.resolution)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        values = np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)
        if self.local_classes is None:
            return values, {}
        return values, {"y": np.array(self.local_classes[idx], dtype=np.int64)}


def center_crop_arr(pil_image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """A picture's central square as uint8 [image_size, image_size, C]; its shorter side is scaled to fit."""
    pixels = np.array(_shrink(pil_image, image_size))
    top, left = ((side - image_size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> npt.NDArray[np.uint8]:
    """A random square as uint8 [image_size, image_size, C], of such a share of the shorter side."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = np.array(_shrink(pil_image, random.randrange(smallest, largest + 1)))
    top, left = (random.randrange(side - image_size + 1) for side in pixels.shape[:2])
    return pixels[top : top + image_size, left : left + image_size]


def _shrink(picture: Image.Image, shorter: int) -> Image.Image:
    """Halve by averaging while that is possible, then scale the shorter side bicubically."""
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, resample=Image.Resampling.BICUBIC)


def _list_image_files_recursively(data_dir: str | os.PathLike[str]) -> list[str]:
    results: list[str] = []
    for entry in sorted(Path(data_dir).iterdir(), key=lambda path: path.name):
        if entry.suffix.lower() in SUFFIXES:
            results.append(str(entry))
        elif entry.is_dir():
            results += _list_image_files_recursively(entry)
    return results


def _forever(loader: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    while True:
        yield from loader
