"""Who computes a model's convolutions and linear layers on a GPU: its own library, or our Triton kernels."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import nn

from glide_fast import ops

Products: TypeAlias = Literal["library", "triton"]
_OP = "norm_convolution"


def check_products(model: nn.Module, conv: Products) -> None:
    """Raise ``ValueError`` where a choice is unknown, or would have no effect on this model or machine."""
    if conv not in get_args(Products):
        raise ValueError(f"unknown conv {conv!r}; use one of {', '.join(get_args(Products))}")
    if conv == "library":
        return
    row = next(row for row in ops.implementations() if (row.op, row.device) == (_OP, "CUDA"))
    if row.name != "Triton":
        raise ValueError(f'conv="triton" is not possible here: {row.reason}; use conv="library"')
    devices = {parameter.device.type for parameter in model.parameters()} - {"cuda"}
    if devices:
        raise ValueError(
            f'conv="triton" concerns GPUs, but the model has weights on {", ".join(sorted(devices))}; call '
            'model.to("cuda") first, or leave conv out'
        )
