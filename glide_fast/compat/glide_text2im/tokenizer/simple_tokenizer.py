"""The tokenizer of GLIDE's CLIP; what glide-text2im's module of this name offers."""

from glide_fast.compat.clip_tokens import SimpleTokenizer, default_bpe

__all__ = ["SimpleTokenizer", "default_bpe"]
