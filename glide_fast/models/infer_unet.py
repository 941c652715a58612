"""The shape of a U-Net or classifier, read off the names and shapes of its weights.

Every level of the encoder is ``res_blocks`` blocks and, but for the last, a downsampling; together with the
stem that makes levels · (res_blocks + 1) stages. Which factors they are, the stages say: where convolutions
resample, widths change, attention begins, and the decoder's upsamplings stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from glide_fast.models.conditioning import TextConfig
from glide_fast.models.encoder import EncoderConfig, Pool
from glide_fast.models.trunk import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]
Resampling = Literal["residual", "convolution", "none"]

HEAD_CHANNELS = 64
GLIDE_VOCABULARY = 50257
SMALLEST_MAP = 8  # pixels a side in every published model from 64 px on
_PICTURE_CONDITIONS = {(False, False): 0, (False, True): 3, (True, False): 4, (True, True): 7}


class _Layout(NamedTuple):
    levels: int
    res_blocks: int
    resampling: Resampling


class _Stage(NamedTuple):
    """A stage of the encoder: what it is, its output channels, and what else it has."""

    kind: Resampling
    width: int
    attention: bool
    changes_width: bool


def infer_unets(shapes: Shapes) -> list[UNetConfig]:
    """The U-Nets that the shapes allow, nearly always one; what they do not tell has its default.

    Raises:
        ValueError: the blocks are not laid out as in any U-Net of the family.
    """
    channels_in, channels_out = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    inpaint, low_res, image_channels = _pictures(channels_in, channels_out)
    return [
        replace(
            trunk,
            image_channels=image_channels,
            out_channels=channels_out,
            text=_text(shapes),
            low_res=low_res,
            inpaint=inpaint,
            classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        )
        for trunk in _trunks(shapes)
    ]


def infer_classifiers(shapes: Shapes) -> list[EncoderConfig]:
    """The classifiers that the shapes allow; as :func:`infer_unets`."""
    pool: Pool
    if "out.2.positional_embedding" in shapes:
        pool, classes = "attention", shapes["out.2.c_proj.weight"][0]
    elif "out.1.weight" in shapes:
        pool, classes = "spatial_v2", shapes["out.3.weight"][0]
    elif "out.2.weight" in shapes:
        pool, classes = "spatial", shapes["out.2.weight"][0]
    else:
        pool, classes = "adaptive", shapes["out.3.weight"][0]
    configs = []
    for trunk in _trunks(shapes):
        size, heads = trunk.image_size, trunk.head_channels
        if pool == "attention":
            pixels = shapes["out.2.positional_embedding"][1] - 1
            size, heads = trunk.stride * round(pixels ** (1 / trunk.dims)), heads or HEAD_CHANNELS
        trunk = replace(
            trunk,
            image_size=size,
            head_channels=heads,
            image_channels=shapes["input_blocks.0.0.weight"][1],
            out_channels=classes,
        )
        configs.append(EncoderConfig(trunk=trunk, pool=pool))
    return configs


def _trunks(shapes: Shapes) -> list[UNetConfig]:
    stem, channels = shapes["input_blocks.0.0.weight"], shapes["time_embed.0.weight"][1]
    stages = _stages(shapes)
    trunks = []
    for layout in _layouts(stages, shapes):
        length = layout.res_blocks + 1
        first = [stages[level * length] for level in range(layout.levels)]  # of each level; the stem is apart
        trunk = UNetConfig(
            dims=_dimensions(stem),
            image_size=SMALLEST_MAP << (layout.levels - 1),
            channels=channels,
            channel_mult=tuple(_multiple(stage.width, channels) for stage in first),
            res_blocks=layout.res_blocks,
            attention_strides=tuple(2**level for level, stage in enumerate(first) if stage.attention),
            head_channels=_head_channels(shapes),
            scale_shift_norm=_scales(shapes),
            norm_groups=_norm_groups(shapes),
            resblock_updown=layout.resampling == "residual",
            learned_resample=layout.resampling != "none",
        )
        trunks.append(trunk)
    if not trunks:
        raise ValueError(
            f"its {1 + len(stages)} encoder stages are laid out as in no U-Net of the family; give config="
        )
    return trunks


def _dimensions(stem: tuple[int, ...]) -> Literal[1, 2, 3]:
    return 1 if len(stem) == 3 else 2 if len(stem) == 4 else 3


def _stages(shapes: Shapes) -> list[_Stage]:
    """The encoder's stages behind the stem."""
    indices = [int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name))]
    stages = []
    for index in range(1, max(indices) + 1):
        layer = f"input_blocks.{index}.0"
        if f"{layer}.in_layers.0.weight" in shapes:
            stage = _Stage(
                "residual",
                shapes[f"{layer}.out_layers.3.weight"][0],
                f"input_blocks.{index}.1.qkv.weight" in shapes,
                f"{layer}.skip_connection.weight" in shapes,
            )
        elif f"{layer}.op.weight" in shapes:
            stage = _Stage("convolution", shapes[f"{layer}.op.weight"][0], False, False)
        else:
            stage = _Stage("none", 0, False, False)
        stages.append(stage)
    return stages


def _layouts(stages: list[_Stage], shapes: Shapes) -> list[_Layout]:
    """The ways to divide the stages into levels that contradict nothing, the most levels first."""
    count = len(stages) + 1
    layouts = []
    for length in range(2, count + 1):
        downs = stages[length - 1 :: length]
        kind: Resampling = downs[0].kind if downs else "residual"
        levels = [stages[start : start + length - 1] for start in range(0, len(stages), length)]
        fits = (
            count % length == 0
            and all(down.kind == kind and not down.attention and not down.changes_width for down in downs)
            and all(stage.kind == "residual" for level in levels for stage in level)
            and all(len({(stage.width, stage.attention) for stage in level}) == 1 for level in levels)
            and _decoder_fits(shapes, count, length, kind)
        )
        if fits:
            layouts.append(_Layout(count // length, length - 1, kind))
    return layouts


def _decoder_fits(shapes: Shapes, count: int, length: int, kind: Resampling) -> bool:
    """Whether the decoder, if there is one, upsamples at the end of every level but its last."""
    if not any(name.startswith("output_blocks.") for name in shapes):
        return True
    if f"output_blocks.{count - 1}.0.in_layers.0.weight" not in shapes:
        return False
    entry = {"residual": "in_layers.0.weight", "convolution": "conv.weight", "none": None}[kind]
    for index in range(count):
        ups = [
            name
            for place in (1, 2)
            for name in ("in_layers.0.weight", "conv.weight")
            if f"output_blocks.{index}.{place}.{name}" in shapes
        ]
        is_last = index % length == length - 1 and index != count - 1
        if ups != ([entry] if is_last and entry else []):
            return False
    return True


def _pictures(channels_in: int, channels_out: int) -> tuple[bool, bool, int]:
    """Whether the stem reads a masked and a low-resolution picture, and the channels of a picture.

    Pictures of three channels are preferred, then a model without conditions.
    """
    for (inpaint, low_res), more in _PICTURE_CONDITIONS.items():
        if channels_in - more == 3 and channels_out in (3, 6):
            return inpaint, low_res, 3
    return False, False, channels_in


def _multiple(width: int, channels: int) -> float:
    if width % channels == 0:
        return width // channels
    multiple = width / channels
    return multiple if int(multiple * channels) == width else (width + 0.5) / channels


def _head_channels(shapes: Shapes) -> int | None:
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(".qkv.weight")}
    return next((size for size in (HEAD_CHANNELS, 32) if all(width % size == 0 for width in widths)), None)


def _scales(shapes: Shapes) -> bool:
    width = shapes["middle_block.0.out_layers.3.weight"][0]
    return shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * width


def _norm_groups(shapes: Shapes) -> int:
    widths = {shape[0] for name, shape in shapes.items() if name.endswith("_layers.0.weight")}
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in widths))


def _text(shapes: Shapes) -> TextConfig | None:
    if "token_embedding.weight" not in shapes:
        return None
    vocabulary, width = shapes["token_embedding.weight"]
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    return TextConfig(
        tokenizer="glide" if vocabulary == GLIDE_VOCABULARY else "embedded",
        vocabulary=vocabulary,
        context=shapes["positional_embedding"][0],
        width=width,
        layers=len(layers),
        heads=max(width // HEAD_CHANNELS, 1),
        final_norm="final_ln.weight" in shapes,
        padding_embedding="padding_embedding" in shapes,
    )
