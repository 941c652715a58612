"""GLIDE's noise-aware CLIP, with the module paths of glide-text2im."""
