"""Classes of pictures, where the data has any: an emoji's skin tone, or the folder a picture is in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from glide_fast.data.dataset import CaptionedPictures
from glide_fast.data.emoji_captions import SKIN_TONES, skin_tone

EMOJI_CLASSES = ("no skin tone, or two", *SKIN_TONES)


def labelled(pictures: CaptionedPictures, source: str) -> tuple[CaptionedPictures, tuple[str, ...]]:
    """The pictures of a data set with labels, and the names of the classes that these are indices of.

    The classes of ``source`` "emoji" are ``EMOJI_CLASSES``; those of a folder its sub-folders, in order of
    name. Pictures that have labels keep them.

    Raises:
        ValueError: a picture lies in no sub-folder; names it.
    """
    if pictures.labels is not None:
        return pictures, tuple(map(str, range(int(pictures.labels.max()) + 1)))
    if source == "emoji":
        tones = [skin_tone(caption) for caption in pictures.captions]
        labels = [0 if tone is None else 1 + SKIN_TONES.index(tone) for tone in tones]
        return replace(pictures, labels=np.array(labels, dtype=np.int64)), EMOJI_CLASSES
    folders = [PurePosixPath(name).parts[:-1] for name in pictures.names]
    loose = [name for name, parts in zip(pictures.names, folders, strict=True) if not parts]
    if loose:
        raise ValueError(
            f"{loose[0]!r} and {len(loose) - 1} more pictures of {source!r} have no class; put those of each "
            "class in a sub-folder of its own"
        )
    names = sorted({parts[0] for parts in folders})
    labels = [names.index(parts[0]) for parts in folders]
    return replace(pictures, labels=np.array(labels, dtype=np.int64)), tuple(names)
