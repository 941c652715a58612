"""From prompts to pictures: a base model, then an upsampler, each with its sampler and its steps.

GLIDE (arXiv 2112.10741): the base model is guided, the upsampler is conditioned on its quantised pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glide_fast.data.images import to_uint8
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models import LoadedModel, MaskedImage, ModelConfig, load_model
from glide_fast.models.kept import keep_if_it_fits
from glide_fast.models.placement import placed
from glide_fast.sampling.denoiser import Conditioned, Denoiser, NoiseSource, PerImageNoise, initial_noise
from glide_fast.sampling.graph_cuda import Choice, shared_graphs
from glide_fast.sampling.guidance import classifier_free
from glide_fast.sampling.img2img import start_from
from glide_fast.sampling.inpainting import keep_known
from glide_fast.sampling.samplers import find_sampler
from glide_fast.text.tokenizer import get_tokenizer

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ASSETS / "emoji_base.safetensors", ASSETS / "emoji_upsampler.safetensors"
EMBEDDED_INPAINTING = ASSETS / "emoji_inpaint.safetensors", EMBEDDED[1]
GUIDANCE = 3.0  # GLIDE's usual scale
EMBEDDED_GUIDANCE = 1.25  # more makes the emoji's colours, and so skin tones, too strong


class Start(NamedTuple):
    """A picture [B or 1, 3, H, W] in [-1, 1] to start from, and the share of the steps that changes it."""

    image: Tensor
    strength: float


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """How one model is sampled.

    ``eta`` is the noise added each step, None the sampler's usual; ``steps`` is a number of evenly spread
    steps of its schedule, or a respacing such as "fast27" or "10,15,20"; ``guidance`` 1 is the plain
    conditional model, 0 ignores the prompt, None is the model's usual scale, and ``rescale`` takes back that
    share of the contrast it adds; ``temperature`` scales the first noise.

    ``graph`` is what a CUDA graph holds, on a device that has them: a "step"; the whole "loop", which is
    faster for small models, costs memory for all the noise and is made for each number of steps; or "off".
    """

    sampler: str = "ddim"
    eta: float | None = None
    steps: int | str = 50
    guidance: float | None = None
    rescale: float = 0.0
    temperature: float = 1.0
    graph: Choice = "step"

    def diffusion(self, config: ModelConfig) -> GaussianDiffusion:
        """The model's schedule, respaced to these steps.

        Raises:
            ValueError: steps are not in 2 .. the schedule's length, or are no respacing.
        """
        steps = self.steps
        if isinstance(steps, int):
            if not 2 <= steps <= config.steps:
                raise ValueError(f"steps {steps} must lie in 2 .. {config.steps}; 25 to 100 is usual")
            steps = f"ddim{steps}" if config.steps % steps == 0 else str(steps)
        return GaussianDiffusion(
            schedule=_schedule(config.schedule, config.steps, steps),
            mean_type=config.prediction,
            variance_type=config.variance,
            rescale_timesteps=config.rescale_timesteps,
        )


@lru_cache(maxsize=32)
def _schedule(name: str, steps: int, respacing: str) -> Schedule:
    """One object for equal options, so that its tables are made, and moved to a device, once."""
    return Schedule.create(name, steps, respacing)


BASE_OPTIONS = StageOptions()
UPSAMPLER_OPTIONS = StageOptions(steps=20, guidance=1.0, temperature=0.997)


def sample_stage(
    stage: LoadedModel,
    prompts: Sequence[str],
    *,
    noise: NoiseSource,
    options: StageOptions,
    low_res: Tensor | None = None,
    known: MaskedImage | None = None,
    start: Start | None = None,
    progress: bool = False,
) -> Tensor:
    """One picture a prompt, [B, 3, H, W] in [-1, 1].

    Args:
        prompts: B texts; "" paints without one.
        noise: all randomness; :class:`PerImageNoise` makes picture k independent of its neighbours.
        low_res: [B, 3, h, w] in [-1, 1], for an upsampler.
        known: pixels that the pictures must keep (B or 1 of them); an inpainting model also sees them.
        start: where to start instead of from noise alone, as :func:`~glide_fast.sampling.img2img.start_from`.

    Raises:
        ValueError: an option is out of range, or the model has no text.
    """
    model, config = stage
    if config.unet.text is None:
        raise ValueError("this model is not conditioned on text, so a prompt cannot be painted with it")
    sampler = find_sampler(options.sampler)
    diffusion = options.diffusion(config)
    guidance = GUIDANCE if options.guidance is None else options.guidance
    copies = 1 if guidance == 1 else 2  # conditional rows, then unconditional ones
    texts = [*prompts, *[""] * (len(prompts) * (copies - 1))]
    words = get_tokenizer(config.unet.text.tokenizer).batch(texts, config.unet.text.context)
    device = next(model.parameters()).device
    graphs = shared_graphs(options.graph, device)
    if graphs is None:
        keep_if_it_fits(model)
    with torch.inference_mode():
        text = model.text(words.tokens.to(device), words.mask.to(device))
        timesteps = diffusion.model_timesteps(torch.arange(diffusion.steps, device=device))
        on_cpu = graphs is None and device.type == "cpu"
        timetable = model.timetable(timesteps, text=text) if on_cpu else None
    if low_res is not None:
        low_res = low_res.to(device).repeat(copies, 1, 1, 1)
    if known is not None:
        known = MaskedImage(*(part.to(device) for part in known))
    seen = _repeat(known, len(texts)) if known is not None and config.unet.inpaint else None
    denoise: Denoiser = Conditioned(
        network=model, conditions={"text": text, "low_res": low_res, "known": seen, "timetable": timetable}
    )
    if copies == 2:
        denoise = classifier_free(denoise, guidance, rescale=options.rescale)
    shape = (len(prompts), config.unet.image_channels, config.unet.image_size, config.unet.image_size)
    if start is None:
        x = initial_noise(noise, shape, device=device, temperature=options.temperature)
    else:
        x, diffusion = start_from(
            start.image.to(device).expand(shape), diffusion, start.strength, noise=noise
        )
    return sampler(
        denoise,
        x,
        diffusion,
        noise=noise,
        eta=options.eta,
        denoised_fn=None if known is None else keep_known(*known),
        progress=progress,
        graphs=graphs,
    )


def quantise(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] rounded to the 256 levels an upsampler is conditioned on."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A base model and, optionally, an upsampler: ``TextToImage.embedded()(["red apple"], seeds=[0])``.

    ``guidance`` is the base model's usual scale, for options that give none.
    """

    base: LoadedModel
    upsampler: LoadedModel | None = None
    guidance: float = GUIDANCE

    @classmethod
    def load(cls, base: str | Path, upsampler: str | Path | None = None) -> TextToImage:
        """Read the models from files, or by the names of presets.

        Raises:
            FileNotFoundError, ConnectionError, OSError, ValueError: as :func:`glide_fast.models.load_model`.
        """
        return cls(base=load_model(base), upsampler=None if upsampler is None else load_model(upsampler))

    @classmethod
    def embedded(cls) -> TextToImage:
        """The small emoji model that ships with the package: text → 32 px → 64 px."""
        model = cls.load(*EMBEDDED)
        return replace(model, guidance=EMBEDDED_GUIDANCE)

    @classmethod
    def embedded_inpainting(cls) -> TextToImage:
        """The small emoji model that completes pictures: text and a part of a picture → 32 px → 64 px."""
        return replace(cls.load(*EMBEDDED_INPAINTING), guidance=EMBEDDED_GUIDANCE)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextToImage:
        """The same models, moved to the device, with activations of ``dtype``: float16 on a GPU unless given.

        Raises:
            ValueError: as :func:`glide_fast.models.placement.placed`.
        """
        for stage in (self.base, self.upsampler):
            if stage is not None:
                placed(stage.network, device, dtype)
        return self

    @property
    def size(self) -> int:
        """Width and height of the pictures, in pixels."""
        return (self.upsampler or self.base).config.unet.image_size

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        base_options: StageOptions = BASE_OPTIONS,
        upsampler_options: StageOptions = UPSAMPLER_OPTIONS,
        known: MaskedImage | None = None,
        start: Start | None = None,
        progress: bool = False,
    ) -> NDArray[np.uint8]:
        """Paint one picture a prompt and seed: uint8 [B, H, W, 3].

        Picture k depends on prompt k and seed k alone, up to rounding that differs with the batch size.
        ``known`` holds pixels to keep, of the final size: [B or 1, 3, H, W] in [-1, 1] with their mask;
        ``start`` a picture of that size that the base model starts from.
        :mod:`glide_fast.sampling.editing` makes both from pictures.

        Raises:
            ValueError: prompts and seeds differ in number, or an option is out of range.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed a prompt, at least one"
            )
        noise = PerImageNoise(seeds)
        if base_options.guidance is None:
            base_options = replace(base_options, guidance=self.guidance)
        small = self.base.config.unet.image_size
        pictures = sample_stage(
            self.base,
            prompts,
            noise=noise,
            options=base_options,
            known=None if known is None else _shrink(known, small),
            start=None if start is None else Start(_averaged(start.image, small), start.strength),
            progress=progress,
        )
        if self.upsampler is not None:
            pictures = sample_stage(
                self.upsampler,
                prompts,
                noise=noise,
                options=upsampler_options,
                low_res=quantise(pictures),
                known=known,
                progress=progress,
            )
        return to_uint8(pictures)


def _repeat(known: MaskedImage, rows: int) -> MaskedImage:
    """One picture and mask a row, for a batch that repeats the pictures."""
    image, mask = (part.repeat(rows // part.shape[0], 1, 1, 1) for part in known)
    return MaskedImage(image, mask)


def _shrink(known: MaskedImage, size: int) -> MaskedImage:
    """The known pixels at a base model's size: averages, known only where every pixel under them is."""
    image, mask = (_averaged(part, size) for part in known)
    return MaskedImage(image, (mask == 1).to(mask.dtype))


def _averaged(pictures: Tensor, size: int) -> Tensor:
    """Pictures [B, C, H, W] averaged over blocks to ``size`` pixels."""
    return F.avg_pool2d(pictures, pictures.shape[-1] // size)
