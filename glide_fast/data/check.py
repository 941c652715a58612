"""Look through a folder of captioned pictures before a training run does: every picture is decoded."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from glide_fast.data.folder import FolderListing, list_folder
from glide_fast.data.images import load_image
from glide_fast.text.tokenizer import Tokenizer, embedded_tokenizer

__all__ = ["DEFAULT_CONTEXT", "Report", "check"]

DEFAULT_CONTEXT = 24
SHOWN = 10
SIDE_LIMITS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``check`` found; ``str(report)`` is the text for a person, ``ok``: whether training can start."""

    path: str
    size: int  # pixels: smaller pictures would be enlarged
    context: int  # tokens: longer captions would be cut
    pictures: list[str]
    captions: dict[str, str]
    missing_captions: list[str]
    captions_without_picture: list[str]
    broken: dict[str, str]  # picture name -> reason
    problems: list[str]  # unreadable tables, rows and text files
    too_small: dict[str, tuple[int, int]] = field(default_factory=dict)  # picture name -> (width, height)
    duplicates: list[list[str]] = field(default_factory=list)  # names of pictures with equal pixels
    shorter_sides: dict[str, int] = field(default_factory=dict)  # range of the shorter side -> pictures
    token_counts: dict[str, int] = field(default_factory=dict)  # picture name -> tokens of its caption

    @property
    def usable(self) -> int:
        """Number of readable pictures with a caption."""
        return sum(name not in self.broken for name in self.captions)

    @property
    def over_long(self) -> dict[str, int]:
        """The captions of more than ``context`` tokens: picture name -> tokens."""
        return {name: count for name, count in self.token_counts.items() if count > self.context}

    @property
    def ok(self) -> bool:
        """True when every picture is readable and captioned, and every caption has its picture."""
        faults = (self.missing_captions, self.captions_without_picture, self.broken, self.problems)
        return self.usable > 0 and not any(faults)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {len(self.pictures)} pictures, {len(self.captions)} captions, "
            f"{self.usable} usable for training"
        ]
        if self.shorter_sides:
            sides = ", ".join(f"{sides}: {count}" for sides, count in self.shorter_sides.items())
            lines.append(f"shorter side in pixels: {sides}")
        if self.token_counts:
            counts = np.array(list(self.token_counts.values()))
            lines.append(
                f"tokens a caption: median {np.median(counts):.0f}, "
                f"99 % up to {np.percentile(counts, 99):.0f}, longest {counts.max()}"
            )
        lines += _section(
            "cannot be read (skipped in training)", [f"{n}: {why}" for n, why in self.broken.items()]
        )
        lines += _section("without a caption (skipped in training)", self.missing_captions)
        lines += _section("captions without a picture", self.captions_without_picture)
        lines += _section("captions that cannot be read", self.problems)
        small = [f"{name}: {width}x{height}" for name, (width, height) in self.too_small.items()]
        lines += _section(f"smaller than {self.size} pixels (enlarged in training)", small)
        lines += _section("the same picture twice", [" = ".join(names) for names in self.duplicates])
        long = [f"{name}: {count} tokens: {self.captions[name]!r}" for name, count in self.over_long.items()]
        lines += _section(f"captions of more than {self.context} tokens (cut in training)", long)
        lines.append("ready for training" if self.ok else "not ready: mend what is listed above")
        return "\n".join(lines)


def check(
    path: str | os.PathLike[str],
    *,
    size: int = 64,
    context: int = DEFAULT_CONTEXT,
    tokenizer: Tokenizer | None = None,
) -> Report:
    """Read a folder as ``load_folder`` would and report all that is wrong with it.

    ``size`` in pixels and ``context`` in tokens are those of the model to be trained; without a
    ``tokenizer`` the embedded model's counts the tokens. Raises FileNotFoundError when there is no such
    folder.
    """
    listing = list_folder(path)
    tokenizer = tokenizer or embedded_tokenizer()
    broken: dict[str, str] = {}
    dimensions: dict[str, tuple[int, int]] = {}
    same: dict[bytes, list[str]] = {}
    for name in listing.pictures:
        try:
            image = load_image(listing.folder / name)
        except ValueError as error:
            broken[name] = str(error.__cause__ or error)
            continue
        dimensions[name] = (image.shape[1], image.shape[0])
        same.setdefault(_digest(image), []).append(name)
    return Report(
        path=os.fspath(path),
        size=size,
        context=context,
        pictures=listing.pictures,
        captions=listing.captions,
        missing_captions=listing.missing_captions,
        captions_without_picture=listing.captions_without_picture,
        broken=broken,
        problems=listing.problems,
        too_small={name: sides for name, sides in dimensions.items() if min(sides) < size},
        duplicates=[names for names in same.values() if len(names) > 1],
        shorter_sides=_histogram([min(sides) for sides in dimensions.values()]),
        token_counts=_token_counts(listing, tokenizer),
    )


def _token_counts(listing: FolderListing, tokenizer: Tokenizer) -> dict[str, int]:
    return {name: len(tokenizer.encode(caption)) for name, caption in listing.captions.items()}


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def _histogram(sides: Sequence[int]) -> dict[str, int]:
    counts = Counter(int(np.searchsorted(SIDE_LIMITS, side, side="right")) for side in sides)
    lower, upper = ("0", *map(str, SIDE_LIMITS)), (*(str(limit - 1) for limit in SIDE_LIMITS), "")
    return {f"{lower[index]}-{upper[index]}": counts[index] for index in sorted(counts)}


def _section(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries[:SHOWN]), *more]
