"""Models and diffusions from scripts' options; what guided-diffusion's module of this name offers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from glide_fast.compat.guided_diffusion.respace import SpacedDiffusion
from glide_fast.compat.guided_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel
from glide_fast.compat.script_options import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    channel_multiples,
    model_and_diffusion,
    spaced_diffusion,
    str2bool,
    strides,
    unet_arguments,
)
from glide_fast.models.encoder import Pool

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "diffusion_defaults",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

CHANNEL_MULTIPLES: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
UPSAMPLER_MULTIPLES: dict[int, tuple[float, ...]] = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
}

create_gaussian_diffusion = partial(spaced_diffusion, SpacedDiffusion)


def diffusion_defaults() -> dict[str, Any]:
    """Options of a diffusion."""
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def classifier_defaults() -> dict[str, Any]:
    """Options of a classifier."""
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a U-Net and its diffusion."""
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        **diffusion_defaults(),
    }


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a classifier and its diffusion."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a super-resolution U-Net and its diffusion."""
    options = {**model_and_diffusion_defaults(), "large_size": 256, "small_size": 64}
    wanted = inspect.signature(sr_create_model_and_diffusion).parameters
    return {name: value for name, value in options.items() if name in wanted}


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """A U-Net; ``attention_resolutions`` are map sizes, ``channel_mult`` whole numbers or ""."""
    return UNetModel(image_size=image_size, **unet_arguments(locals(), image_size, CHANNEL_MULTIPLES))


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: Pool,
) -> EncoderUNetModel:
    """A classifier of ImageNet's classes."""
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=NUM_CLASSES,
        num_res_blocks=classifier_depth,
        attention_resolutions=strides(image_size, classifier_attention_resolutions),
        channel_mult=channel_multiples(CHANNEL_MULTIPLES, image_size),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
) -> SuperResModel:
    """A U-Net that enlarges pictures of any smaller size to ``large_size``."""
    del small_size
    return SuperResModel(image_size=large_size, **unet_arguments(locals(), large_size, UPSAMPLER_MULTIPLES))


create_model_and_diffusion = model_and_diffusion(
    create_model,
    create_gaussian_diffusion,
    """image_size class_cond learn_sigma num_channels num_res_blocks channel_mult num_heads
    num_head_channels num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule
    timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint
    use_scale_shift_norm resblock_updown use_fp16 use_new_attention_order""",
)
create_classifier_and_diffusion = model_and_diffusion(
    create_classifier,
    create_gaussian_diffusion,
    """image_size classifier_use_fp16 classifier_width classifier_depth classifier_attention_resolutions
    classifier_use_scale_shift_norm classifier_resblock_updown classifier_pool learn_sigma
    diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps
    rescale_learned_sigmas""",
)
sr_create_model_and_diffusion = model_and_diffusion(
    sr_create_model,
    create_gaussian_diffusion,
    """large_size small_size class_cond learn_sigma num_channels num_res_blocks num_heads num_head_channels
    num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing
    use_kl predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm
    resblock_updown use_fp16""",
)
