"""From prompts to pictures: a base stage, then an upsampler, each one model, one sampler and one schedule.

GLIDE (arXiv 2112.10741): the base model is guided, the upsampler is conditioned on its quantised pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glide_fast.data.images import to_uint8
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.models import ModelConfig, UNet, load_model
from glide_fast.sampling.denoiser import Denoiser, PerImageNoise, initial_noise
from glide_fast.sampling.guidance import classifier_free
from glide_fast.sampling.samplers import find_sampler
from glide_fast.text.tokenizer import get_tokenizer


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """How one model is sampled: which sampler, how many steps of its schedule, how strongly guided.

    ``steps`` is a number of evenly spread steps; guidance 1 is the plain conditional model.
    """

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 3.0

    def diffusion(self, config: ModelConfig) -> GaussianDiffusion:
        """The model's schedule, respaced to these steps.

        Raises:
            ValueError: steps are not in 2 .. the schedule's length.
        """
        if not 2 <= self.steps <= config.steps:
            raise ValueError(f"steps {self.steps} must lie in 2 .. {config.steps}; 25 to 100 is usual")
        spacing = f"ddim{self.steps}" if config.steps % self.steps == 0 else str(self.steps)
        return GaussianDiffusion(schedule=Schedule.create(config.schedule, config.steps, spacing))


BASE_OPTIONS = StageOptions()
UPSAMPLER_OPTIONS = StageOptions(steps=20, guidance=1.0)


def sample_stage(
    model: UNet,
    config: ModelConfig,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    options: StageOptions,
    low_res: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """One picture a prompt, [B, 3, H, W] in [-1, 1]; the picture of ``seeds[k]`` does not depend on its neighbours.

    Args:
        prompts: B texts; "" paints without one.
        low_res: [B, 3, h, w] in [-1, 1], for an upsampler.

    Raises:
        ValueError: an option is out of range, or the model has no text.
    """
    text_config = config.unet.text
    if text_config is None:
        raise ValueError("this model is not conditioned on text, so a prompt cannot be painted with it")
    sampler = find_sampler(options.sampler)
    diffusion = options.diffusion(config)
    guided = options.guidance != 1
    texts = [*prompts, *[""] * len(prompts)] if guided else list(prompts)
    words = get_tokenizer(text_config.tokenizer).batch(texts, text_config.context)
    device = next(model.parameters()).device
    with torch.inference_mode():
        text = model.text(words.tokens.to(device), words.mask.to(device))
    if low_res is not None:
        low_res = low_res.to(device).repeat(2 if guided else 1, 1, 1, 1)

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        return model(x, timesteps, text=text, low_res=low_res)

    denoiser: Denoiser = classifier_free(denoise, options.guidance) if guided else denoise
    noise = PerImageNoise(seeds)
    size = config.unet.image_size
    start = initial_noise(noise, (len(prompts), config.unet.image_channels, size, size), device=device)
    return sampler(denoiser, start, diffusion, noise=noise, progress=progress)


def quantise(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] rounded to the 256 levels an upsampler is conditioned on."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A base model and, optionally, an upsampler: ``TextToImage.embedded()(["a red apple"], seeds=[0])``."""

    base: UNet
    base_config: ModelConfig
    upsampler: UNet | None = None
    upsampler_config: ModelConfig | None = None

    @classmethod
    def load(cls, base: Path, upsampler: Path | None = None) -> TextToImage:
        """Read the models from safetensors files; errors as :func:`glide_fast.models.load_model`."""
        model, config = load_model(base)
        second = (None, None) if upsampler is None else load_model(upsampler)
        return cls(base=model, base_config=config, upsampler=second[0], upsampler_config=second[1])

    @classmethod
    def embedded(cls) -> TextToImage:
        """The small emoji model that ships with the package: text → 32 px → 64 px."""
        assets = Path(__file__).parent.parent / "assets"
        return cls.load(assets / "emoji_base.safetensors", assets / "emoji_upsampler.safetensors")

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        base_options: StageOptions = BASE_OPTIONS,
        upsampler_options: StageOptions = UPSAMPLER_OPTIONS,
        progress: bool = False,
    ) -> NDArray[np.uint8]:
        """Paint one picture a prompt and seed: uint8 [B, H, W, 3].

        Raises:
            ValueError: prompts and seeds differ in number, or an option is out of range.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed a prompt, at least one"
            )
        pictures = sample_stage(
            self.base, self.base_config, prompts, seeds=seeds, options=base_options, progress=progress
        )
        if self.upsampler is not None and self.upsampler_config is not None:
            pictures = sample_stage(
                self.upsampler,
                self.upsampler_config,
                prompts,
                seeds=seeds,
                options=upsampler_options,
                low_res=quantise(pictures),
                progress=progress,
            )
        return to_uint8(pictures)
