"""Features that are computed once: kept in files named after the pictures' content and who looked at them.

Each chunk of pictures is a file of its own, so that a long computation that was stopped goes on where it was,
and pictures that occur in several sets are looked at once.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glide_fast.download import cache_folder
from glide_fast.evaluation.extractors import Extractor, PictureFeatures
from glide_fast.files import replacing

CHUNK = 256  # pictures a file


def cached(extractor: Extractor, folder: Path | None = None) -> Extractor:
    """The same extractor, which looks for its features in ``folder`` first and keeps them there.

    Default: ``features`` in the user's cache folder. A damaged file is named in a warning and made anew;
    where nothing can be written a warning says so, and the features are given all the same.
    """
    place = cache_folder() / "features" if folder is None else folder

    def extract(pictures: NDArray[np.uint8]) -> PictureFeatures:
        chunks = [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]
        return PictureFeatures.join([_chunk(extractor, chunk, place) for chunk in chunks])

    return replace(extractor, extract=extract)


def feature_file(identity: str, pictures: NDArray[np.uint8], folder: Path) -> Path:
    """Where the features of these very pictures are kept."""
    digest = hashlib.sha256(f"{identity} {pictures.dtype} {pictures.shape} ".encode())
    digest.update(np.ascontiguousarray(pictures).data)
    key = digest.hexdigest()
    return folder / key[:2] / f"{key}.npz"


def _chunk(extractor: Extractor, pictures: NDArray[np.uint8], folder: Path) -> PictureFeatures:
    path = feature_file(extractor.identity, pictures, folder)
    found = _read(path, len(pictures))
    if found is None:
        found = extractor.extract(pictures)
        _write(path, found)
    return found


def _read(path: Path, count: int) -> PictureFeatures | None:
    """The features in a file of the cache, checked by the archive's checksums; None where they are not."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = PictureFeatures(**{name: stored[name] for name in stored})
        rows = {len(each) for each in found if each is not None}
        if rows != {count}:
            raise ValueError(f"it holds {sorted(rows)} rows for {count} pictures")
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"features are computed again, because {path} is damaged: {error}", stacklevel=4)
        return None
    return found


def _write(path: Path, features: PictureFeatures) -> None:
    arrays = {name: rows for name, rows in features._asdict().items() if rows is not None}
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(f"features are computed again next time: cannot write {path}: {error}", stacklevel=4)
