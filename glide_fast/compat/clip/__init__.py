"""The module paths, names and signatures of openai/CLIP (arXiv 2103.00020)."""

from glide_fast.compat.clip.clip import available_models, load, tokenize

__all__ = ["available_models", "load", "tokenize"]
