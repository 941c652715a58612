"""Several processes started by torchrun train one model: who is who, and what they tell one another.

    torchrun --nproc-per-node 8 --no-python glide-fast train configs/emoji_base.toml --out runs/base

Each takes an equal part of every batch. Gradients are averaged by DDP, or by FSDP2, under which each process
also keeps only its share of weights, gradients, moments and average.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from glide_fast.models.noisy_clip import Block
from glide_fast.models.transformer import TransformerBlock
from glide_fast.models.trunk import Stage

BLOCKS = (Stage, TransformerBlock, Block)  # what FSDP gathers at a time
PATIENCE = timedelta(minutes=30)  # for a process that draws samples or writes a checkpoint while others wait
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "nccl")


class LostProcessError(RuntimeError):
    """Another process of the run has ended; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ``size`` of the run, and its device; one process alone unless said."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a device does not change)

    def part(self, batch: int) -> slice:
        """The places in a batch that are this process's, all of the same number."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, values: Tensor) -> Tensor:
        """[B / size, ...] of each process -> [B, ...] in the order of the batch, without gradients."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def objects(self, value: Any) -> list[Any]:
        """What each process gives, in order of rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is true for any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def first(self, work: Callable[[], None]) -> None:
        """The first process does the work while the others wait; an ``OSError`` of it is everybody's.

        Raises:
            OSError: the work failed so, on whichever process it was.
        """
        if self.size == 1:
            work()
            return
        failure: OSError | None = None
        if self.rank == 0:
            try:
                work()
            except OSError as error:
                failure = error
        message = self.objects(None if failure is None else str(failure))[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise OSError(f"the first process failed: {message}")

    def check_batch(self, batch: int, accumulate: int) -> None:
        """Raise ``ValueError`` naming the nearest number of processes that can share the batch."""
        parts = batch // accumulate
        if parts % self.size:
            divisors = [number for number in range(1, parts + 1) if parts % number == 0]
            nearest = min(divisors, key=lambda number: (abs(number - self.size), -number))
            raise ValueError(
                f"batch {batch}, taken in accumulate = {accumulate} parts, cannot be shared equally by "
                f"{self.size} processes; the nearest number of processes that can is {nearest}"
            )


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's environment describes, left again at the end; else one process alone.

    Raises:
        LostProcessError: another process ended, which this one noticed when it waited for it.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    try:
        yield world
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
        if not lost or world.size == 1:
            raise
        raise LostProcessError(
            f"process {world.rank} of {world.size} lost the others, of which one has ended; look for its "
            f"message, and start the run again: it goes on from the last checkpoint ({error})"
        ) from error
    finally:
        dist.destroy_process_group()


def shared(model: nn.Module, world: World, sharding: Literal["ddp", "fsdp"]) -> nn.Module:
    """What is called instead of ``model`` to train it in this world; FSDP changes ``model`` itself."""
    if world.size == 1:
        return model
    if sharding == "ddp":
        return DistributedDataParallel(
            model, device_ids=[world.device] if world.device.type == "cuda" else None
        )
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 knows no other
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [each for each in model.modules() if isinstance(each, BLOCKS)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def gradient_exchange(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the passes of a part of a batch: gradients are exchanged with the ``last`` part alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    waits = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
        yield


def everybodys(rows: Tensor) -> Tensor:
    """[B / size, C] of each process -> [B, C] in the order of the batch, with gradients to every process."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    return torch.cat(all_gather(rows.contiguous()))  # type: ignore[no-untyped-call]


def first_row(rows: int) -> int:
    """The place in the batch of this process's first row, of ``rows`` that each process has."""
    return dist.get_rank() * rows if dist.is_initialized() else 0


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this one may be a shard; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
