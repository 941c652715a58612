"""The module paths, names and signatures of openai/improved-diffusion (arXiv 2102.09672)."""
