"""CLIP's network; what CLIP's module of this name offers, over :mod:`glide_fast.models.clip`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from glide_fast.models import clip
from glide_fast.models.clip import ClipAttention, CLIPConfig, ClipTransformer, VisionTransformerConfig
from glide_fast.models.resnet import STRIDE, ResNetConfig

__all__ = ["CLIP", "build_model", "convert_weights"]

BUFFERS = ("input_resolution", "context_length", "vocab_size")  # numbers that the published files carry


class CLIP(clip.CLIP):
    """Both towers; four ``vision_layers`` make a ResNet, one number a vision transformer.

    The activations have the dtype of the weights, ``dtype``; pictures of another are cast at the door. Those
    who call ``transformer`` or its blocks themselves give them tokens as the original's take them, [T, B, C].
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: Sequence[int] | int,
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
    ) -> None:
        vision: ResNetConfig | VisionTransformerConfig
        if isinstance(vision_layers, int):
            if vision_patch_size is None:
                raise ValueError("a vision transformer reads patches; give vision_patch_size")
            vision = VisionTransformerConfig(
                width=vision_width, layers=vision_layers, patch_size=vision_patch_size
            )
        else:
            first, second, third, fourth = vision_layers
            vision = ResNetConfig(width=vision_width, layers=(first, second, third, fourth))
        config = CLIPConfig(
            embedding=embed_dim,
            image_size=image_resolution,
            vision=vision,
            width=transformer_width,
            layers=transformer_layers,
            heads=transformer_heads,
            context=context_length,
            vocabulary=vocab_size,
        )
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, ClipTransformer):
                module.sequence_first()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.visual.input_resolution = image_resolution  # type: ignore[assignment]
        self.visual.output_dim = embed_dim  # type: ignore[assignment]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights of the picture tower's first layer."""
        weight: Tensor = self.visual.conv1.weight
        return weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, embed_dim]."""
        self.compute_dtype = self.dtype
        return super().encode_image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        """Tokens [B, context_length], of any integer dtype, -> [B, embed_dim]."""
        self.compute_dtype = self.dtype
        return super().encode_text(text)


def convert_weights(model: nn.Module) -> None:
    """Make convolutions, linear layers, attention and projections float16; norms and embeddings stay."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            layer.to(torch.float16)
        names = ["text_projection", "proj"]
        if isinstance(layer, (nn.MultiheadAttention, ClipAttention)):
            names += ["in_proj_weight", "in_proj_bias"]
        for name in names:
            parameter = getattr(layer, name, None)
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.half()


def build_model(state_dict: Mapping[str, Tensor]) -> CLIP:
    """The model that a published state dict holds, in eval mode, with float16 weights.

    Raises:
        ValueError: the entries are not CLIP's.
    """
    state = {name: tensor for name, tensor in state_dict.items() if name not in BUFFERS}
    try:
        model = CLIP(*_arguments(state))
    except KeyError as error:
        raise ValueError(f"the state dict is not one of CLIP's: it has no {error}") from None
    convert_weights(model)
    model.load_state_dict(state)
    return model.eval()


def _arguments(
    state: Mapping[str, Tensor],
) -> tuple[int, int, Sequence[int] | int, int, int | None, int, int, int, int, int]:
    """The constructor's arguments, read off the shapes."""
    first = state["visual.conv1.weight"]
    layers: Sequence[int] | int
    if "visual.proj" in state:
        width, patch = first.shape[0], first.shape[-1]
        layers = _count(state, "visual.transformer.resblocks.")
        size = patch * _side(state["visual.positional_embedding"])
    else:
        width, patch = state["visual.layer1.0.conv1.weight"].shape[0], None
        layers = [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
        size = STRIDE * _side(state["visual.attnpool.positional_embedding"])
    context, text_width = state["positional_embedding"].shape
    return (
        state["text_projection"].shape[1],
        size,
        layers,
        width,
        patch,
        context,
        state["token_embedding.weight"].shape[0],
        text_width,
        text_width // 64,
        _count(state, "transformer.resblocks."),
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under ``prefix``."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _side(positions: Tensor) -> int:
    """Pixels or patches a side, of a table that has one more entry than there are."""
    return int((len(positions) - 1) ** 0.5 + 0.5)
