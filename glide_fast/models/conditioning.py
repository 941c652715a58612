"""What a U-Net can be conditioned on besides the timestep: text, a low-resolution picture, a masked picture.

Text becomes a vector added to the timestep embedding and a sequence that every attention block reads;
pictures become extra input channels (GLIDE, arXiv 2112.10741, sections 3.1, 3.2 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.models.layer_norm import LayerNorm
from glide_fast.models.layers import Linear
from glide_fast.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text transformer, which reads ``context`` tokens of the ``vocabulary`` that ``tokenizer`` has."""

    tokenizer: str = "glide"
    vocabulary: int = 50257
    context: int = 128
    width: int = 512
    layers: int = 16
    heads: int = 8
    final_norm: bool = True
    padding_embedding: bool = True


class TextEncoding(NamedTuple):
    """A prompt as the U-Net reads it.

    ``pooled`` [B, E] joins the timestep embedding, ``sequence`` [B, S, width] the attention; ``projections``,
    where there are any, are the keys and values [B, S, 2·C] that each attention block makes of the sequence.
    """

    pooled: Tensor
    sequence: Tensor
    projections: tuple[Tensor, ...] = ()


class MaskedImage(NamedTuple):
    """A picture [B, 3, H, W] in [-1, 1] and the mask [B, 1, H, W] of what is known (1 known, 0 to paint)."""

    image: Tensor
    mask: Tensor


class TextConditioned(nn.Module):
    """The text layers of a model, at its top level as in upstream's checkpoints."""

    def add_text_layers(self, config: TextConfig, embedding_channels: int) -> None:
        """Create the transformer and its embeddings; the pooled text gets ``embedding_channels``."""
        width = config.width
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, width))
        if config.padding_embedding:
            self.padding_embedding = nn.Parameter(0.01 * torch.randn(config.context, width))
        self.transformer = Transformer(width, config.layers, config.heads)
        self.final_ln = LayerNorm(width) if config.final_norm else nn.Identity()
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer_proj = Linear(width, embedding_channels)

    def encode_text(self, tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> TextEncoding:
        """Encode tokens [B, S] with their mask [B, S] (true at a token); ``dtype`` is the transformer's.

        The pooled text is the last position, padded or not.
        """
        context = self.positional_embedding.shape[0]
        if tokens.shape[-1] != context:
            raise ValueError(
                f"tokens have length {tokens.shape[-1]}, the model's context is {context}; pad or cut to it"
            )
        x = self.token_embedding(tokens) + self.positional_embedding
        if hasattr(self, "padding_embedding"):
            if mask is None:
                raise ValueError("this model has a padding embedding and needs the tokens' mask; give mask=")
            x = torch.where(mask[..., None], x, self.padding_embedding)
        sequence = self.final_ln(self.transformer(x.to(dtype)))
        return TextEncoding(self.transformer_proj(sequence[:, -1]), sequence)


def low_res_channels(x: Tensor, low_res: Tensor) -> Tensor:
    """``low_res`` [B, 3, h, w] enlarged bilinearly to the size of ``x`` [B, 3, H, W]."""
    return F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False)


def masked_channels(x: Tensor, known: MaskedImage | None) -> Tensor:
    """The known pixels of a picture and their mask [B, 4, H, W]; all zero where nothing is known."""
    if known is None:
        return x.new_zeros(x.shape[0], 4, *x.shape[2:])
    return torch.cat([known.image * known.mask, known.mask], dim=1)
