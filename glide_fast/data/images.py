"""Pictures in and out: files, uint8 arrays, tensors in [-1, 1] and grids."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from glide_fast.files import replacing

__all__ = ["center_square", "decode_image", "grid", "load_image", "save_png", "to_tensor", "to_uint8"]

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a picture file as uint8 RGB [H, W, 3], upright, with transparent parts over white.

    Understands palettes, grey, CMYK, 16-bit and EXIF orientation; of an animation it takes the first frame.
    Raises FileNotFoundError, or ValueError that names the file and the reason when it cannot be decoded
    completely.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"picture {os.fspath(path)!r} does not exist or is not a file")
    return decode_image(path, os.fspath(path))


def decode_image(file: str | os.PathLike[str] | BinaryIO, name: str) -> NDArray[np.uint8]:
    """As :func:`load_image` for an open file too; ``name`` stands in the error."""
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{opened.width} x {opened.height} pixels may be a decompression bomb")
            opened.load()
            picture = ImageOps.exif_transpose(opened)
        return _to_rgb(picture)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        MemoryError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"cannot read picture {name!r}: {error}") from error


def center_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale the shorter side of [H, W, 3] to ``size`` and keep the central square: uint8 [size, size, 3].

    Large pictures are first averaged over whole blocks (a power of two), then resized with a bicubic
    filter: the preprocessing of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol 2021).
    """
    if size < 1:
        raise ValueError(f"picture size {size} must be at least 1 pixel")
    picture = Image.fromarray(image)
    shorter = min(picture.size)
    if shorter >= 2 * size:
        picture = picture.reduce(2 ** int(math.log2(shorter / size)))
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Turn uint8 [B, H, W, 3] (or one [H, W, 3]) into float32 [B, 3, H, W] (or [3, H, W]) in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be uint8 [..., H, W, 3]")
    values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
    return values.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Turn [B, 3, H, W] (or one [3, H, W]) in [-1, 1] into uint8 [B, H, W, 3], rounded as GLIDE does."""
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"images are {list(images.shape)}; they must be [..., 3, H, W]")
    values = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(np.moveaxis(values.cpu().numpy(), -3, -1))


def grid(images: NDArray[np.uint8], columns: int, *, gap: int = 2) -> NDArray[np.uint8]:
    """Lay out uint8 [B, H, W, 3] row by row on white, ``gap`` pixels apart and around: one [H, W, 3]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] == 0 or images.shape[3] != 3:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; they must be uint8 [B >= 1, H, W, 3]"
        )
    if columns < 1 or gap < 0:
        raise ValueError(f"columns {columns} must be at least 1 and gap {gap} at least 0")
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: str | os.PathLike[str], image: NDArray[np.uint8]) -> None:
    """Write uint8 [H, W, 3] as PNG, completely or not at all; OSError when the folder cannot be written."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3]")
    with replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"grey values {values.min()}..{values.max()} are outside 16 bits; save it with 8 or 16 bits"
            )
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits a channel")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return np.array(picture.convert("RGB"))
