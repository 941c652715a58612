"""A network where it is to paint: on a device, with activations of a dtype, and its weights as they are read.

Weights follow the dtype of the activations at each use (:mod:`glide_fast.models.layers`). For painting they
are kept in it: rounded once as they would be at every step, they give the same bits for less memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from glide_fast.models.layers import CONVOLUTIONS, Linear, PointwiseConv
from glide_fast.models.unet import UNet

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Of the activations: float16 on a GPU, as the published models have it; else float32."""
    return torch.float16 if device.type == "cuda" else torch.float32


def placed(network: UNet, device: torch.device | str, dtype: torch.dtype | None = None) -> UNet:
    """The network itself, moved to the device, with activations of ``dtype``, for painting.

    Convolutions, projections and the text transformer keep their weights in ``dtype``; norms, embeddings, the
    layers of the timestep and the last one compute in float32, as published. On a GPU maps are channels-last.

    Args:
        dtype: float32, float16 or bfloat16; None: :func:`usual_dtype` of the device.

    Raises:
        ValueError: another dtype, a network that is being trained, or a weight too large for the dtype.
    """
    device = torch.device(device)
    dtype = usual_dtype(device) if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"activations cannot be {dtype}; use float32, float16 or bfloat16")
    if any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("this network is being trained; place a copy of it, with requires_grad_(False)")
    network.to(device)
    rounded = {id(parameter) for parameter in _followers(network)}
    for name, parameter in network.named_parameters():
        kept = dtype if id(parameter) in rounded else torch.float32
        parameter.data = _converted(name, parameter.detach(), kept)
    if device.type == "cuda" and network.config.dims == 2:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    network.compute_dtype = dtype
    return network


def _followers(network: UNet) -> Iterator[nn.Parameter]:
    """The parameters that are read in the dtype of the activations."""
    for stage in network.stages():
        for module in stage.modules():
            if isinstance(module, (*CONVOLUTIONS.values(), PointwiseConv)):
                yield from module.parameters()
    if network.config.text is not None:
        for part in (network.transformer, network.transformer_proj):
            for module in part.modules():
                if isinstance(module, Linear):
                    yield from module.parameters()


def _converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    converted = weight.to(dtype)
    if dtype is torch.float16 and weight.device.type != "meta" and not converted.isfinite().all():
        raise ValueError(f"{name} has numbers too large for float16; use bfloat16 or float32")
    return converted
