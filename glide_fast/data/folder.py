"""A folder of pictures with captions: what a person has before training.

A caption stands in a ``.txt`` file beside the picture (``cat.png``, ``cat.txt``), or in ``captions.csv`` or
``captions.jsonl`` (also ``metadata.csv``/``.jsonl``) in the folder, with one row a picture: its file,
relative to the folder, and its caption. Tables win over text files. Sub-folders are read too; hidden ones
are not.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji import load_emoji
from glide_fast.data.images import center_square, load_image

__all__ = ["CaptionedPictures", "FolderListing", "list_folder", "load_dataset", "load_folder"]

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """What a folder holds, before any picture is opened; names are relative to it, with forward slashes."""

    folder: Path
    pictures: list[str]
    captions: dict[str, str]  # picture name -> caption
    captions_without_picture: list[str]
    problems: list[str]  # unreadable tables, rows and text files, each with its reason

    @property
    def missing_captions(self) -> list[str]:
        """The pictures that have no caption."""
        return [name for name in self.pictures if name not in self.captions]


def load_dataset(spec: str | os.PathLike[str], size: int) -> CaptionedPictures:
    """Load the data set ``"emoji"``, or a folder of captioned pictures, at ``size`` x ``size`` pixels.

    Raises ValueError or FileNotFoundError that say what is wrong with the data and how to mend it.
    """
    if os.fspath(spec) == "emoji":
        return load_emoji(size)
    return load_folder(spec, size)


def load_folder(path: str | os.PathLike[str], size: int, *, strict: bool = False) -> CaptionedPictures:
    """Load every captioned picture of a folder, centre-cropped to uint8 [N, size, size, 3], in order of name.

    Pictures that cannot be read or have no caption are named in a warning and skipped; with ``strict`` they
    raise ValueError. Raises FileNotFoundError when there is no such folder, ValueError when nothing is
    left.
    """
    listing = list_folder(path)
    images, names, problems = [], [], list(listing.problems)
    problems += [f"{name}: has no caption" for name in listing.missing_captions]
    for name in listing.pictures:
        if name not in listing.captions:
            continue
        try:
            images.append(center_square(load_image(listing.folder / name), size))
        except ValueError as error:
            problems.append(str(error))
        else:
            names.append(name)
    if problems:
        message = f"{len(problems)} problems in {os.fspath(path)!r}: {_shorten(problems)}"
        if strict:
            raise ValueError(f"{message}; mend or remove them (glide-fast data check lists all)")
        warnings.warn(f"{message}; skipped (glide-fast data check lists all)", stacklevel=2)
    if not images:
        raise ValueError(
            f"no captioned picture in {os.fspath(path)!r}: put a .txt file beside each picture, "
            "or a captions.csv with the columns file,caption"
        )
    captions = [listing.captions[name] for name in names]
    return CaptionedPictures(images=np.stack(images), captions=captions, names=names)


def list_folder(path: str | os.PathLike[str]) -> FolderListing:
    """Find the pictures and captions of a folder, opening no picture; FileNotFoundError without a folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data set {os.fspath(path)!r} is not a folder; give a folder of pictures, or 'emoji'"
        )
    files = [
        relative
        for relative in sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
        if not any(part.startswith(".") for part in relative.parts)
    ]
    pictures = [file.as_posix() for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    problems: list[str] = []
    captions: dict[str, str] = {}
    orphans: list[str] = []
    found = {unicodedata.normalize("NFC", name): name for name in pictures}
    texts = {_stem(file.as_posix()): file for file in files if file.suffix.lower() == ".txt"}
    for name in pictures:
        text = texts.get(_stem(name))
        caption = _read_text(folder / text, problems) if text else None
        if caption:
            captions[name] = caption
    tables = [table for table in TABLES if Path(table) in files]
    for table in tables:
        for name, caption in _read_table(folder / table, problems):
            picture = found.get(unicodedata.normalize("NFC", Path(name).as_posix()))
            if picture is None:
                orphans.append(f"{table}: {name}")
            else:
                captions[picture] = caption
    if not tables:
        stems = {_stem(name) for name in pictures}
        orphans += [file.as_posix() for stem, file in texts.items() if stem not in stems]
    return FolderListing(
        folder=folder,
        pictures=pictures,
        captions=captions,
        captions_without_picture=orphans,
        problems=problems,
    )


def _stem(name: str) -> str:
    """The name without its suffix; normalised, because file systems differ in how they spell accents."""
    return unicodedata.normalize("NFC", Path(name).with_suffix("").as_posix())


def _read_text(path: Path, problems: list[str]) -> str | None:
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as UTF-8 ({error})")
        return None
    if not caption:
        problems.append(f"{path}: is empty")
    return caption or None


def _read_table(path: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (file, caption) of each good row of a CSV or JSONL table."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name}: cannot be read as UTF-8 ({error})")
        return
    for line, row in _jsonl_rows(text) if path.suffix == ".jsonl" else _csv_rows(text):
        where = f"{path.name} line {line}"
        if not isinstance(row, Mapping):
            problems.append(f"{where}: {row}")
            continue
        name, caption = _value(row, FILE_COLUMNS), _value(row, CAPTION_COLUMNS)
        if name is None:
            problems.append(f"{where}: has no file; name its column one of {', '.join(FILE_COLUMNS)}")
        elif caption is None:
            problems.append(f"{where}: has no caption; name its column one of {', '.join(CAPTION_COLUMNS)}")
        else:
            yield name, caption


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        yield reader.line_num, f"is not CSV ({error})"


def _jsonl_rows(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, f"is not JSON ({error})"
        else:
            yield number, row if isinstance(row, dict) else "is not a JSON object"


def _value(row: Mapping[object, object], columns: Sequence[str]) -> str | None:
    named = {key.strip().lower(): value for key, value in row.items() if isinstance(key, str)}
    for column in columns:
        value = named.get(column)
        if isinstance(value, str) and value.strip():
            return " ".join(value.split())
    return None


def _shorten(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
