"""From noise to pictures: denoisers, noise sources, guidance, samplers and inpainting."""

from glide_fast.sampling.denoiser import Denoiser, NoiseSource, PerImageNoise, global_noise, initial_noise
from glide_fast.sampling.guidance import classifier_free
from glide_fast.sampling.inpainting import keep_known
from glide_fast.sampling.samplers import SAMPLERS, Step, ddim, ddim_encode, ddpm, find_sampler

__all__ = [
    "SAMPLERS",
    "Denoiser",
    "NoiseSource",
    "PerImageNoise",
    "Step",
    "classifier_free",
    "ddim",
    "ddim_encode",
    "ddpm",
    "find_sampler",
    "global_noise",
    "initial_noise",
    "keep_known",
]
