"""The module paths, names and signatures of openai/glide-text2im (GLIDE, arXiv 2112.10741)."""
