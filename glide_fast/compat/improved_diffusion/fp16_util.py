"""Half-precision training; what improved-diffusion's module of this name offers: one flat master vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from glide_fast.compat import half
from glide_fast.compat.half import convert_module_to_f16, convert_module_to_f32, zero_grad

__all__ = [
    "convert_module_to_f16",
    "convert_module_to_f32",
    "make_master_params",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "unflatten_master_params",
    "zero_grad",
]


def make_master_params(model_params: Iterable[Tensor]) -> list[nn.Parameter]:
    """A list of one float32 vector with all parameters."""
    return half.make_master_params(half.one_group(model_params))


def model_grads_to_master_grads(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> None:
    """Copy the model's gradients to the master vector."""
    half.model_grads_to_master_grads(half.one_group(model_params), master_params)


def master_params_to_model_params(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> None:
    """Copy the master vector to the model."""
    half.master_params_to_model_params(half.one_group(model_params), master_params)


def unflatten_master_params(model_params: Iterable[Tensor], master_params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters as views of the master vector."""
    [(group, _)] = half.one_group(model_params)
    return half.unflatten_master_params(group, master_params[0])
