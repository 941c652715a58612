"""Upstream's model options, as the golden entries record them, turned into our configs."""

from __future__ import annotations

from typing import Any

from glide_fast.models import TextConfig, UNetConfig

CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def glide_config(options: dict[str, Any]) -> UNetConfig:
    """The config that GLIDE's ``create_model_and_diffusion`` options describe."""
    size = options["image_size"]
    multiples = options["channel_mult"]
    heads_up = options["num_heads_upsample"]
    return UNetConfig(
        image_size=size,
        channels=options["num_channels"],
        channel_mult=tuple(int(part) for part in multiples.split(",")) if multiples else CHANNEL_MULT[size],
        res_blocks=options["num_res_blocks"],
        attention_strides=tuple(size // int(part) for part in options["attention_resolutions"].split(",")),
        head_channels=None if options["num_head_channels"] == -1 else options["num_head_channels"],
        heads=options["num_heads"],
        heads_up=None if heads_up == -1 else heads_up,
        dropout=options["dropout"],
        scale_shift_norm=options["use_scale_shift_norm"],
        resblock_updown=options["resblock_updown"],
        text=TextConfig(
            context=options["text_ctx"],
            width=options["xf_width"],
            layers=options["xf_layers"],
            heads=options["xf_heads"],
            final_norm=options["xf_final_ln"],
            padding_embedding=options["xf_padding"],
        ),
        low_res=options["super_res"],
        inpaint=options["inpaint"],
    )


def unet_config(image_size: int, options: dict[str, Any]) -> UNetConfig:
    """The config that the keyword arguments of upstream's U-Net classes without text describe."""
    heads_up = options.get("num_heads_upsample")
    return UNetConfig(
        image_size=image_size,
        channels=options["model_channels"],
        channel_mult=tuple(options["channel_mult"]),
        res_blocks=options["num_res_blocks"],
        attention_strides=tuple(options["attention_resolutions"]),
        out_channels=options["out_channels"],
        dims=options.get("dims", 2),
        head_channels=options.get("num_head_channels"),
        heads=options.get("num_heads", 1),
        heads_up=heads_up,
        attention_order="by_role" if options.get("use_new_attention_order") else "by_head",
        dropout=options.get("dropout", 0.0),
        scale_shift_norm=options.get("use_scale_shift_norm", False),
        resblock_updown=options.get("resblock_updown", False),
        learned_resample=options.get("conv_resample", True),
        classes=options.get("num_classes"),
        low_res=options.get("super_res", False),
    )


def super_resolution_config(options: dict[str, Any]) -> UNetConfig:
    """The config that guided- and improved-diffusion's ``sr_create_model_and_diffusion`` options describe."""
    size = options["large_size"]
    head_channels, heads_up = options.get("num_head_channels", -1), options["num_heads_upsample"]
    return UNetConfig(
        image_size=size,
        channels=options["num_channels"],
        channel_mult=CHANNEL_MULT[size],
        res_blocks=options["num_res_blocks"],
        attention_strides=tuple(size // int(part) for part in options["attention_resolutions"].split(",")),
        out_channels=6 if options["learn_sigma"] else 3,
        head_channels=None if head_channels == -1 else head_channels,
        heads=options["num_heads"],
        heads_up=None if heads_up == -1 else heads_up,
        dropout=options["dropout"],
        scale_shift_norm=options["use_scale_shift_norm"],
        resblock_updown=options.get("resblock_updown", False),
        classes=1000 if options["class_cond"] else None,
        low_res=True,
    )
