"""From noise to pictures: denoisers, noise sources, guidance, samplers, inpainting and variations."""

from glide_fast.sampling.denoiser import (
    Conditioned,
    Denoiser,
    NoiseSource,
    PerImageNoise,
    global_noise,
    initial_noise,
)
from glide_fast.sampling.gradients import (
    classifier_gradient,
    clip_gradient,
    gradient_of,
    noisy_clip_gradient,
)
from glide_fast.sampling.graph import Graphs
from glide_fast.sampling.graph_cuda import SHARED as SHARED_GRAPHS
from glide_fast.sampling.guidance import along_gradient, classifier_free, within
from glide_fast.sampling.img2img import start_from
from glide_fast.sampling.inpainting import keep_known
from glide_fast.sampling.run import Sampler, Step
from glide_fast.sampling.samplers import (
    SAMPLERS,
    ddim,
    ddim_encode,
    ddpm,
    euler,
    euler_ancestral,
    find_sampler,
)
from glide_fast.sampling.solvers import dpm_solver, dpm_solver_sde, heun, plms, unipc

__all__ = [
    "SAMPLERS",
    "SHARED_GRAPHS",
    "Conditioned",
    "Denoiser",
    "Graphs",
    "NoiseSource",
    "PerImageNoise",
    "Sampler",
    "Step",
    "along_gradient",
    "classifier_free",
    "classifier_gradient",
    "clip_gradient",
    "ddim",
    "ddim_encode",
    "ddpm",
    "dpm_solver",
    "dpm_solver_sde",
    "euler",
    "euler_ancestral",
    "find_sampler",
    "global_noise",
    "gradient_of",
    "heun",
    "initial_noise",
    "keep_known",
    "noisy_clip_gradient",
    "plms",
    "start_from",
    "unipc",
    "within",
]
