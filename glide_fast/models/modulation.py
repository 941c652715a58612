"""What all blocks of a U-Net compute of the same input, by one product on a GPU.

Every residual block projects the timestep's embedding. On a GPU each of these small products costs a
launch, and a step has dozens. Where nothing is differentiated, their weights are therefore laid behind each
other in memory once, as views that the layers keep as their own; then one product serves all, and weights
that change in place are right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.layers import Linear, ResBlock, is_watched

_lock = threading.Lock()


def modulations(
    blocks: Sequence[ResBlock], embedding: Tensor, dtype: torch.dtype
) -> Tensor | dict[nn.Module, Tensor]:
    """The embedding [B, E] itself; on a GPU without gradients each block's projection of it in ``dtype``."""
    if torch.is_grad_enabled() or embedding.device.type == "cpu" or not blocks:
        return embedding
    layers = [block.emb_layers["1"] for block in blocks]
    if not all(
        type(layer) is Linear and layer.bias is not None and not is_watched(layer) for layer in layers
    ):
        return embedding
    return projected(blocks, embedding, dtype)


def projected(blocks: Sequence[ResBlock], embedding: Tensor, dtype: torch.dtype) -> dict[nn.Module, Tensor]:
    """Each block's projection [B, modulation] of the embedding [B, E], by one product."""
    layers: list[Any] = [block.emb_layers["1"] for block in blocks]
    with _lock:
        weight, bias = joined([layer.weight for layer in layers]), joined([layer.bias for layer in layers])
    y = ops.linear(embedding.to(weight.dtype), weight, bias.to(weight.dtype)).to(dtype)
    parts = torch.split(y, [layer.out_features for layer in layers], dim=1)
    return dict(zip(blocks, parts, strict=True))


def joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters [K, ...] that differ in K alone as one tensor [sum of K, ...] of which they are views.

    Where they are not yet, they become so: their values are copied, and each is given its part.
    """
    first = parameters[0]
    if not _are_neighbours(parameters):
        with torch.inference_mode(mode=False), torch.no_grad():
            whole = torch.cat([each.detach() for each in parameters])
            parts = torch.split(whole, [len(each) for each in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part
    rows = sum(len(each) for each in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _are_neighbours(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether each parameter begins in memory where the one before it ends."""
    storage, place = parameters[0].untyped_storage()._cdata, parameters[0].storage_offset()
    for each in parameters:
        if each.untyped_storage()._cdata != storage or each.storage_offset() != place:
            return False
        if not each.is_contiguous():
            return False
        place += each.numel()
    return True
