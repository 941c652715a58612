"""Sets of pictures to judge or to compare with: a drawing, an npz as OpenAI's, a folder, the emoji."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glide_fast.data.emoji import load_emoji, split
from glide_fast.data.folder import list_folder
from glide_fast.data.images import load_image
from glide_fast.evaluation.cache import CHUNK
from glide_fast.evaluation.drawing import is_drawing, read_drawing
from glide_fast.evaluation.reference import Reference, read_reference

EMOJI = "emoji"
Chunks = Iterator[NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureSet:
    """``count`` pictures of ``size`` pixels, and what is known of them; ``chunks`` are uint8 [n, H, W, 3].

    ``captions`` are those of all pictures, where all have one; ``statistics`` are published ones. A set of
    statistics alone has no pictures, and no size.
    """

    name: str
    count: int
    size: int
    chunks: Callable[[], Chunks]
    captions: list[str] | None = None
    statistics: Reference | None = None


def read_pictures(source: str, *, size: int | None = None) -> PictureSet:
    """A folder that `glide-fast draw` wrote, an .npz, a folder of pictures, or "emoji" at ``size`` pixels.

    An .npz has the pictures as ``arr_0``, or statistics as :func:`read_reference` takes them, or both. Of
    "emoji" it is the pictures that are not held out of training.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is damaged, holds no pictures or pictures of several sizes.
    """
    path = Path(source)
    if source == EMOJI:
        if size is None:
            raise ValueError("the size of the emoji is that of the pictures that are compared with them")
        training, _ = split(load_emoji(size))
        return _array(source, training.images, captions=training.captions)
    if path.suffix == ".npz":
        return _npz(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{source!r} is neither a folder, an .npz file nor {EMOJI!r}")
    return _drawing(path) if is_drawing(path) else _folder(path)


def _array(
    name: str,
    pictures: NDArray[np.uint8],
    *,
    captions: list[str] | None = None,
    statistics: Reference | None = None,
) -> PictureSet:
    return PictureSet(
        name=name,
        count=len(pictures),
        size=pictures.shape[1],
        chunks=lambda: (pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)),
        captions=captions,
        statistics=statistics,
    )


def _npz(path: Path) -> PictureSet:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist or is not a file")
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = set(stored)
            pictures = stored["arr_0"] if "arr_0" in names else np.zeros((0, 0, 0, 3), dtype=np.uint8)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read pictures from {str(path)!r}: {error}") from error
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(
            f"arr_0 of {str(path)!r} is {pictures.dtype} {list(pictures.shape)}; "
            "it must be uint8 [N, H, W, 3]"
        )
    statistics = read_reference(path) if "mu" in names or not len(pictures) else None
    return _array(str(path), pictures, statistics=statistics)


def _drawing(folder: Path) -> PictureSet:
    captions: list[str] = []
    size = 0
    for shard in read_drawing(folder):
        captions += shard.captions
        size = shard.pictures.shape[1]
    return PictureSet(
        name=str(folder),
        count=len(captions),
        size=size,
        chunks=lambda: (shard.pictures for shard in read_drawing(folder)),
        captions=captions,
    )


def _folder(folder: Path) -> PictureSet:
    listing = list_folder(folder)
    if not listing.pictures:
        raise ValueError(f"{folder} holds no pictures")
    first = load_image(folder / listing.pictures[0]).shape

    def chunks() -> Chunks:
        for start in range(0, len(listing.pictures), CHUNK):
            yield np.stack([picture(name) for name in listing.pictures[start : start + CHUNK]])

    def picture(name: str) -> NDArray[np.uint8]:
        found = load_image(folder / name)
        if found.shape != first:
            raise ValueError(
                f"{folder / name} is {found.shape[1]} x {found.shape[0]} px and {listing.pictures[0]} "
                f"{first[1]} x {first[0]}; keep pictures of one size in the folder"
            )
        return found

    complete = not listing.missing_captions
    captions = [listing.captions[name] for name in listing.pictures] if complete else None
    return PictureSet(
        name=str(folder),
        count=len(listing.pictures),
        size=first[0],
        chunks=chunks,
        captions=captions,
    )
