"""From picture files and fonts to captioned arrays, and from tensors back to picture files."""
