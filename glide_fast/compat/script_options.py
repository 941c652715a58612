"""What the original projects' scripts build from command-line options: parsers, diffusions, shapes."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from glide_fast.compat.diffusion_options import (
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from glide_fast.compat.respacing import SpacedDiffusion, space_timesteps

NUM_CLASSES = 1000
UNCHANGED = (  # options that a U-Net's constructor takes as they are
    "num_res_blocks",
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
)
Network = TypeVar("Network")
Spaced = TypeVar("Spaced", bound=SpacedDiffusion)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Add an option for every default, of the default's type; None takes text."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The parsed values of some options."""
    return {name: getattr(args, name) for name in keys}


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 or no, false, f, n, 0, in any case.

    Raises:
        argparse.ArgumentTypeError: another word.
    """
    word = str(v).lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"boolean value expected, not {v!r}; use true or false")


def spaced_diffusion(
    kind: type[Spaced],
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Iterable[int] = "",
) -> Spaced:
    """A diffusion of ``kind`` as the scripts' options describe it."""
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    sections = timestep_respacing if isinstance(timestep_respacing, str) else list(timestep_respacing)
    return kind(
        use_timesteps=space_timesteps(steps, sections or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def strides(image_size: int, resolutions: str) -> tuple[int, ...]:
    """The downsampling rates of the map sizes "32,16,8" of a picture."""
    return tuple(image_size // int(size) for size in resolutions.split(","))


def channel_multiples(
    known: Mapping[int, tuple[float, ...]], image_size: int, channel_mult: str = ""
) -> tuple[float, ...]:
    """The multiples "1,2,3,4" as numbers, or those that are ``known`` for the picture's size.

    Raises:
        ValueError: none are given nor known.
    """
    if channel_mult:
        return tuple(int(multiple) for multiple in channel_mult.split(","))
    if image_size not in known:
        sizes = ", ".join(str(size) for size in known)
        raise ValueError(f"unsupported image size: {image_size}; use one of {sizes}, or give channel_mult")
    return known[image_size]


def unet_arguments(
    options: Mapping[str, Any], image_size: int, known: Mapping[int, tuple[float, ...]]
) -> dict[str, Any]:
    """A U-Net's constructor arguments, from those options of a script that the project has.

    ``image_size`` is that of its output, and ``known`` the multiples where none are given.
    """
    given = {name: options[name] for name in UNCHANGED if name in options}
    return {
        "in_channels": 3,
        "model_channels": options["num_channels"],
        "out_channels": 6 if options["learn_sigma"] else 3,
        "attention_resolutions": strides(image_size, options["attention_resolutions"]),
        "channel_mult": channel_multiples(known, image_size, options.get("channel_mult", "")),
        "num_classes": NUM_CLASSES if options["class_cond"] else None,
        **given,
    }


def model_and_diffusion(
    create: Callable[..., Network], create_diffusion: Callable[..., Spaced], names: str
) -> Callable[..., tuple[Network, Spaced]]:
    """A function of the options ``names`` that returns a network and its diffusion."""
    parameter = inspect.Parameter
    signature = inspect.Signature(
        [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in names.split()]
    )

    def create_both(*args: Any, **kwargs: Any) -> tuple[Network, Spaced]:
        options = signature.bind(*args, **kwargs).arguments
        described = {**options, "steps": options["diffusion_steps"]}
        model = create(**_taken_by(create, options))
        return model, create_diffusion(**_taken_by(create_diffusion, described))

    create_both.__signature__ = signature  # type: ignore[attr-defined]
    return create_both


def _taken_by(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}
