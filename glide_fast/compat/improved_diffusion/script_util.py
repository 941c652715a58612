"""Models and diffusions from scripts' options; what improved-diffusion's module of this name offers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from glide_fast.compat.improved_diffusion.respace import SpacedDiffusion
from glide_fast.compat.improved_diffusion.unet import SuperResModel, UNetModel
from glide_fast.compat.script_options import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    model_and_diffusion,
    spaced_diffusion,
    str2bool,
    unet_arguments,
)

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

CHANNEL_MULTIPLES: dict[int, tuple[float, ...]] = {
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
UPSAMPLER_MULTIPLES = {size: CHANNEL_MULTIPLES[size] for size in (256, 64)}

create_gaussian_diffusion = partial(spaced_diffusion, SpacedDiffusion)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a U-Net and its diffusion."""
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "attention_resolutions": "16,8",
        "dropout": 0.0,
        "learn_sigma": False,
        "sigma_small": False,
        "class_cond": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
    }


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a super-resolution U-Net and its diffusion."""
    options = {**model_and_diffusion_defaults(), "large_size": 256, "small_size": 64}
    wanted = inspect.signature(sr_create_model_and_diffusion).parameters
    return {name: value for name, value in options.items() if name in wanted}


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
) -> UNetModel:
    """A U-Net for pictures of 32, 64 or 256 pixels; ``attention_resolutions`` are map sizes."""
    return UNetModel(**unet_arguments(locals(), image_size, CHANNEL_MULTIPLES))


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
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
) -> SuperResModel:
    """A U-Net that enlarges pictures of any smaller size to ``large_size``, 64 or 256."""
    del small_size
    return SuperResModel(**unet_arguments(locals(), large_size, UPSAMPLER_MULTIPLES))


create_model_and_diffusion = model_and_diffusion(
    create_model,
    create_gaussian_diffusion,
    """image_size class_cond learn_sigma sigma_small num_channels num_res_blocks num_heads
    num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing
    use_kl predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm""",
)
sr_create_model_and_diffusion = model_and_diffusion(
    sr_create_model,
    create_gaussian_diffusion,
    """large_size small_size class_cond learn_sigma num_channels num_res_blocks num_heads
    num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing
    use_kl predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm""",
)
