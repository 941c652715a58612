"""Which models paint, and how: the options that the commands that paint have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from glide_fast.cli.hardware import Hardware
from glide_fast.models import PRESETS, ModelConfig
from glide_fast.models.checkpoint import files_of
from glide_fast.sampling.graph_cuda import Choice
from glide_fast.sampling.pipeline import (
    EMBEDDED,
    EMBEDDED_INPAINTING,
    UPSAMPLER_OPTIONS,
    StageOptions,
    TextToImage,
)

EMOJI = "emoji"


@dataclass(frozen=True, kw_only=True)
class Painter(Hardware):
    """Which models paint, and how."""

    embedded: ClassVar[tuple[Path, Path]] = EMBEDDED

    model: str = EMOJI
    """"emoji", which ships with the package; a preset such as glide-base; or a base model's file."""
    upsampler: str | None = None
    """The upsampler that belongs to another base model than "emoji": a preset or a file."""
    sampler: str = "ddim"
    """How to go from noise to picture: ddpm, ddim, plms, euler, euler_ancestral, heun, dpm++2m, dpm++2m_sde
    or unipc."""
    eta: float | None = None
    """Noise added each step, 0 to 1, for samplers that have a choice; default: the sampler's usual."""
    steps: int = 50
    """Steps of the base model, 2 to 1000."""
    guidance: float | None = None
    """Classifier-free guidance of the base model, 0 to 100: 0 ignores the prompt, 1 is the plain model.
    Default: 1.25 for "emoji", 3 for other models."""
    rescale: float = 0.0
    """Share of the contrast that guidance adds and that is taken back, 0 to 1."""
    upsampler_steps: int = 20
    """Steps of the upsampler, 2 to 1000."""
    graph: Choice = "step"
    """What a CUDA graph holds, on a GPU: a step, the whole loop (faster for small models), or off."""

    def scale(self, model: TextToImage) -> float:
        """The guidance that is given, or the model's usual one."""
        return model.guidance if self.guidance is None else self.guidance

    def sources(self) -> list[str | Path]:
        """Files or names of presets: the base model, then the upsampler if there is one."""
        if self.model == EMOJI:
            if self.upsampler is not None:
                raise ValueError(f"model {self.model!r} has its own upsampler; leave --upsampler out")
            return list(self.embedded)
        sources: list[str | Path] = [painting_model(self.model, upsampler=False)]
        if self.upsampler is not None:
            sources.append(painting_model(self.upsampler, upsampler=True))
        return sources

    def files(self) -> list[Path]:
        """The model files, downloaded if need be."""
        return [path for source in self.sources() for path in files_of(source)]

    def load_embedded(self) -> TextToImage:
        """What "emoji" is."""
        return TextToImage.embedded()

    def load(self, size: int | None = None) -> TextToImage:
        """The models, without the upsampler where ``size`` is that of the base model."""
        sources = self.sources()
        model = self.load_embedded() if self.model == EMOJI else TextToImage.load(*sources)
        sizes = [stage.config.unet.image_size for stage in (model.base, model.upsampler) if stage]
        if size is not None and size not in sizes:
            raise ValueError(
                f"size {size} is not one this model paints; choose {' or '.join(map(str, sizes))}"
            )
        model = replace(model, upsampler=None) if size == sizes[0] else model
        self.place(model.base, model.upsampler)
        return model

    def options(self, model: TextToImage) -> tuple[StageOptions, StageOptions]:
        """How the base model is sampled, and how the upsampler."""
        base = StageOptions(
            sampler=self.sampler,
            eta=self.eta,
            steps=self.steps,
            guidance=self.scale(model),
            rescale=self.rescale,
            graph=self.graph,
        )
        upsampler = replace(
            UPSAMPLER_OPTIONS,
            sampler=self.sampler,
            eta=self.eta,
            steps=self.upsampler_steps,
            graph=self.graph,
        )
        return base, upsampler

    def paint(
        self, model: TextToImage, prompts: Sequence[str], seeds: Sequence[int], *, progress: bool = False
    ) -> NDArray[np.uint8]:
        """One picture a prompt and seed, uint8 [B, H, W, 3]."""
        base, upsampler = self.options(model)
        return model(prompts, seeds=seeds, base_options=base, upsampler_options=upsampler, progress=progress)


@dataclass(frozen=True, kw_only=True)
class InpaintingPainter(Painter):
    """Which models complete pictures, and how; "emoji" has one for it."""

    embedded: ClassVar[tuple[Path, Path]] = EMBEDDED_INPAINTING

    def load_embedded(self) -> TextToImage:
        return TextToImage.embedded_inpainting()


def painting_model(name: str, *, upsampler: bool) -> str:
    """``name`` if it is a file, or a preset that paints what is written (enlarging it, if ``upsampler``)."""
    painting = {
        preset: config.unet
        for preset, config in PRESETS.items()
        if isinstance(config, ModelConfig) and config.unet.text is not None
    }
    known = [preset for preset, unet in painting.items() if unet.low_res == upsampler]
    if Path(name).is_file() or name in known:
        return name
    if name in PRESETS:
        task = "enlarges a picture of a text" if upsampler else "paints a picture from a text alone"
        raise ValueError(f"model {name!r} is none that {task}; choose one of {', '.join(known)}")
    if not upsampler:
        known = [EMOJI, *known]
    raise ValueError(
        f"model {name!r} is neither a known model ({', '.join(known)}) nor a file; "
        "give the path of a model's file, such as the .safetensors that `glide-fast train` wrote"
    )
