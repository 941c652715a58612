"""The emoji data set: the bitmaps of Noto Color Emoji on white, captioned with their Unicode names.

The font is Debian's ``fonts-noto-color-emoji`` (SIL Open Font License 1.1). Only emoji that the font draws
as one glyph are pictures here: how many there are depends on the versions of the font and of the package
``emoji``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji_captions import (
    SKIN_TONES,
    Emoji,
    held_out_captions,
    list_emoji,
    skin_tone,
    tone_siblings,
)
from glide_fast.files import replacing

__all__ = [
    "FONT_VARIABLE",
    "SKIN_TONES",
    "draw_emoji",
    "find_font",
    "held_out_captions",
    "load_emoji",
    "skin_tone",
    "split",
    "tone_siblings",
]

FONT_VARIABLE = "GLIDE_FAST_EMOJI_FONT"
FONT_FILE = "NotoColorEmoji.ttf"
FONT_PACKAGE = "fonts-noto-color-emoji"

BITMAP_SIZE = 109  # the only size, in pixels per em, of the font's bitmaps
BITMAP_WIDTH, PICTURE_SIZE = 136, 128  # bitmaps are 136x128 with 4 empty columns at either side
LARGEST_SIZE = 1024
DRAWING_VERSION = 1  # part of the cache key: raise it when the drawing changes
NO_SUCH_CHARACTER = "\U0010ffff"


def find_font() -> Path:
    """Return the path of Noto Color Emoji: ``$GLIDE_FAST_EMOJI_FONT``, else the usual font folders.

    Raises FileNotFoundError that names the Debian package and the variable.
    """
    help_text = (
        f"install it (Debian, Ubuntu: apt-get install {FONT_PACKAGE}) or set {FONT_VARIABLE} to its path"
    )
    chosen = os.environ.get(FONT_VARIABLE)
    if chosen:
        if not Path(chosen).is_file():
            raise FileNotFoundError(f"{FONT_VARIABLE} is {chosen!r}, which is not a file; {help_text}")
        return Path(chosen)
    data_home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    folders = (
        f"{sys.prefix}/share/fonts",
        f"{data_home}/fonts",
        "~/.fonts",
        "/usr/local/share/fonts",
        "/usr/share/fonts",
    )
    for folder in folders:
        for found in sorted(Path(folder).expanduser().rglob(FONT_FILE)):
            return found
    raise FileNotFoundError(f"{FONT_FILE} is in none of {', '.join(folders)}; {help_text}")


def load_emoji(size: int) -> CaptionedPictures:
    """Return all emoji that the font draws, ``size`` pixels wide and high, in code-point order.

    The first call for a size draws them (seconds) and stores them in the user's cache folder. Raises
    ValueError for a size outside 1..1024, FileNotFoundError without the font, ModuleNotFoundError without
    the package ``emoji``.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"emoji size {size} is outside 1..{LARGEST_SIZE} pixels")
    listed = list_emoji()
    font_path = find_font()
    cache = _cache_file(font_path, listed, size)
    stored = _read_cache(cache)
    if stored is None:
        stored = _draw_all(font_path, listed, size)
        _write_cache(cache, *stored)
    images, names = stored
    captions = {item.name: item.caption for item in listed}
    return CaptionedPictures(images=images, captions=[captions[name] for name in names], names=names)


def split(dataset: CaptionedPictures) -> tuple[CaptionedPictures, CaptionedPictures]:
    """Return (training, held out): held out are the 100 captions of ``held_out_captions``; order kept."""
    held_out = frozenset(held_out_captions())
    is_held_out = [caption in held_out for caption in dataset.captions]
    training = dataset.select([index for index, out in enumerate(is_held_out) if not out])
    return training, dataset.select([index for index, out in enumerate(is_held_out) if out])


def draw_emoji(text: str, font: ImageFont.FreeTypeFont, size: int) -> NDArray[np.uint8] | None:
    """Draw one emoji on white, uint8 [size, size, 3]; None when the font has no single glyph for it."""
    if font.getlength(text) > 1.5 * BITMAP_WIDTH:
        return None
    bitmap = _bitmap(text, font)
    if not bitmap.getbbox() or bitmap.tobytes() == _missing_glyph(font):
        return None
    margin = (BITMAP_WIDTH - PICTURE_SIZE) // 2
    picture = Image.new("RGBA", (PICTURE_SIZE, PICTURE_SIZE), "white")
    picture.alpha_composite(bitmap.crop((margin, 0, margin + PICTURE_SIZE, PICTURE_SIZE)))
    # A box filter averages whole pixels: up to rounding, the picture at 32 is the 2x average of that at 64.
    smaller = Image.Resampling.BOX if size <= PICTURE_SIZE else Image.Resampling.BICUBIC
    return np.asarray(picture.convert("RGB").resize((size, size), smaller))


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Open the font at its bitmap size; ValueError when it has none or Pillow cannot join characters."""
    if not features.check("raqm"):
        raise ValueError(
            "this Pillow was built without raqm, which joins skin tones and flags into one emoji; "
            "install Pillow's wheel (pip install --force-reinstall pillow) or libraqm0"
        )
    try:
        return ImageFont.truetype(path, BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(
            f"font {path} has no {BITMAP_SIZE} px bitmaps ({error}); install Debian's {FONT_PACKAGE}, "
            f"or set {FONT_VARIABLE} to its {FONT_FILE}"
        ) from error


def _bitmap(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    bitmap = Image.new("RGBA", (BITMAP_WIDTH, PICTURE_SIZE), (255, 255, 255, 0))
    ImageDraw.Draw(bitmap).text((0, 0), text, font=font, embedded_color=True, anchor="lt")
    return bitmap


@functools.lru_cache(maxsize=4)
def _missing_glyph(font: ImageFont.FreeTypeFont) -> bytes:
    return _bitmap(NO_SUCH_CHARACTER, font).tobytes()


def _draw_all(font_path: Path, listed: list[Emoji], size: int) -> tuple[NDArray[np.uint8], list[str]]:
    font = open_font(font_path)
    drawn = [(item.name, draw_emoji(item.text, font, size)) for item in listed]
    found = [(name, picture) for name, picture in drawn if picture is not None]
    if not found:
        raise ValueError(f"font {font_path} draws no emoji; install Debian's {FONT_PACKAGE}")
    return np.stack([picture for _, picture in found]), [name for name, _ in found]


def _cache_file(font_path: Path, listed: list[Emoji], size: int) -> Path:
    digest = hashlib.sha256(font_path.read_bytes())
    digest.update("\n".join(item.name for item in listed).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glide_fast"
    return folder / f"emoji-{size}-v{DRAWING_VERSION}-{digest.hexdigest()[:16]}.npz"


def _read_cache(path: Path) -> tuple[NDArray[np.uint8], list[str]] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["images"], [str(name) for name in stored["names"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"drawing the emoji again, because the cache {path} is damaged: {error}", stacklevel=3)
        return None


def _write_cache(path: Path, images: NDArray[np.uint8], names: list[str]) -> None:
    try:
        with replacing(path) as temporary:
            np.savez_compressed(temporary, images=images, names=np.array(names))
    except OSError as error:
        warnings.warn(
            f"the emoji are drawn again next time: cannot write the cache {path}: {error}", stacklevel=3
        )
