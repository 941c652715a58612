"""Where and how a suite is measured: on the CPU, on a GPU, or as on a GPU but on the CPU, to rehearse it.

On a GPU networks compute in float16 and train in bfloat16, and time is that between two CUDA events. A
rehearsal does all of that on CPU tensors with an ordinary clock, so that the suites can be tested anywhere.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from bench.machine import peak_of_call

DEVICES = ("cpu", "cuda", "rehearsal")
Network = TypeVar("Network", bound=nn.Module)
Clock = Callable[[], float]


class EventClock:
    """Seconds on the device: a reading waits for all work before it and is the time of an event behind it."""

    def __init__(self) -> None:
        self.origin = self._event()

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        return 1e-3 * float(self.origin.elapsed_time(self._event()))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
        return event


@dataclass(frozen=True)
class Place:
    """A device, the dtype of activations there, and whether a GPU's habits apply."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    gpu: bool = False

    @classmethod
    def of(cls, device: str) -> Place:
        """The place that an option names, one of DEVICES.

        Raises:
            RuntimeError: there is no GPU that this torch can use.
        """
        if device == "cpu":
            return cls()
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"this torch {torch.__version__} can use no GPU here; use --device cpu")
        return cls("cuda" if device == "cuda" else "cpu", torch.float16, gpu=True)

    @property
    def single(self) -> Place:
        """The same place with activations in float32."""
        return replace(self, dtype=torch.float32)

    @property
    def training_dtype(self) -> torch.dtype:
        """Of the activations in training."""
        return torch.bfloat16 if self.gpu else torch.float32

    def clock(self) -> Clock:
        """A new clock, in seconds."""
        return EventClock() if self.device == "cuda" else time.perf_counter

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, in its own dtype, with such numbers as the activations' dtype can hold."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype).to(tensor.dtype)
        return tensor.to(self.device)

    def moved(self, network: Network) -> Network:
        """The network on the device, with such weights as ``dtype`` can hold: those of both sides."""
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.to(self.dtype))
        return network.to(self.device)

    def plain(self, twin: Network) -> Network:
        """The original's network as it computes here: in half precision a copy, with all but norms in it."""
        return twin if self.dtype is torch.float32 else self.narrowed(copy.deepcopy(twin))

    def narrowed(self, network: Network) -> Network:
        """The network itself with everything but norms in ``dtype``."""
        for module in network.modules():
            if "norm" in type(module).__name__.lower():
                continue
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(self.dtype)
        return network

    def inputs(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs in ``dtype``, but for integers."""
        return tuple(each.to(self.dtype) if each.is_floating_point() else each for each in tensors)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call needs beyond what is resident before it; None where that is not known."""
        if self.device != "cuda":
            return peak_of_call(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


CPU = Place()
