"""The U-Net of the family: DDPM's, with ADM's blocks and GLIDE's text (arXiv 2105.05233, 2112.10741).

Layout, numbering and parameter names are upstream's; what a model is conditioned on is composed from
:mod:`glide_fast.models.conditioning`. Inside, activations are channels-last from the first layer to the last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.models.blocks import AttentionBlock
from glide_fast.models.conditioning import MaskedImage, TextEncoding, low_res_channels, masked_channels
from glide_fast.models.fused import activated_convolution
from glide_fast.models.layers import CONVOLUTIONS, GroupNorm, is_plain, zeroed
from glide_fast.models.modulation import Timetable, timetable
from glide_fast.models.together import can_be_together, together
from glide_fast.models.trunk import Given, Timed, Trunk, UNetConfig


class OutputLayers(nn.ModuleDict):
    """GroupNorm, SiLU and a 3×3 convolution that starts at zero."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        convolution = CONVOLUTIONS[config.dims](channels, config.out_channels, 3, padding=1)
        super().__init__({"0": GroupNorm(channels, config.norm_groups), "2": zeroed(convolution)})

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, out_channels, H, W]
        return activated_convolution(self["0"], self["2"], x)

    def in_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """self(x.to(dtype)), which makes no map in ``dtype`` where the operation reads x as it is."""
        return activated_convolution(self["0"], self["2"], x, dtype=dtype)


class UNet(Trunk):
    """Predicts the noise (and the variance) of a picture at a timestep.

    ``compute_dtype`` is the dtype of the activations.
    """

    def __init__(self, config: UNetConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, compute_dtype=compute_dtype)
        out = self._add_decoder()
        self.out = OutputLayers(out, config)
        if config.text is not None:
            self.add_text_layers(config.text, 4 * config.channels)

    def _add_decoder(self) -> int:
        """Create ``output_blocks``, which consume the skips from the last; the final channels return."""
        config = self.config
        skips = list(self.skip_channels)
        width = skips[-1]
        heads = config.heads if config.heads_up is None else config.heads_up
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.res_blocks + 1):
                out = int(multiple * config.channels)
                stage = self.stage([self.res_block(width + skips.pop(), out)])
                if 2**level in config.attention_strides:
                    stage.append(self.attention(out, heads))
                if level and block == config.res_blocks:
                    stage.append(self.resampling(out, "up"))
                self.output_blocks.append(stage)
                width = out
        return width

    def text(self, tokens: Tensor, mask: Tensor | None = None) -> TextEncoding:
        """Encode tokens [B, S] (mask [B, S]: true where a token is) once, for any number of steps."""
        if self.config.text is None:
            raise ValueError("this model is not conditioned on text; leave tokens out")
        text = self.encode_text(tokens, mask, self.compute_dtype)
        if tokens.device.type == "cpu":  # whose packed weights keep theirs
            return text
        if not torch.is_grad_enabled():
            return text._replace(projections=self.projections(text.sequence))
        again = any(stage.recompute for stage in self.stages())
        if again or not can_be_together([block.encoder_kv for block in self._readers()]):
            return text
        return text._replace(projections=self.projections_together(text.sequence))

    def projections(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """What the attention blocks read of an encoded text [B, S, width]: [B, S, 2·C] each."""
        return tuple(block.encoder_kv(sequence) for block in self._readers() if block.encoder_kv is not None)

    def projections_together(self, sequence: Tensor) -> tuple[Tensor, ...]:
        """The same by one product, for training."""
        layers: list[Any] = [block.encoder_kv for block in self._readers()]
        return torch.split(together(sequence, layers), [len(layer.bias) for layer in layers], dim=-1)

    def timetable(
        self, timesteps: Tensor, *, text: TextEncoding | None = None, labels: Tensor | None = None
    ) -> Timetable | None:
        """What the blocks read of a sampler's timesteps [S] and the text or labels of B pictures.

        Worth making on a CPU, for all steps of a sampler at once. None where :func:`~glide_fast.models.
        modulation.timetable` makes none.
        """
        embeddings = self.embed(timesteps)[:, None]  # [S, 1, E]
        if labels is not None:
            embeddings = embeddings + self.label_emb(labels)
        if text is not None:
            embeddings = embeddings + text.pooled.to(embeddings.dtype)
        return timetable(self.residual_blocks(), timesteps, F.silu(embeddings))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        text: TextEncoding | None = None,
        low_res: Tensor | None = None,
        known: MaskedImage | None = None,
        labels: Tensor | None = None,
        timetable: Timetable | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            x: noised pictures [B, 3, H, W]; H and W divisible by 2**(levels - 1).
            timesteps: [B], or [1] for all, integer or float, as in the training schedule.
            tokens, mask: the prompts [B, S]; or ``text``, the same already encoded.
            low_res: [B, 3, h, w] in [-1, 1], for upsamplers.
            known: the known part of the picture, for inpainting models; None = nothing is known.
            labels: class indices [B], for class-conditional models.
            timetable: what :meth:`timetable` made of this text or these labels; used where it has the
                timestep.

        Returns:
            [B, out_channels, H, W] in the dtype of ``x``: the noise, then the variance where it is learned.

        Raises:
            ValueError: a condition is missing, given twice, or not one of this model, or a shape does not
                fit.
        """
        self.check_inputs(x, timesteps)
        self._check_conditions(tokens, text, low_res, known, labels)
        if tokens is not None:
            text = self.text(tokens, mask)
        made = None if timetable is None else timetable.at(timesteps)
        if made is not None:
            blocks = zip(self.residual_blocks(), made, strict=True)
            given: Timed = {
                block: torch.split(each.to(self.compute_dtype), block.modulation_widths, dim=1)
                for block, each in blocks
            }
        else:
            embedding = self.embed(timesteps, labels)
            if text is not None:
                embedding = embedding + text.pooled.to(embedding.dtype)
            given = self.modulations(F.silu(embedding))
        h = self._input(x, low_res, known)
        h = self._body(h, given, self._read(text))
        plain = is_plain(self.out, OutputLayers.forward)
        out: Tensor = self.out.in_dtype(h, x.dtype) if plain else self.out(h.to(x.dtype))
        return out.contiguous()

    def _input(self, x: Tensor, low_res: Tensor | None, known: MaskedImage | None) -> Tensor:
        pictures = [x]
        if self.config.inpaint:
            pictures.append(masked_channels(x, known))
        if low_res is not None:
            pictures.append(low_res_channels(x, low_res))
        return torch.cat(pictures, dim=1)

    def _read(self, text: TextEncoding | None) -> Given | None:
        """What the blocks are given of the text."""
        if text is None or not text.projections:
            return None if text is None else text.sequence
        return dict(zip(self._readers(), text.projections, strict=True))

    def _readers(self) -> list[AttentionBlock]:
        """The blocks that read the text."""
        layers = (layer for stage in self.stages() for layer in stage)
        return [
            layer for layer in layers if isinstance(layer, AttentionBlock) and layer.encoder_kv is not None
        ]

    def _body(self, h: Tensor, embedding: Timed, text: Given | None) -> Tensor:
        *skips, h = self.encode(h, embedding, text)
        for stage in self.output_blocks:
            h = stage(h, embedding, text, skips.pop())
        return h

    def _check_conditions(
        self,
        tokens: Tensor | None,
        text: TextEncoding | None,
        low_res: Tensor | None,
        known: MaskedImage | None,
        labels: Tensor | None,
    ) -> None:
        config = self.config
        if tokens is not None and text is not None:
            raise ValueError("tokens and text are both given; give the prompt once, as tokens or encoded")
        given = {
            "text": tokens is not None or text is not None,
            "low_res": low_res is not None,
            "labels": labels is not None,
        }
        needed = {
            "text": config.text is not None,
            "low_res": config.low_res,
            "labels": config.classes is not None,
        }
        for name, is_needed in needed.items():
            if given[name] != is_needed:
                problem = "needs" if is_needed else "is not conditioned on"
                raise ValueError(f"this model {problem} {name}; {'give' if is_needed else 'leave out'} it")
        if known is not None and not config.inpaint:
            raise ValueError("this model is not conditioned on a masked picture; leave known out")
