"""Half-precision weights of a torso; what glide-text2im's module of this name offers to its U-Nets."""

from glide_fast.compat.half import convert_module_to_f16, convert_module_to_f32

__all__ = ["convert_module_to_f16", "convert_module_to_f32"]
