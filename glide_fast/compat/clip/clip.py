"""Published CLIP models, their pictures and their texts; what CLIP's module of this name offers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glide_fast.compat.clip.model import CLIP, build_model
from glide_fast.download import fetch
from glide_fast.models.clip import PIXEL_MEAN, PIXEL_STD
from glide_fast.models.state_files import read_state
from glide_fast.text.clip_tokenizer import clip_tokenizer

__all__ = ["Preprocess", "available_models", "load", "tokenize"]

ADDRESS = "https://openaipublic.azureedge.net/clip/models"
_MODELS = {
    name: f"{ADDRESS}/{digest}/{file}.pt"
    for name, digest, file in (
        ("RN50", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50"),
        ("RN101", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101"),
        ("RN50x4", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4"),
        ("RN50x16", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16"),
        ("RN50x64", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64"),
        ("ViT-B/32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32"),
        ("ViT-B/16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16"),
        ("ViT-L/14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14"),
        (
            "ViT-L/14@336px",
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
            "ViT-L-14-336px",
        ),
    )
}


@dataclass(frozen=True)
class Preprocess:
    """A PIL picture -> the tensor [3, size, size] that CLIP reads.

    Equal to the original's torchvision pipeline: the short side resized to ``size`` (bicubic), the centre cut
    out, RGB, 0 .. 1, normalised by channel.
    """

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        width, height = image.size
        short = min(width, height)
        sides = [self.size if side == short else int(self.size * side / short) for side in (width, height)]
        if sides != [width, height]:
            image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in sides)
        image = image.crop((left, top, left + self.size, top + self.size)).convert("RGB")
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        return (levels - mean) / deviation


def available_models() -> list[str]:
    """The names of the published models."""
    return list(_MODELS)


def load(
    name: str,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model in eval mode, and what makes pictures ready for it.

    Args:
        name: one of :func:`available_models`, or the path of a state dict or a TorchScript archive.
        device: where it lives; the weights are float32 on the CPU and float16 elsewhere. Default: the GPU if
            there is one.
        jit: accepted with a warning; the model is always the Python one, which gives the same numbers.
        download_root: where the file is kept, instead of in the cache directory.

    Raises:
        RuntimeError: there is no such model or file.
        ValueError: the file holds something else.
    """
    if name in _MODELS:
        folder = None if download_root is None else Path(download_root).expanduser()
        path = fetch(_MODELS[name], sha256=_MODELS[name].split("/")[-2], folder=folder)
    else:
        path = Path(name)
        if not path.is_file():
            raise RuntimeError(f"Model {name} not found; available models = {available_models()}")
    if jit:
        warnings.warn("jit=True has no effect: the model is the Python one", stacklevel=2)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(read_state(path).state).to(device)
    if device.type == "cpu":
        model.float()
    return model, Preprocess(model.config.image_size)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> torch.IntTensor:
    """Tokens [B, context_length], int32: start, text, end, zeros.

    Raises:
        RuntimeError: a text is too long and is not to be cut (``truncate`` keeps the end token).
    """
    tokenizer = clip_tokenizer()
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(result, texts, strict=True):
        tokens = [tokenizer.start_token, *tokenizer.encode(text), tokenizer.end_token]
        if len(tokens) > context_length:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {context_length}")
            tokens = [*tokens[: context_length - 1], tokenizer.end_token]
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return result  # type: ignore[return-value]
