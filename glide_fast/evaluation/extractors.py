"""Who looks at pictures: a CLIP, or FID's Inception network, by name, with what identifies its features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from glide_fast.download import fetch
from glide_fast.evaluation.features import clip_features, spatial_features
from glide_fast.evaluation.inception import WEIGHTS, load_inception
from glide_fast.files import sha256_of
from glide_fast.models import CLIP, PRESETS, CLIPConfig, NoisyCLIP, NoisyCLIPConfig, load_network
from glide_fast.models.checkpoint import files_of, is_name, read_weights
from glide_fast.sampling.pipeline import ASSETS

INCEPTION, EMOJI = "inception", "emoji"
EMBEDDED_JUDGE = ASSETS / "emoji_judge.safetensors"
READING_VERSION = 1  # part of the identity: raise it when pictures are read in another way
BATCH = 32

Rows = NDArray[np.float32]  # one a picture


class PictureFeatures(NamedTuple):
    """Features of N pictures: pooled [N, D]; Inception's also spatial [N, 2023], probabilities [N, 1008]."""

    pooled: Rows
    spatial: Rows | None = None
    probabilities: Rows | None = None

    @classmethod
    def join(cls, parts: Iterable[PictureFeatures]) -> PictureFeatures:
        """The parts one after another, at least one."""
        columns = zip(*parts, strict=True)
        return cls(*(None if rows[0] is None else np.concatenate(rows) for rows in columns))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """``extract`` makes features of pictures uint8 [N, H, W, 3]; equal ``identity``, equal features.

    ``clip`` is the network where it can also read captions.
    """

    name: str
    identity: str
    extract: Callable[[NDArray[np.uint8]], PictureFeatures]
    clip: CLIP | NoisyCLIP | None = None


def find_extractor(name: str, *, device: torch.device | str = "cpu") -> Extractor:
    """By name: "emoji" (the embedded judge), "inception", a CLIP's preset, or a CLIP's file.

    Raises:
        ValueError: it is none of them.
        FileNotFoundError, ConnectionError, OSError: there is no such file, or the download fails.
    """
    if name == INCEPTION:
        return inception_extractor(device=device)
    source = EMBEDDED_JUDGE if name == EMOJI else name
    clips = [key for key, config in PRESETS.items() if isinstance(config, CLIPConfig | NoisyCLIPConfig)]
    if isinstance(source, str) and is_name(source) and source not in clips:
        raise ValueError(
            f"features {name!r} are neither {EMOJI}, {INCEPTION}, one of {', '.join(clips)}, nor a file"
        )
    return clip_extractor(source, device=device)


def clip_extractor(source: str | Path, *, device: torch.device | str = "cpu") -> Extractor:
    """The picture embeddings of a CLIP, noise-aware or not, from a file or by the name of a preset.

    Raises:
        as :func:`glide_fast.models.load_network`; ValueError also for another kind of network.
    """
    if isinstance(read_weights(source).config, NoisyCLIPConfig):
        clip: CLIP | NoisyCLIP = load_network(source, NoisyCLIP)
    else:
        clip = load_network(source, CLIP)
    clip.to(device)
    features = clip_features(clip, batch=BATCH)
    return Extractor(
        name=Path(source).name,
        identity=_identity(device, *(sha256_of(path) for path in files_of(source))),
        extract=lambda pictures: PictureFeatures(features(pictures)),
        clip=clip,
    )


def inception_extractor(path: Path | None = None, *, device: torch.device | str = "cpu") -> Extractor:
    """Pooled and spatial features and probabilities of FID's Inception; see :func:`load_inception`."""
    path = fetch(WEIGHTS.url, sha256=WEIGHTS.sha256) if path is None else path
    network = load_inception(path).to(device)

    @torch.inference_mode()
    def extract(pictures: NDArray[np.uint8]) -> PictureFeatures:
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}; use uint8 [N, H, W, 3]")
        parts = []
        for start in range(0, len(pictures), BATCH):
            part = torch.from_numpy(np.moveaxis(pictures[start : start + BATCH], 3, 1).copy())
            pooled, maps, probabilities = (each.cpu().numpy() for each in network(part.to(device)))
            spatial = spatial_features(maps).astype(np.float32)
            parts.append(PictureFeatures(pooled, spatial, probabilities))
        return PictureFeatures.join(parts)

    return Extractor(name=INCEPTION, identity=_identity(device, sha256_of(path)), extract=extract)


def extract_all(
    extractor: Extractor, chunks: Iterable[NDArray[np.uint8]], count: int, *, progress: bool = False
) -> PictureFeatures:
    """The features of ``count`` pictures that come in chunks."""
    parts = []
    with tqdm(total=count, desc=extractor.name, unit="picture", disable=not progress) as bar:
        for chunk in chunks:
            parts.append(extractor.extract(chunk))
            bar.update(len(chunk))
    return PictureFeatures.join(parts)


def _identity(device: torch.device | str, *weights: str) -> str:
    """A digest of who looks and how; devices round differently."""
    parts = [f"reading {READING_VERSION}", torch.device(device).type, *weights]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
