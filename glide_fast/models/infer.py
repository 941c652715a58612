"""The config of a bare state dict, from its names and shapes.

What shapes do not tell (the width of a head, the order of queries, keys and values, the schedule …) comes
from the published model of the same shape, if there is one, else from a default that a warning names.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from glide_fast.models.clip import CLIPConfig, VisionTransformerConfig
from glide_fast.models.configs import Config, ModelConfig
from glide_fast.models.encoder import EncoderConfig
from glide_fast.models.infer_unet import HEAD_CHANNELS, Shapes, infer_classifiers, infer_unets
from glide_fast.models.noisy_clip import NoisyCLIPConfig
from glide_fast.models.presets import PRESETS
from glide_fast.models.resnet import STRIDE, ResNetConfig
from glide_fast.models.trunk import UNetConfig

_HIDDEN_IN_TRUNKS = ("image_size", "head_channels", "attention_order", "norm_groups")
_HIDDEN_IN_DIFFUSIONS = ("schedule", "steps", "prediction", "variance", "rescale_timesteps")
_HIDDEN_IN_CLIPS = ("image_head_channels", "text_head_channels", "logit_scale")


def infer_config(state: Mapping[str, Tensor], source: str) -> Config:
    """The config of the network with this state dict; ``source`` is named in errors and warnings.

    Warns:
        UserWarning: what had to be assumed, where no published model has these shapes.

    Raises:
        ValueError: the names are those of no network here, or its layout is none of the family's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        candidates = _candidates(shapes)
    except KeyError as missing:
        raise ValueError(
            f"{source}: its config cannot be inferred, {missing.args[0]} is missing; give config="
        ) from None
    except ValueError as error:
        raise ValueError(f"{source}: its config cannot be inferred: {error}") from None
    published = {_visible(config): config for config in reversed(PRESETS.values())}
    for candidate in candidates:
        if _visible(candidate) in published:
            return published[_visible(candidate)]
    assumed = _assumptions(candidates)
    if assumed:
        warnings.warn(
            f"{source}: shapes do not tell everything; assumed {', '.join(assumed)}; "
            "give config= (or --model, for a published one) if that is wrong",
            stacklevel=2,
        )
    return candidates[0]


def _candidates(shapes: Shapes) -> list[Config]:
    if "input_blocks.0.0.weight" in shapes:
        if any(name.startswith("output_blocks.") for name in shapes):
            return [_with_schedule(unet) for unet in infer_unets(shapes)]
        return [*infer_classifiers(shapes)]
    if "visual.conv1.weight" in shapes:
        return [_clip(shapes)]
    towers = [name for name in shapes if name.endswith(("blocks.input.w_t", "blocks.input.w_voc"))]
    if len(towers) == 2:
        return [_noisy_clip(shapes)]
    if towers:
        raise ValueError("it is one tower of a noise-aware CLIP; give both files together")
    raise ValueError(
        f"its names, such as {next(iter(shapes), 'none')}, are those of no U-Net, classifier or CLIP here"
    )


def _with_schedule(unet: UNetConfig) -> ModelConfig:
    """The diffusion that a model of this kind usually has: GLIDE's base models alone are cosine."""
    learned = unet.out_channels == 2 * unet.image_channels
    cosine = unet.text is not None and not unet.low_res
    return ModelConfig(
        unet=unet,
        schedule="cosine" if cosine else "linear",
        variance="learned_range" if learned else "fixed_large",
    )


def _clip(shapes: Shapes) -> CLIPConfig:
    width = shapes["ln_final.weight"][0]
    vision: VisionTransformerConfig | ResNetConfig
    if "visual.proj" in shapes:
        channels, _, patch, _ = shapes["visual.conv1.weight"]
        layers = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        vision = VisionTransformerConfig(width=channels, layers=layers, patch_size=patch)
        size = patch * math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    else:
        first, second, third, fourth = (
            _count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)
        )
        channels = shapes["visual.layer1.0.conv1.weight"][0]
        vision = ResNetConfig(width=channels, layers=(first, second, third, fourth))
        size = STRIDE * math.isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1)
    return CLIPConfig(
        embedding=shapes["text_projection"][1],
        image_size=size,
        vision=vision,
        width=width,
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        heads=max(width // HEAD_CHANNELS, 1),
        context=shapes["positional_embedding"][0],
        vocabulary=shapes["token_embedding.weight"][0],
    )


def _noisy_clip(shapes: Shapes) -> NoisyCLIPConfig:
    timesteps, image_width = shapes["image_encoder.blocks.input.w_t"]
    vocabulary, text_width = shapes["text_encoder.blocks.input.w_voc"]
    patch = shapes["image_encoder.blocks.input.patch_proj"][2]
    image_head, text_head = (math.gcd(width, HEAD_CHANNELS) for width in (image_width, text_width))
    return NoisyCLIPConfig(
        embedding=shapes["image_encoder.blocks.output.f.w"][0],
        image_size=patch * math.isqrt(shapes["image_encoder.blocks.input.w_pos"][0] - 1),
        patch_size=patch,
        image_heads=image_width // image_head,
        image_head_channels=image_head,
        image_layers=_count(shapes, r"image_encoder\.blocks\.block_(\d+)\."),
        text_heads=text_width // text_head,
        text_head_channels=text_head,
        text_layers=_count(shapes, r"text_encoder\.blocks\.block_(\d+)\."),
        context=shapes["text_encoder.blocks.input.w_pos"][0],
        vocabulary=vocabulary,
        timesteps=timesteps,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _visible(config: Config) -> Config:
    """The config with everything that shapes do not show put to one value, so that equal shapes are equal."""
    if isinstance(config, ModelConfig):
        return ModelConfig(unet=_visible_trunk(config.unet))
    if isinstance(config, EncoderConfig):
        trunk = _visible_trunk(config.trunk)
        if config.pool == "attention":  # has a place for every pixel, and needs head_channels
            trunk = replace(trunk, image_size=config.trunk.image_size, head_channels=HEAD_CHANNELS)
        return EncoderConfig(trunk=trunk, pool=config.pool)
    if isinstance(config, NoisyCLIPConfig):
        image, text = (
            config.image_heads * config.image_head_channels,
            config.text_heads * config.text_head_channels,
        )
        return replace(
            config,
            image_heads=image,
            image_head_channels=1,
            text_heads=text,
            text_head_channels=1,
            logit_scale=1.0,
        )
    return config


def _visible_trunk(unet: UNetConfig) -> UNetConfig:
    return replace(
        unet,
        image_size=0,
        head_channels=None,
        heads=1,
        heads_up=None,
        attention_order="by_head",
        dropout=0.0,
        norm_groups=32,
        learned_resample=unet.learned_resample or unet.resblock_updown,
        text=None if unet.text is None else replace(unet.text, heads=1, tokenizer=""),
    )


def _assumptions(candidates: list[Config]) -> list[str]:
    """What the first of the candidates takes for granted, as "name value"."""
    config = candidates[0]
    if isinstance(config, CLIPConfig):
        return []
    if isinstance(config, NoisyCLIPConfig):
        return _values(config, _HIDDEN_IN_CLIPS)
    trunk = config.unet if isinstance(config, ModelConfig) else config.trunk
    assumed = _values(trunk, _HIDDEN_IN_TRUNKS)
    if isinstance(config, EncoderConfig) and config.pool == "attention":  # which has a place for every pixel
        del assumed[0]
    if trunk.text is not None:
        assumed += [f"text.{value}" for value in _values(trunk.text, ("tokenizer", "heads"))]
    if len(candidates) > 1:
        assumed += _values(trunk, ("channel_mult", "res_blocks"))
    if isinstance(config, ModelConfig):
        assumed += _values(config, _HIDDEN_IN_DIFFUSIONS)
    return assumed


def _values(config: object, names: tuple[str, ...]) -> list[str]:
    return [f"{name} {getattr(config, name)}" for name in names]
