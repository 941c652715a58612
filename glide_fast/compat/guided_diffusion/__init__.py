"""The module paths, names and signatures of openai/guided-diffusion (ADM, arXiv 2105.05233)."""
