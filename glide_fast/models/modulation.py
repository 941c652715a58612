"""What the residual blocks of a U-Net compute of the timestep alone.

Every one of them projects the timestep's embedding, and a step has dozens. On a GPU each of these small
products costs a launch, so that one product serves all. Where nothing is differentiated, their weights are
laid behind each other in memory once, as views that the layers keep as their own, and weights that change in
place are right; for a training step see :mod:`~glide_fast.models.together`. On a CPU each reads a whole
weight for a few rows: a :class:`Timetable` has the rows of all steps of a sampler, by one product a block.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from glide_fast import ops
from glide_fast.models.blocks import ResBlock
from glide_fast.models.layers import is_watched
from glide_fast.models.together import can_be_together, together

Modulations: TypeAlias = dict[nn.Module, tuple[Tensor, ...]]  # scale and shift, or what is added, [B, ...]

_lock = threading.Lock()


MOST_TIMETABLE_BYTES = 1 << 27


class Timetable(NamedTuple):
    """What every residual block makes of each of a sampler's timesteps [S]: [S, B, modulation] each."""

    timesteps: Tensor
    projections: tuple[Tensor, ...]

    def at(self, timesteps: Tensor) -> tuple[Tensor, ...] | None:
        """The projections [B, modulation] at the one timestep of all of [B]; None if it is not here."""
        first = timesteps[:1]
        found = (self.timesteps == first).nonzero()
        if not len(found) or not bool((timesteps == first).all()):
            return None
        step = int(found[0])
        return tuple(each[step] for each in self.projections)


def timetable(blocks: Sequence[ResBlock], timesteps: Tensor, embeddings: Tensor) -> Timetable | None:
    """The timetable of embeddings [S, B, E] with their SiLU applied.

    None if it would take too much memory, or if a hook waits for a projection at every step.
    """
    layers: list[Any] = [block.emb_layers["1"] for block in blocks]
    if any(is_watched(layer) for layer in layers):
        return None
    if embeddings[..., 0].numel() * sum(4 * layer.out_features for layer in layers) > MOST_TIMETABLE_BYTES:
        return None
    return Timetable(timesteps, tuple(layer(embeddings) for layer in layers))


def modulations(blocks: Sequence[ResBlock], embedding: Tensor, dtype: torch.dtype) -> Tensor | Modulations:
    """The embedding [B, E] itself; on a GPU what each block makes of it in ``dtype``.

    On a GPU too it is the embedding if a hook waits for a projection, or other processes have shares of one.
    """
    if embedding.device.type == "cpu":
        return embedding
    if not can_be_together([block.emb_layers["1"] for block in blocks]):
        return embedding
    return projected(blocks, embedding, dtype)


def projected(blocks: Sequence[ResBlock], embedding: Tensor, dtype: torch.dtype) -> Modulations:
    """What each block makes of the embedding [B, E], by one product."""
    layers: list[Any] = [block.emb_layers["1"] for block in blocks]
    if torch.is_grad_enabled():
        y = together(embedding, layers)
    else:
        with _lock:
            weight, bias = (
                joined([layer.weight for layer in layers]),
                joined([layer.bias for layer in layers]),
            )
        y = ops.linear(embedding.to(weight.dtype), weight, bias.to(weight.dtype))
    widths = [block.modulation_widths for block in blocks]
    parts = iter(torch.split(y.to(dtype), list(chain(*widths)), dim=1))
    return {block: tuple(islice(parts, len(each))) for block, each in zip(blocks, widths, strict=True)}


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
