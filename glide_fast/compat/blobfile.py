"""A stand-in for the package ``blobfile``, which the originals read files with: local paths only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from glob import iglob
from os.path import basename, dirname, exists, isdir, join
from typing import IO, Any

__all__ = [
    "BlobFile",
    "basename",
    "copy",
    "dirname",
    "exists",
    "glob",
    "isdir",
    "join",
    "listdir",
    "makedirs",
    "remove",
]


def BlobFile(path: str, mode: str = "r", streaming: bool | None = None, **_options: Any) -> IO[Any]:  # noqa: N802
    """Open a local file; how it would be buffered has no effect.

    Raises:
        ValueError: the path is that of a cloud bucket.
    """
    del streaming
    return open(_local(path), mode)


def listdir(path: str) -> Iterator[str]:
    """The names in a folder, sorted."""
    yield from sorted(os.listdir(_local(path)))


def makedirs(path: str) -> None:
    """Create a folder and those above it, unless they are there."""
    os.makedirs(_local(path), exist_ok=True)


def glob(pattern: str) -> Iterator[str]:
    """The paths that match a pattern."""
    return iglob(_local(pattern), recursive=True)


def copy(src: str, dst: str, overwrite: bool = False) -> None:
    """Copy a file. FileExistsError where there is one already and ``overwrite`` is false."""
    if exists(dst) and not overwrite:
        raise FileExistsError(f"{dst} is there already; give overwrite=True")
    shutil.copyfile(_local(src), _local(dst))


def remove(path: str) -> None:
    """Delete a file."""
    os.remove(_local(path))


def _local(path: str) -> str:
    if "://" in path:
        raise ValueError(f"{path} is not a local path; install the package blobfile to read it")
    return path
