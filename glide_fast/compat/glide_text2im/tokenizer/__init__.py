"""GLIDE's own tokenizer (``bpe``) and the one of its CLIP (``simple_tokenizer``)."""
