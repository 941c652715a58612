"""The towers of GLIDE's noise-aware CLIP; what glide-text2im's module of this name offers.

They are those of :mod:`glide_fast.models.noisy_clip`; pictures come in levels from 0 to 255.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glide_fast.models import noisy_clip
from glide_fast.models.noisy_clip import NoisyCLIPConfig

__all__ = ["ImageEncoder", "TextEncoder"]

Device = torch.device | str | None


def default_device() -> torch.device:
    """The device of a ``torch.device`` context, else the GPU where there is one."""
    current = torch.get_default_device()
    return torch.device("cuda") if current.type == "cpu" and torch.cuda.is_available() else current


def _config(n_embd: int, **fields: Any) -> NoisyCLIPConfig:
    """A config of one tower; what describes the other is the smallest there is."""
    smallest: dict[str, Any] = {"image_size": 1, "patch_size": 1}
    for tower in ("image", "text"):
        smallest |= {f"{tower}_heads": 1, f"{tower}_head_channels": 1, f"{tower}_layers": 1}
    return NoisyCLIPConfig(embedding=n_embd, **(smallest | fields))


class TextEncoder(noisy_clip.TextEncoder):
    """Tokens [B, max_text_len] and their number in each text [B] -> embeddings [B, n_embd]."""

    def __init__(
        self,
        n_bpe_vocab: int,
        max_text_len: int,
        n_embd: int,
        n_head: int,
        n_xf_blocks: int,
        n_head_state: int = 64,
        device: Device = None,
    ) -> None:
        config = _config(
            n_embd,
            vocabulary=n_bpe_vocab,
            context=max_text_len,
            text_heads=n_head,
            text_head_channels=n_head_state,
            text_layers=n_xf_blocks,
        )
        device = default_device() if device is None else torch.device(device)
        with device:
            super().__init__(config)
        self.device = device
        self.n_bpe_vocab, self.max_text_len, self.n_embd = n_bpe_vocab, max_text_len, n_embd
        self.n_head, self.n_xf_blocks, self.n_head_state = n_head, n_xf_blocks, n_head_state
        self.n_state = n_head * n_head_state

    def forward(self, text: Tensor, text_len: Tensor, return_probe_features: bool = False) -> Tensor:
        """With ``return_probe_features``, the last token [B, n_state] before its projection."""
        if return_probe_features:
            return self.features(text, text_len)
        return super().forward(text, text_len)


class ImageEncoder(noisy_clip.PictureEncoder):
    """Pictures [B, 3, H, W] in 0 .. 255 at timesteps [B] -> embeddings [B, n_embd].

    With ``n_timestep`` 0 it knows no timesteps, and a learned token takes their place.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        n_embd: int,
        n_head: int,
        n_xf_blocks: int,
        n_head_state: int = 64,
        n_timestep: int = 0,
        device: Device = None,
    ) -> None:
        config = _config(
            n_embd,
            image_size=image_size,
            patch_size=patch_size,
            image_heads=n_head,
            image_head_channels=n_head_state,
            image_layers=n_xf_blocks,
            timesteps=n_timestep,
        )
        device = default_device() if device is None else torch.device(device)
        with device:
            super().__init__(config)
        self.device = device
        self.image_size, self.patch_size, self.n_embd = image_size, patch_size, n_embd
        self.n_head, self.n_xf_blocks, self.n_head_state = n_head, n_xf_blocks, n_head_state
        self.n_timestep, self.n_state = n_timestep, n_head * n_head_state
        self.n_context = 1 + (image_size // patch_size) ** 2

    def forward(
        self, image: Tensor, timesteps: Tensor | None = None, return_probe_features: bool = False
    ) -> Tensor:
        """With ``return_probe_features``, the first token [B, n_state] before its projection."""
        x = image / 127.5 - 1
        if return_probe_features:
            return self.features(x, timesteps)
        return super().forward(x, timesteps)
