"""Features of pictures, [N, D]: what every metric of :mod:`glide_fast.evaluation` is a function of.

Any callable from pictures to features will do; ours are the embeddings of a CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from glide_fast.data.images import to_tensor
from glide_fast.models.clip import CLIP
from glide_fast.models.noisy_clip import NoisyCLIP
from glide_fast.sampling.gradients import clip_pixels
from glide_fast.text.framing import framed

Features: TypeAlias = NDArray[np.float64]  # [N, D]
FeatureFunction: TypeAlias = Callable[
    [NDArray[np.uint8]], NDArray[np.float32]
]  # pictures [N, H, W, 3] -> [N, D]

OPENAI_SPATIAL_CHANNELS = 7


def clip_features(clip: CLIP | NoisyCLIP, *, batch: int = 64, progress: bool = False) -> FeatureFunction:
    """The embeddings of a CLIP's picture tower: uint8 [N, H, W, 3] -> float32 [N, embedding], of any length.

    Square pictures of any size are resized to CLIP's with an antialiased bicubic filter (to a noise-aware
    CLIP's, which reads them at timestep 0, by averaging where they are larger), and read ``batch`` at a time
    on the device of the weights. The function made raises ValueError for other pictures.

    Raises:
        ValueError: ``batch`` is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1 picture")

    @torch.inference_mode()
    def features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        _check_pictures(pictures)
        device, was_training = next(clip.parameters()).device, clip.training
        found = np.empty((len(pictures), clip.config.embedding), dtype=np.float32)
        clip.eval()
        try:
            for start in tqdm(
                range(0, len(pictures), batch), desc="features", unit="batch", disable=not progress
            ):
                part = to_tensor(pictures[start : start + batch]).to(device)
                found[start : start + batch] = _embeddings(clip, part).float().cpu().numpy()
        finally:
            clip.train(was_training)
        return found

    return features


@torch.inference_mode()
def clip_captions(clip: CLIP | NoisyCLIP, captions: Sequence[str], *, batch: int = 64) -> NDArray[np.float32]:
    """The embeddings of a CLIP's text tower: float32 [M, embedding], of any length."""
    tokenizer = clip.config.tokenizer if isinstance(clip, NoisyCLIP) else "clip"
    device = next(clip.parameters()).device
    found = np.empty((len(captions), clip.config.embedding), dtype=np.float32)
    for start in range(0, len(captions), batch):
        framed_part = framed(tokenizer, captions[start : start + batch], clip.config.context)
        tokens, lengths = (part.to(device) for part in framed_part)
        if isinstance(clip, NoisyCLIP):
            embeddings = clip.text_encoder(tokens, lengths)
        else:
            embeddings = clip.encode_text(tokens)
        found[start : start + batch] = embeddings.float().cpu().numpy()
    return found


def spatial_features(maps: ArrayLike, *, channels: int = OPENAI_SPATIAL_CHANNELS) -> Features:
    """The first ``channels`` of feature maps [N, C, H, W] as features [N, H * W * channels] for sFID.

    Their Fréchet distance is sFID (Nash et al. 2021, arXiv 2103.03841), which sees where things are. OpenAI
    takes 7 channels of Inception's 17 x 17 maps, in the order rows, columns, channels, as here.

    Raises:
        ValueError: the maps have another shape or fewer channels.
    """
    found = np.asarray(maps, dtype=np.float64)
    if found.ndim != 4 or not 1 <= channels <= found.shape[1]:
        raise ValueError(
            f"maps are {list(found.shape)}; they must be [N, C >= {channels}, H, W], channels >= 1"
        )
    return np.ascontiguousarray(np.moveaxis(found[:, :channels], 1, 3)).reshape(len(found), -1)


def checked(features: ArrayLike, name: str, *, least: int = 1) -> Features:
    """The features as finite float64 [N >= least, D >= 1]; ``name`` is the argument's, for the errors.

    Raises:
        ValueError: another shape, fewer rows, or values that are not finite.
    """
    found = np.asarray(features, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] == 0:
        raise ValueError(f"{name} are {list(found.shape)}; features are [N, D], one row a picture")
    if len(found) < least:
        raise ValueError(f"{name} have {len(found)} rows, this needs at least {least}; give more pictures")
    broken = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{name} are not finite in {len(broken)} of {len(found)} rows, first in row {broken[0]}; "
            "compute features in float32 and leave out pictures that have none"
        )
    return found


def check_widths(first: int, first_name: str, second: int, second_name: str) -> None:
    """Raise ValueError unless the numbers of features are equal."""
    if first != second:
        raise ValueError(
            f"{first_name} have {first} features and {second_name} {second}; "
            "take both from the same feature function"
        )


def _embeddings(clip: CLIP | NoisyCLIP, pictures: Tensor) -> Tensor:
    """Of pictures [B, 3, H, W] in [-1, 1]: [B, embedding]."""
    size = clip.config.image_size
    if isinstance(clip, CLIP):
        return clip.encode_image(clip_pixels(pictures, size))
    if pictures.shape[-1] >= size:
        pictures = F.adaptive_avg_pool2d(pictures, size)
    else:
        pictures = F.interpolate(pictures, size=(size, size), mode="bicubic")
    clean = torch.zeros(len(pictures), dtype=torch.int64, device=pictures.device)
    embeddings: Tensor = clip.image_encoder(pictures, clean if clip.config.timesteps else None)
    return embeddings


def _check_pictures(pictures: NDArray[np.uint8]) -> None:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {list(pictures.shape)}; use uint8 [N, H, W, 3]")
    height, width = pictures.shape[1:3]
    if height != width:
        raise ValueError(
            f"pictures are {height} x {width}; CLIP reads squares: crop them "
            "with glide_fast.data.images.center_square"
        )
