"""One process, or several started by torchrun: the original projects' ``dist_util`` without MPI."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["GPUS_PER_NODE", "dev", "load_state_dict", "setup_dist", "sync_params"]

GPUS_PER_NODE = 8


def setup_dist() -> None:
    """Join the process group that torchrun's environment describes, or make one of this process alone.

    Raises:
        RuntimeError: this is one of several processes of mpiexec, which would each train a model of its own.
    """
    if dist.is_initialized():
        return
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "RANK" not in os.environ and int(os.environ.get(name, "1")) > 1:
            raise RuntimeError(
                f"{name} is {os.environ[name]}, but processes of mpiexec do not find one another here; "
                "start them with torchrun --nproc-per-node N -m glide_fast.compat SCRIPT"
            )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in torch's stubs
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def dev() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def load_state_dict(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """What ``torch.save`` wrote; keywords as torch's. Code in the file is not run unless asked for."""
    return torch.load(path, **kwargs)


def sync_params(params: Iterable[Tensor]) -> None:
    """Copy tensors of the first process to all others."""
    if world_size() > 1:
        with torch.no_grad():
            for parameter in params:
                dist.broadcast(parameter, 0)


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def replicas_on_cpu() -> Iterator[None]:
    """Inside a ``with`` block, networks on the CPU can be replicated by scripts that name their device.

    ``DistributedDataParallel`` takes ``device_ids`` of GPUs only; the originals' scripts always give them.
    """
    original = DistributedDataParallel.__init__

    def lenient(
        self: DistributedDataParallel,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            device_ids = output_device = None
        original(self, module, device_ids, output_device, *args, **kwargs)

    DistributedDataParallel.__init__ = lenient  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = original  # type: ignore[method-assign]
