"""Pictures out of a picture: its unknown part painted, a variation of it, a larger one.

GLIDE's inpainting (arXiv 2112.10741, section 3.4), SDEdit (arXiv 2108.01073) and upsampling by diffusion,
each of one picture, uint8 [H, W, 3], with any number of prompts; a prompt may be "".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from glide_fast.data.images import to_tensor, to_uint8
from glide_fast.models import LoadedModel, MaskedImage
from glide_fast.sampling.denoiser import PerImageNoise
from glide_fast.sampling.pipeline import (
    BASE_OPTIONS,
    UPSAMPLER_OPTIONS,
    StageOptions,
    Start,
    TextToImage,
    sample_stage,
)

STRENGTH = 0.5


def inpaint(
    model: TextToImage,
    picture: NDArray[np.uint8],
    known: NDArray[np.bool_],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    base_options: StageOptions = BASE_OPTIONS,
    upsampler_options: StageOptions = UPSAMPLER_OPTIONS,
    progress: bool = False,
) -> NDArray[np.uint8]:
    """Paint what is not ``known`` [H, W] of the picture [H, W, 3], once a prompt and seed.

    The pictures are uint8 [B, H, W, 3], and known pixels come back exactly. An inpainting model sees them;
    another only has them pasted into each of its guesses, and joins the rest to them less well.

    Raises:
        ValueError: the picture is not of the model's size, the mask not of the picture's, or everything or
            nothing is known; or as :class:`TextToImage`.
    """
    _check_size(picture, model.size)
    if known.shape != picture.shape[:2] or known.dtype != np.bool_:
        raise ValueError(
            f"mask is {known.dtype} {list(known.shape)}; it must be bool {list(picture.shape[:2])}, as the "
            "picture is: true where that is known"
        )
    if known.all() or not known.any():
        everything = "everything" if known.all() else "nothing"
        rest = "nothing to paint" if known.all() else "no picture to complete"
        raise ValueError(f"{everything} is known by the mask, so there is {rest}; mark a part of the picture")
    masked = MaskedImage(to_tensor(picture)[None], torch.from_numpy(known).float()[None, None])
    return model(
        prompts,
        seeds=seeds,
        base_options=base_options,
        upsampler_options=upsampler_options,
        known=masked,
        progress=progress,
    )


def vary(
    model: TextToImage,
    picture: NDArray[np.uint8],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    strength: float = STRENGTH,
    base_options: StageOptions = BASE_OPTIONS,
    upsampler_options: StageOptions = UPSAMPLER_OPTIONS,
    progress: bool = False,
) -> NDArray[np.uint8]:
    """Variations of the picture [H, W, 3], one a prompt and seed: uint8 [B, H, W, 3].

    ``strength`` is the share of the base model's steps that changes the picture: 1 leaves next to nothing of
    it, 0.5 its layout. An upsampler enlarges the variation, so that finer details are always its own.

    Raises:
        ValueError: the picture is not of the model's size, or the strength leaves fewer than 2 steps or more
            than all; or as :class:`TextToImage`.
    """
    _check_size(picture, model.size)
    return model(
        prompts,
        seeds=seeds,
        base_options=base_options,
        upsampler_options=upsampler_options,
        start=Start(to_tensor(picture)[None], strength),
        progress=progress,
    )


def upscale(
    upsampler: LoadedModel,
    picture: NDArray[np.uint8],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    options: StageOptions = UPSAMPLER_OPTIONS,
    progress: bool = False,
) -> NDArray[np.uint8]:
    """The picture [h, w, 3] enlarged to the upsampler's size, once a prompt and seed: uint8 [B, H, W, 3].

    The upsampler does best on the size that it learned from: 32 px for the embedded one, 64 for GLIDE's.

    Raises:
        ValueError: the model is no upsampler, the picture is no square whose side divides the model's size
            and is smaller, prompts and seeds differ in number, or an option is out of range.
    """
    size = upsampler.config.unet.image_size
    if not upsampler.config.unet.low_res:
        raise ValueError("this model enlarges nothing; choose an upsampler")
    height, width = _checked(picture).shape[:2]
    if height != width or height >= size or size % height:
        sides = [side for side in range(1, size) if size % side == 0]
        nearest = min(sides, key=lambda side: abs(side - min(height, width)))
        raise ValueError(
            f"picture is {width} x {height} px; this upsampler enlarges squares to {size} px whose side "
            f"divides that: crop and resize the picture to {nearest} x {nearest}"
        )
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed a prompt, at least one"
        )
    low_res = to_tensor(picture).expand(len(prompts), -1, -1, -1)
    noise = PerImageNoise(seeds)
    return to_uint8(
        sample_stage(upsampler, prompts, noise=noise, options=options, low_res=low_res, progress=progress)
    )


def _check_size(picture: NDArray[np.uint8], size: int) -> None:
    height, width = _checked(picture).shape[:2]
    if height != size or width != size:
        raise ValueError(
            f"picture is {width} x {height} px, this model paints {size} x {size}; crop and resize it "
            "(glide_fast.data.images.center_square, or --fit on the command line)"
        )


def _checked(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} {list(picture.shape)}; it must be uint8 [H, W, 3]")
    return picture
