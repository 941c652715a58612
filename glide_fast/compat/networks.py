"""U-Nets and classifiers with the originals' constructor arguments, over :mod:`glide_fast.models`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_fast.compat.errors import RuleError
from glide_fast.compat.half import convert_module_to_f16, convert_module_to_f32
from glide_fast.models.conditioning import low_res_channels
from glide_fast.models.encoder import EncoderConfig, EncoderUNet, Pool
from glide_fast.models.trunk import Stage, Trunk, UNetConfig
from glide_fast.models.unet import UNet


class CallableStage(Stage):
    """A stage that can be called as the originals' are, ``stage(h, emb)``, ``emb`` before its SiLU."""

    def forward(self, x: Tensor, embedding: Any, *rest: Any) -> Tensor:
        """x [B, C, *space]; with two arguments the embedding gets its SiLU here."""
        return super().forward(x, embedding, *rest) if rest else super().forward(x, F.silu(embedding), None)


class Torso(Trunk):
    """What the originals' networks have in common: their attributes, and half-precision blocks.

    Subclasses may replace ``forward`` by one that calls ``time_embed``, the blocks and ``out`` themselves.
    """

    stage = CallableStage
    input_blocks: nn.ModuleList

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations inside; input and output keep their own."""
        return self.compute_dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.compute_dtype = dtype

    def convert_to_fp16(self) -> None:
        """Make the blocks' convolutions float16."""
        self._apply_to_blocks(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Make the blocks' convolutions float32."""
        self._apply_to_blocks(convert_module_to_f32)

    def remember(self, arguments: Mapping[str, Any]) -> None:
        """Keep the constructor's arguments as attributes, and recompute activations if they say so."""
        for name, value in arguments.items():
            setattr(self, name, value)
        for module in self.modules():
            if isinstance(module, Stage):
                module.recompute = bool(arguments["use_checkpoint"])

    def _apply_to_blocks(self, function: Any) -> None:
        for name in ("input_blocks", "middle_block", "output_blocks"):
            if hasattr(self, name):
                getattr(self, name).apply(function)


class UNetModel(Torso, UNet):
    """A U-Net on pictures of ``in_channels``, class-conditional with ``num_classes``.

    ``attention_resolutions`` are the downsampling rates that have attention; -1 means "not fixed" for
    ``num_head_channels`` and "as num_heads" for ``num_heads_upsample``. ``use_checkpoint`` computes
    activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[1, 2, 3] = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        arguments = own_arguments(locals())
        dtype = torch.float16 if use_fp16 else torch.float32
        super().__init__(_config(arguments), compute_dtype=dtype)
        self.remember(arguments)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [B, in_channels, *space] at timesteps [B], classes y [B] -> [B, out_channels, *space]."""
        self.check_classes(y)
        return super().forward(x, timesteps, labels=y)

    def check_classes(self, y: Tensor | None) -> None:
        """Raise :class:`RuleError` unless classes are given just where the model is conditioned on them."""
        if (y is not None) != (self.config.classes is not None):
            problem = "needs classes y" if y is None else "is not conditioned on classes; leave y out"
            raise RuleError(f"this model {problem}")


class SuperRes(nn.Module):
    """Adds a low-resolution picture to a U-Net, as channels."""

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As the U-Net's, enlarging ``low_res`` [B, in_channels, h, w]."""
        return super().forward(self.with_low_res(x, low_res), timesteps, **kwargs)  # type: ignore[no-any-return]

    def with_low_res(self, x: Tensor, low_res: Tensor | None) -> Tensor:
        """The pictures x [B, C, *space] with the enlarged ``low_res`` as further channels."""
        if low_res is None:
            raise RuleError("this model enlarges a picture; give low_res=")
        return torch.cat([x, low_res_channels(x, low_res)], dim=1)


class SuperResModel(SuperRes, UNetModel):  # type: ignore[misc]
    """A U-Net that enlarges ``low_res``; arguments as :class:`UNetModel`'s."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, in_channels * 2, *args, **kwargs)


class EncoderUNetModel(Torso, EncoderUNet):
    """A classifier of noised pictures; arguments as :class:`UNetModel`'s, ``out_channels`` its classes."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[1, 2, 3] = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: Pool = "adaptive",
    ) -> None:
        arguments = own_arguments(locals())
        config = EncoderConfig(trunk=_config(arguments), pool=pool)
        super().__init__(config, compute_dtype=torch.float16 if use_fp16 else torch.float32)
        self.remember(arguments)


def own_arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments out of its ``locals()``, the heads of the decoder made explicit."""
    arguments = {name: value for name, value in scope.items() if name not in ("self", "__class__")}
    if arguments["num_heads_upsample"] == -1:
        arguments["num_heads_upsample"] = arguments["num_heads"]
    return arguments


def _config(arguments: Mapping[str, Any]) -> UNetConfig:
    head_channels = arguments["num_head_channels"]
    return UNetConfig(
        image_size=arguments["image_size"],
        channels=arguments["model_channels"],
        channel_mult=tuple(arguments["channel_mult"]),
        res_blocks=arguments["num_res_blocks"],
        attention_strides=tuple(arguments["attention_resolutions"]),
        image_channels=arguments["in_channels"],
        out_channels=arguments["out_channels"],
        dims=arguments["dims"],
        head_channels=None if head_channels == -1 else head_channels,
        heads=arguments["num_heads"],
        heads_up=arguments["num_heads_upsample"],
        attention_order="by_role" if arguments["use_new_attention_order"] else "by_head",
        dropout=arguments["dropout"],
        scale_shift_norm=arguments["use_scale_shift_norm"],
        resblock_updown=arguments["resblock_updown"],
        learned_resample=arguments["conv_resample"],
        classes=arguments.get("num_classes"),
    )
