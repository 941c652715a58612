"""CLIP's tokenizer; what CLIP's module of this name offers."""

from glide_fast.compat.clip_tokens import SimpleTokenizer, default_bpe

__all__ = ["SimpleTokenizer", "default_bpe"]
