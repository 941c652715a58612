"""Models and diffusions from options; what glide-text2im's module of this name offers."""

from __future__ import annotations

from typing import Any

from glide_fast.compat.errors import RuleError
from glide_fast.compat.glide_text2im.gaussian_diffusion import get_named_beta_schedule
from glide_fast.compat.glide_text2im.respace import SpacedDiffusion, space_timesteps
from glide_fast.compat.glide_text2im.text2im_model import (
    InpaintText2ImUNet,
    SuperResInpaintText2ImUnet,
    SuperResText2ImUNet,
    Text2ImUNet,
)
from glide_fast.compat.glide_text2im.tokenizer.bpe import get_encoder
from glide_fast.compat.script_options import channel_multiples, model_and_diffusion, strides

__all__ = [
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "model_and_diffusion_defaults_upsampler",
]

CHANNEL_MULT = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
CLASSES: dict[tuple[bool, bool], type[Text2ImUNet]] = {  # by (inpaint, super_res)
    (False, False): Text2ImUNet,
    (True, False): InpaintText2ImUNet,
    (False, True): SuperResText2ImUNet,
    (True, True): SuperResInpaintText2ImUnet,
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The options of the published base model."""
    return {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "channel_mult": "",
        "num_heads": 1,
        "num_head_channels": 64,
        "num_heads_upsample": -1,
        "attention_resolutions": "32,16,8",
        "dropout": 0.1,
        "text_ctx": 128,
        "xf_width": 512,
        "xf_layers": 16,
        "xf_heads": 8,
        "xf_final_ln": True,
        "xf_padding": True,
        "diffusion_steps": 1000,
        "noise_schedule": "squaredcos_cap_v2",
        "timestep_respacing": "",
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_fp16": True,
        "cache_text_emb": False,
        "inpaint": False,
        "super_res": False,
    }


def model_and_diffusion_defaults_upsampler() -> dict[str, Any]:
    """The options of the published upsampler."""
    changed = {"image_size": 256, "num_res_blocks": 2, "noise_schedule": "linear", "super_res": True}
    return {**model_and_diffusion_defaults(), **changed}


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    text_ctx: int,
    xf_width: int,
    xf_layers: int,
    xf_heads: int,
    xf_final_ln: bool,
    xf_padding: bool,
    resblock_updown: bool,
    use_fp16: bool,
    cache_text_emb: bool,
    inpaint: bool,
    super_res: bool,
) -> Text2ImUNet:
    """A model with random weights.

    Raises:
        ValueError: ``channel_mult`` is "" and the size has no default.
        RuleError: ``channel_mult`` has not as many levels as bring the size to 8 pixels.
    """
    return CLASSES[bool(inpaint), bool(super_res)](
        text_ctx,
        xf_width,
        xf_layers,
        xf_heads,
        xf_final_ln,
        get_encoder(),
        xf_padding=xf_padding,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6,
        num_res_blocks=num_res_blocks,
        attention_resolutions=strides(image_size, attention_resolutions),
        dropout=dropout,
        channel_mult=_multiples(image_size, channel_mult),
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        cache_text_emb=cache_text_emb,
    )


def create_gaussian_diffusion(
    steps: int, noise_schedule: str, timestep_respacing: str | list[int]
) -> SpacedDiffusion:
    """The diffusion on a named schedule of ``steps``, respaced ("" keeps every step)."""
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
    )


create_model_and_diffusion = model_and_diffusion(
    create_model,
    create_gaussian_diffusion,
    """image_size num_channels num_res_blocks channel_mult num_heads num_head_channels num_heads_upsample
    attention_resolutions dropout text_ctx xf_width xf_layers xf_heads xf_final_ln xf_padding
    diffusion_steps noise_schedule timestep_respacing use_scale_shift_norm resblock_updown use_fp16
    cache_text_emb inpaint super_res""",
)


def _multiples(image_size: int, channel_mult: str) -> tuple[float, ...]:
    """Channels of each level as multiples of the first."""
    multiples = channel_multiples(CHANNEL_MULT, image_size, channel_mult)
    if 4 << len(multiples) != image_size:
        raise RuleError(
            f"channel_mult {channel_mult!r} has {len(multiples)} levels, which suit pictures of "
            f"{4 << len(multiples)} pixels, not {image_size}; 2**(levels + 2) must be the image size"
        )
    return multiples
