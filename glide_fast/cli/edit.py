"""``glide-fast inpaint``, ``vary`` and ``upscale``: pictures out of a picture."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tyro.conf import OmitArgPrefixes, Positional, arg

from glide_fast.cli.hardware import Hardware
from glide_fast.cli.order import Order
from glide_fast.cli.painter import EMOJI, InpaintingPainter, Painter, painting_model
from glide_fast.data.images import center_square, load_image
from glide_fast.models import load_model
from glide_fast.models.checkpoint import files_of
from glide_fast.sampling.editing import STRENGTH, inpaint, upscale, vary
from glide_fast.sampling.pipeline import EMBEDDED, UPSAMPLER_OPTIONS

_WHITE = 128  # from here on a mask's pixel means known

Image = Annotated[Positional[Path], arg(metavar="IMAGE")]
Prompt = Annotated[Positional[str], arg(metavar="PROMPT")]


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """Paint a part of a picture anew: PNG files, a grid, and inpaint.json, which says how to get them again.

    Known pixels come back exactly. IMAGE is a square of the model's size (64 px for "emoji").
    """

    image: Image
    """The picture to complete."""
    prompt: Prompt = ""
    """What the whole picture shows; "" completes it without a prompt."""
    mask: Path
    """A picture of the same size, white where IMAGE is known and black where it is painted."""
    fit: bool = False
    """Crop IMAGE and mask to their central squares and resize them to the model's size."""
    order: OmitArgPrefixes[Order] = field(default_factory=Order)
    painter: OmitArgPrefixes[InpaintingPainter] = field(default_factory=InpaintingPainter)

    def run(self) -> None:
        self.order.check()
        picture, mask = load_image(self.image), load_image(self.mask)
        if picture.shape != mask.shape:
            raise ValueError(
                f"mask {self.mask} is {_pixels(mask)} and {self.image} {_pixels(picture)}; "
                "they must be of one size"
            )
        model = self.painter.load()
        if self.fit:
            picture, mask = center_square(picture, model.size), center_square(mask, model.size)
        known = mask.mean(2) >= _WHITE
        base, upsampler = self.painter.options(model)
        paint = partial(inpaint, model, picture, known, base_options=base, upsampler_options=upsampler)
        painted = self.order.paint(
            [self.prompt],
            lambda prompts, seeds: paint(prompts, seeds=seeds, progress=sys.stderr.isatty()),
        )
        options = {**asdict(self.painter), "guidance": base.guidance, "fit": self.fit}
        painted.write("inpaint", options, self.painter.files(), [self.image, self.mask])


@dataclass(frozen=True, kw_only=True)
class Vary:
    """Paint variations of a picture: PNG files, a grid, and vary.json, which says how to get them again.

    IMAGE is a square of the model's size (64 px for "emoji").
    """

    image: Image
    """The picture to start from."""
    prompt: Prompt = ""
    """What the variations show; "" paints them without a prompt."""
    strength: float = STRENGTH
    """How much changes: the share of the steps that is sampled, up to 1; 0.5 keeps the layout."""
    fit: bool = False
    """Crop IMAGE to its central square and resize it to the model's size."""
    order: OmitArgPrefixes[Order] = field(default_factory=Order)
    painter: OmitArgPrefixes[Painter] = field(default_factory=Painter)

    def run(self) -> None:
        self.order.check()
        picture = load_image(self.image)
        model = self.painter.load()
        if self.fit:
            picture = center_square(picture, model.size)
        base, upsampler = self.painter.options(model)
        paint = partial(vary, model, picture, strength=self.strength)
        paint = partial(paint, base_options=base, upsampler_options=upsampler)
        painted = self.order.paint(
            [self.prompt],
            lambda prompts, seeds: paint(prompts, seeds=seeds, progress=sys.stderr.isatty()),
        )
        options = {**asdict(self.painter), "guidance": base.guidance}
        options |= {"strength": self.strength, "fit": self.fit}
        painted.write("vary", options, self.painter.files(), [self.image])


@dataclass(frozen=True, kw_only=True)
class Upscale(Hardware):
    """Enlarge a picture: PNG files, a grid, and upscale.json, which says how to get them again.

    IMAGE is a square as the upsampler learned from: 32 px for "emoji", 64 px for glide-upsample.
    """

    image: Image
    """The small picture."""
    prompt: Prompt = ""
    """What the picture shows; "" enlarges it without a prompt."""
    model: str = EMOJI
    """"emoji", which ships with the package; a preset such as glide-upsample; or an upsampler's file."""
    sampler: str = "ddim"
    """How to go from noise to picture; as for `glide-fast sample`."""
    eta: float | None = None
    """Noise added each step, 0 to 1, for samplers that have a choice; default: the sampler's usual."""
    steps: int = 20
    """Steps, 2 to 1000."""
    guidance: float = 1.0
    """Classifier-free guidance, 0 to 100: 0 ignores the prompt, 1 is the plain model."""
    order: OmitArgPrefixes[Order] = field(default_factory=Order)

    def run(self) -> None:
        self.order.check()
        picture = load_image(self.image)
        source = EMBEDDED[1] if self.model == EMOJI else painting_model(self.model, upsampler=True)
        upsampler = load_model(source)
        self.place(upsampler)
        options = replace(
            UPSAMPLER_OPTIONS, sampler=self.sampler, eta=self.eta, steps=self.steps, guidance=self.guidance
        )
        painted = self.order.paint(
            [self.prompt],
            lambda prompts, seeds: upscale(
                upsampler, picture, prompts, seeds=seeds, options=options, progress=sys.stderr.isatty()
            ),
        )
        recorded = {"model": self.model, "device": self.device, "dtype": self.dtype, **asdict(options)}
        painted.write("upscale", recorded, files_of(source), [self.image])


def _pixels(picture: NDArray[np.uint8]) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]} px"
