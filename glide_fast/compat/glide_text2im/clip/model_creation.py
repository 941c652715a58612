"""GLIDE's noise-aware CLIP as one object; what glide-text2im's module of this name offers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from glide_fast.compat.clip_tokens import SimpleTokenizer
from glide_fast.compat.glide_text2im.clip.encoders import ImageEncoder, TextEncoder, default_device

__all__ = ["CLIPModel", "create_clip_model", "default_config_path"]


TEXT_FIELDS = {  # arguments of the tower, and the file's names for them
    "n_bpe_vocab": "n_vocab",
    "max_text_len": "max_text_len",
    "n_embd": "n_embd",
    "n_head": "n_head_text",
    "n_xf_blocks": "n_xf_blocks_text",
    "n_head_state": "n_head_state_text",
}
IMAGE_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "n_embd": "n_embd",
    "n_head": "n_head_image",
    "n_xf_blocks": "n_xf_blocks_image",
    "n_head_state": "n_head_state_image",
    "n_timestep": "n_timesteps",
}


def default_config_path() -> str:
    """The path of the published model's configuration."""
    return str(resources.files("glide_fast") / "assets" / "glide_clip.yaml")


@dataclass(eq=False)
class CLIPModel:
    """Both towers, the logarithm of their temperature, and a tokenizer."""

    config: dict[str, Any]
    text_encoder: nn.Module
    image_encoder: nn.Module
    logit_scale: Tensor
    device: torch.device
    tokenizer: SimpleTokenizer

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, max_text_len] and their number in each text [B], int64."""
        context: Any = self.text_encoder.max_text_len
        rows = [
            self.tokenizer.padded_tokens_and_len(self.tokenizer.encode(prompt), context) for prompt in prompts
        ]
        tokens, lengths = (torch.tensor(column, device=self.device) for column in zip(*rows, strict=True))
        return tokens, lengths

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, n_embd] of texts."""
        return nn.functional.normalize(self.text_encoder(*self.encode_prompts(prompts)), dim=-1)

    def image_embeddings(self, images: Tensor, t: Tensor) -> Tensor:
        """Unit vectors [B, n_embd] of noised pictures [B, 3, H, W] in [-1, 1] at timesteps [B]."""
        return nn.functional.normalize(self.image_encoder((images + 1) * 127.5, t), dim=-1)

    def cond_fn(self, prompts: Sequence[str], grad_scale: float) -> Callable[..., Tensor]:
        """What guides a sampler to the prompts, one a picture: (x, t) -> the gradient by x, times a scale."""
        with torch.no_grad():
            texts = self.text_embeddings(prompts)

        def gradient(x: Tensor, t: Tensor, grad_scale: float = grad_scale, **_conditions: Any) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                similarity = self.logit_scale.exp() * (texts * self.image_embeddings(x, t)).sum()
                return torch.autograd.grad(similarity, x)[0] * grad_scale

        return gradient


def create_clip_model(
    config_path: str | None = None,
    device: torch.device | str | None = None,
    tokenizer: SimpleTokenizer | None = None,
) -> CLIPModel:
    """A model with random weights, as the YAML file says; the published model's shape without one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or lacks a field.
    """
    path = Path(config_path or default_config_path())
    device = default_device() if device is None else torch.device(device)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        text = {argument: config[field] for argument, field in TEXT_FIELDS.items()}
        image = {argument: config[field] for argument, field in IMAGE_FIELDS.items()}
        logit_scale = torch.tensor(math.log(config["logit_scale"]), device=device)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe GLIDE's CLIP; it has no {error}") from None
    return CLIPModel(
        config=config,
        text_encoder=TextEncoder(**text, device=device),
        image_encoder=ImageEncoder(**image, device=device),
        logit_scale=logit_scale,
        device=device,
        tokenizer=SimpleTokenizer() if tokenizer is None else tokenizer,
    )
