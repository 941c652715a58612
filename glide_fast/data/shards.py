"""Pictures in shards, tar files as ``webdataset`` reads them, too many for memory; local, or at a URL.

Files of one stem are a sample: ``0001.jpg`` with ``0001.txt`` (caption), ``0001.cls`` (class index), or both.
Shards are dealt to lanes, each of which reads its own in an order drawn for every epoch, and shuffles its
samples in windows. What a lane reads next follows from its position alone: four numbers, saved and restored.
"""

from __future__ import annotations

import io
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glide_fast.data.images import center_square, decode_image

PICTURES = ("jpg", "jpeg", "png", "webp")
_REMOTE = re.compile(r"(https?|s3|gs|pipe|hdfs|ais|ssh|rsync):", re.IGNORECASE)

RawSample = dict[str, Any]  # bytes by suffix, and "__key__"


class Example(NamedTuple):
    """A picture [size, size, 3] with its caption ("" without one) and class (-1 without one)."""

    picture: NDArray[np.uint8]
    caption: str
    label: int
    name: str


class Position(NamedTuple):
    """How far a lane is: ``place`` samples into the window that begins ``start`` samples into a shard.

    The shard is the ``shard``-th of those that the lane reads in ``epoch``.
    """

    epoch: int = 0
    shard: int = 0
    start: int = 0
    place: int = 0


def is_shards(source: str) -> bool:
    """Whether a data source is meant as shards: it ends in .tar, or is a command ("pipe:…")."""
    return source.lower().split("?")[0].endswith(".tar") or source.startswith("pipe:")


def list_shards(source: str) -> list[str]:
    """The shards that a source with braces means: "a/{000..099}.tar", "https://…/{a,b}.tar".

    Raises:
        FileNotFoundError: names the local ones that are not there.
        ModuleNotFoundError: the package ``webdataset`` is missing.
    """
    _webdataset()
    from braceexpand import braceexpand

    shards = list(braceexpand(source))
    missing = [shard for shard in shards if not _REMOTE.match(shard) and not Path(shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} shards of {source!r} do not exist, the first is {missing[0]!r}"
        )
    return shards


def read_samples(shard: str) -> Iterator[RawSample]:
    """The samples of a shard in order; of one that is cut off, those before the cut, and a warning names it.

    Raises:
        OSError: nothing can be read from it.
    """
    tools = _webdataset()
    count = 0
    try:
        with tools.gopen(shard, "rb") as stream:
            watched = _Watched(stream)
            files = tools.tariterators.tar_file_iterator(watched)
            for sample in tools.tariterators.group_by_keys({**file, "__url__": shard} for file in files):
                yield sample
                count += 1
            if watched.tail.strip(b"\0"):
                raise EOFError("it has no end mark")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if count == 0:
            raise OSError(f"shard {shard} cannot be read: {error}") from error
        warnings.warn(
            f"shard {shard} cannot be read to its end: {error}; it gave {count} samples, the rest is lost",
            stacklevel=2,
        )


def decode(sample: RawSample, size: int, *, needed: str | None) -> Example:
    """The picture, cropped to ``size``, and what belongs to it.

    Raises:
        ValueError: names the sample that has no picture, or no file of the suffix ``needed``, or broken ones.
    """
    name = sample["__key__"]
    suffix = next((each for each in PICTURES if each in sample), None)
    if suffix is None:
        raise ValueError(f"sample {name!r} has no picture; name it .{', .'.join(PICTURES)}")
    if needed is not None and needed not in sample:
        raise ValueError(f"sample {name!r} has no .{needed}, which the task learns from")
    picture = decode_image(io.BytesIO(sample[suffix]), f"{name}.{suffix}")
    try:
        caption = " ".join(sample.get("txt", b"").decode("utf-8-sig").split())
        label = int(sample["cls"].decode()) if "cls" in sample else -1
    except ValueError as error:
        raise ValueError(f"caption or class of sample {name!r} cannot be read: {error}") from error
    return Example(center_square(picture, size), caption, label, name)


FIRST = Position()


@dataclass(kw_only=True)
class Lane:
    """Lane ``number`` of ``lanes``, which deal the ``shards`` among themselves; it never ends."""

    shards: list[str]
    number: int
    lanes: int
    seed: int
    window: int
    position: Position = FIRST

    def __post_init__(self) -> None:
        self._samples: Iterator[RawSample] | None = None
        self._window: list[RawSample] = []

    def next(self) -> RawSample:
        """The next sample; the position is behind it."""
        empty = 0
        while self.position.place >= len(self._window):
            if self._samples is None:
                self._open(self.position.start)
                self._fill()
            elif self._window:
                self._advance(start=self.position.start + len(self._window))
                self._fill()
            else:
                empty += self.position.start == 0
                if empty > len(self.shards):
                    raise ValueError(f"shard {self._shard()} and all others of its lane hold no sample")
                self._next_shard()
        sample = self._window[self.position.place]
        self.position = self.position._replace(place=self.position.place + 1)
        return sample

    def _mine(self, epoch: int) -> list[str]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        return [self.shards[index] for index in order[self.number :: self.lanes]]

    def _shard(self) -> str:
        return self._mine(self.position.epoch)[self.position.shard]

    def _open(self, start: int) -> None:
        self._samples = read_samples(self._shard())
        for _ in islice(self._samples, start):
            pass

    def _fill(self) -> None:
        """The window at the position, shuffled; empty behind the end of the shard."""
        if self._samples is None:
            return
        window = list(islice(self._samples, self.window))
        seed = (self.seed, 1, self.position.epoch, self.shards.index(self._shard()), self.position.start)
        order = np.random.default_rng(seed).permutation(len(window))
        self._window = [window[index] for index in order]

    def _advance(self, start: int) -> None:
        self.position = self.position._replace(start=start, place=0)

    def _next_shard(self) -> None:
        epoch, shard = self.position.epoch, self.position.shard + 1
        if shard >= len(self._mine(epoch)):
            epoch, shard = epoch + 1, 0
        self.position = Position(epoch=epoch, shard=shard)
        self._samples, self._window = None, []


class _Watched:
    """A stream that remembers its last 512 bytes: a whole tar ends with zeros."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.tail = (self.tail + content)[-512:]
        return content


def _webdataset() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "shards are read by the package 'webdataset'; install it with: pip install 'glide-fast[shards]'"
        ) from error
    return webdataset
