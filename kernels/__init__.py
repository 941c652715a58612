"""Triton implementations of the ops, one family a file; installed as `glide_fast.kernels`.

This is the door for the CUDA key, which ROCm uses too. `REGISTERED` names each op with the module that
serves it, by a function of the op's name and arguments. `register` puts a stand-in for each behind the CUDA
key: Triton and the module are imported at the first call on a GPU, never before. A GPU that is too old keeps
the default.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from glide_fast.kernels import launch


class Kernel(NamedTuple):
    """Where the implementation of an op is, and what doctor says of it."""

    module: str  # in this package; holds a function named as the op
    covers: str  # "float32, bfloat16 and float16; all else by the default"


_ATTENTION = "float32, bfloat16, float16; heads of up to 128 channels; all else by the reference"
_GROUP_NORM = (
    "float32, bfloat16, float16, any strides; resampling of maps (1-D and 3-D inputs are resampled by the "
    "reference); all else by the reference"
)
_DROPPED = (
    "float32, bfloat16, float16, any strides, outside of captured and compiled code; all else by PyTorch"
)
_CONVOLUTION = (
    "the norm as group_norm; 3x3 convolutions of float32, bfloat16, float16 maps by weights that were chosen "
    'for it (accelerate(model, conv="triton")), all others by cuDNN'
)
_LINEAR = (
    "from 64 rows on, bfloat16 and float16 with a second input or a residual, and float32 too with weights "
    'that were chosen for it (accelerate(model, conv="triton")); all else by cuBLAS'
)
_LAYER_NORM = "float32, bfloat16, float16; rows of up to 16384 numbers; all else by the default"
_ACTIVATION = "float32, bfloat16, float16; float64 by the default"
_HYBRID_LOSS = "float32 pictures, outputs of any width; all else by the reference"
REGISTERED: dict[str, Kernel] = {
    "attention": Kernel("attention", _ATTENTION),
    "attention_backward": Kernel("attention_backward", _ATTENTION),
    "projected_attention_backward": Kernel("attention_backward", _ATTENTION),
    "group_norm": Kernel("group_norm", _GROUP_NORM),
    "group_norm_backward": Kernel("group_norm_backward", _GROUP_NORM),
    "dropped_group_norm": Kernel("dropped_group_norm", _DROPPED),
    "dropped_group_norm_backward": Kernel("dropped_group_norm", _DROPPED),
    "layer_norm": Kernel("layer_norm", _LAYER_NORM),
    "layer_norm_backward": Kernel("layer_norm", _LAYER_NORM),
    "activation": Kernel("activation", _ACTIVATION),
    "activation_backward": Kernel("activation", _ACTIVATION),
    "norm_convolution": Kernel("norm_convolution", _CONVOLUTION),
    "norm_convolution_backward": Kernel("norm_convolution", _CONVOLUTION),
    "linear": Kernel("linear", _LINEAR),
    "adamw": Kernel("adamw", "float32 weights, gradients of any width; all else by the reference"),
    "gradient_norm": Kernel("gradient_norm", "float32, bfloat16, float16; all else by the reference"),
    "hybrid_loss": Kernel("hybrid_loss", _HYBRID_LOSS),
    "hybrid_loss_backward": Kernel("hybrid_loss", _HYBRID_LOSS),
    "sampler_step": Kernel(
        "sampler_step", "float32 pictures and outputs of any width; all else by the reference"
    ),
}


class _Implement(Protocol):
    def __call__(
        self, op: str, device: str, function: Callable[..., Any], *, name: str, reason: str
    ) -> None: ...


def register(implement: _Implement, default: Callable[[str], Callable[..., Any]]) -> None:
    """Put the kernels behind the CUDA key of their ops; needs neither Triton nor a GPU yet.

    Args:
        implement: registers a function for an op's device key, as `ops.dispatch.implement` does.
        default: finds what serves an op on devices that have nothing of their own.
    """
    for op, kernel in REGISTERED.items():
        implement(op, "CUDA", _stand_in(op, kernel, default), name="Triton", reason=kernel.covers)


def _stand_in(op: str, kernel: Kernel, default: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    """An implementation that imports its module at the first call and computes on its arguments' device."""
    served: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        device = launch.device_of(arguments)
        if launch.too_old(device) is not None:
            return default(op)(*arguments)
        if not served:
            served.append(getattr(importlib.import_module(f"glide_fast.kernels.{kernel.module}"), op))
        with torch.cuda.device(device):
            return served[0](*arguments)

    return call
