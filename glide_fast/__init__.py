"""The diffusion family of GLIDE, ADM and Improved DDPM on fused kernels: models, samplers, trainer."""

__version__ = "0.1.0"
