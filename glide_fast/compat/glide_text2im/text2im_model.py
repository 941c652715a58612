"""The text-conditioned U-Nets of glide-text2im: its classes, names and signatures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glide_fast.compat.errors import RuleError
from glide_fast.compat.glide_text2im.unet import Inpaint, SuperRes, SuperResInpaint, UNetModel
from glide_fast.compat.glide_text2im.xf import convert_module_to_f16
from glide_fast.models.conditioning import TextConfig, TextEncoding
from glide_fast.models.layers import Linear
from glide_fast.models.unet import UNet

__all__ = ["InpaintText2ImUNet", "SuperResInpaintText2ImUnet", "SuperResText2ImUNet", "Text2ImUNet"]


class Vocabulary(Protocol):
    """What the model needs of a tokenizer."""

    @property
    def n_vocab(self) -> int: ...


class Text2ImUNet(UNetModel):
    """A U-Net conditioned on ``text_ctx`` tokens through a transformer of width ``xf_width`` (0: no text).

    The remaining arguments are the U-Net's. With ``cache_text_emb`` a prompt is encoded once, until
    :meth:`del_cache`; a change of the mask alone goes unnoticed. ``xf_ar`` adds the layer ``unemb``.
    """

    def __init__(
        self,
        text_ctx: int,
        xf_width: int,
        xf_layers: int,
        xf_heads: int,
        xf_final_ln: bool,
        tokenizer: Vocabulary,
        *args: Any,
        cache_text_emb: bool = False,
        xf_ar: float = 0.0,
        xf_padding: bool = False,
        share_unemb: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs, encoder_channels=xf_width or None)  # type: ignore[misc]
        self.text_ctx, self.xf_width, self.xf_ar, self.xf_padding = text_ctx, xf_width, xf_ar, xf_padding
        self.tokenizer = tokenizer
        self.cache_text_emb = cache_text_emb
        self.cache: dict[str, Tensor] | None = None
        if not xf_width:
            return
        text = TextConfig(
            vocabulary=tokenizer.n_vocab,
            context=text_ctx,
            width=xf_width,
            layers=xf_layers,
            heads=xf_heads,
            final_norm=xf_final_ln,
            padding_embedding=xf_padding,
        )
        self.config = replace(self.config, text=text)
        self.add_text_layers(text, 4 * self.config.channels)
        if xf_ar:
            self.unemb = Linear(xf_width, tokenizer.n_vocab)
            if share_unemb:
                self.unemb.weight = self.token_embedding.weight

    def convert_to_fp16(self) -> None:
        """Make the convolutions and the text's linear layers and tokens float16."""
        super().convert_to_fp16()
        if self.xf_width:
            self.transformer.apply(convert_module_to_f16)
            halved: list[nn.Module] = [self.transformer_proj, self.token_embedding]
            for layer in [*halved, self.unemb] if self.xf_ar else halved:
                layer.to(torch.float16)

    def get_text_emb(self, tokens: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """Tokens [B, S] and their mask -> "xf_proj" [B, 4·channels] and "xf_out" [B, xf_width, S].

        Raises:
            RuleError: there are no tokens, or others than those in the cache.
        """
        if tokens is None:
            raise RuleError("this model reads a text; give tokens=")
        if self.cache_text_emb and self.cache is not None:
            if not bool((tokens == self.cache["tokens"]).all()):
                raise RuleError(
                    f"tokens {tokens.tolist()} are not those in the cache, {self.cache['tokens'].tolist()}; "
                    "call del_cache() before another prompt"
                )
            return self.cache
        text = self.encode_text(tokens.long(), mask, self.compute_dtype)
        outputs = {"xf_proj": text.pooled, "xf_out": text.sequence.transpose(1, 2)}
        if self.cache_text_emb:
            kept = {name: tensor.detach() for name, tensor in outputs.items()}
            self.cache = {"tokens": tokens, **kept}
        return outputs

    def del_cache(self) -> None:
        """Forget the encoded prompt."""
        self.cache = None

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, in_channels, H, W] at timesteps [B], prompts [B, S] -> [B, out_channels, H, W]."""
        text = None
        if self.xf_width:
            encoded = self.get_text_emb(tokens, mask)
            text = TextEncoding(encoded["xf_proj"], encoded["xf_out"].transpose(1, 2))
        return UNet.forward(self, x, timesteps, text=text)


class SuperResText2ImUNet(SuperRes, Text2ImUNet):  # type: ignore[misc]
    """Enlarges ``low_res`` by a text; give ``in_channels`` by keyword."""


class InpaintText2ImUNet(Inpaint, Text2ImUNet):  # type: ignore[misc]
    """Completes a picture by a text; give ``in_channels`` by keyword."""


class SuperResInpaintText2ImUnet(SuperResInpaint, Text2ImUNet):  # type: ignore[misc]
    """Enlarges and completes by a text; give ``in_channels`` by keyword."""
