"""What the launchers of all kernels share: which GPU this is, and how tensors are handed over.

Importing this needs no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

OLDEST = (8, 0)  # bfloat16 and asynchronous copies
# The GPU whose configurations serve CPU tensors, which only Triton's interpreter takes; tests may change it.
INTERPRETED_AS = "sm_90"
_DESCRIPTOR_ALIGNMENT = 16  # bytes, of base and strides


def device_of(arguments: Iterable[Any]) -> torch.device:
    """The device of the first tensor, or of the first tensor of a list, among an op's arguments.

    Raises:
        ValueError: there is no tensor.
    """
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0].device
    raise ValueError("the op was called without a tensor; give it one")


def architecture(device: torch.device) -> str:
    """The name of a GPU's instruction set, "sm_90" or "gfx942"."""
    if device.type != "cuda":
        return INTERPRETED_AS
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels, or None if it can."""
    name = architecture(device)
    if not name.startswith("sm_") or number(name) >= 10 * OLDEST[0] + OLDEST[1]:
        return None
    model = torch.cuda.get_device_name(device)
    return f"{model} is {name}; the Triton kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"


def number(architecture: str) -> int:
    """90 of "sm_90"; 0 for a GPU that is not NVIDIA's."""
    return int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else 0


def takes_descriptors(*tensors: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can read tensors through `descriptor`; absent ones can.

    It is there from sm_90 on and wants base and strides at multiples of 16 bytes, and a dense last dimension.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if number(architecture(present[0].device)) < 90:
        return False
    return all(
        tensor.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
        and tensor.stride(-1) == 1
        and tensor.numel() > 0
        and all(
            stride > 0 and stride * tensor.element_size() % _DESCRIPTOR_ALIGNMENT == 0
            for stride in tensor.stride()[:-1]
        )
        for tensor in present
    )


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> Any:
    """A host descriptor of a tensor that is read or written in blocks; outside it reads zero, writes nothing.

    Descriptors made on the host need no scratch memory on the device, so they survive in a CUDA graph.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor with stride 1 in its last dimension: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
