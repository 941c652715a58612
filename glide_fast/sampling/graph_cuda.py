"""The graphs of CUDA and ROCm for :mod:`glide_fast.sampling.graph`, and those that a process shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal, get_args

import torch

from glide_fast.sampling.graph import CannotCaptureError, Graphs, Recording, Tensors, Unit

Choice = Literal["step", "loop", "off"]
_SHARE = 4  # graphs may take this part of a device's memory: a quarter


class CudaRecording:
    """A captured graph with the memory pool of its own that it works in."""

    def __init__(self, graph: torch.cuda.CUDAGraph, nbytes: int) -> None:
        self.nbytes: int | None = nbytes
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Captures on a stream beside the current one, where what is captured ran once before.

    Random numbers are not drawn inside: the generator's state is the same before and after, also where
    capturing fails.
    """

    def __init__(self) -> None:
        self._streams: dict[Hashable, torch.cuda.Stream] = {}

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def place(self, device: torch.device) -> Hashable:
        if torch.cuda.is_current_stream_capturing():
            raise CannotCaptureError("the sampler is itself being captured")
        return device, torch.cuda.current_stream(device).cuda_stream

    def room(self, device: torch.device) -> int | None:
        return torch.cuda.get_device_properties(device).total_memory // _SHARE

    def warm_up(self, device: torch.device, function: Callable[[], Tensors]) -> Tensors:
        current, side = torch.cuda.current_stream(device), self._stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            results = function()
        current.wait_stream(side)
        return results

    def record(self, device: torch.device, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        generator = torch.cuda.default_generators[device.index or 0]
        before, graph, side = generator.clone_state(), torch.cuda.CUDAGraph(), self._stream(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        try:
            # The outer context gives the stream back where the inner one fails to.
            with (
                torch.cuda.stream(side),
                torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
            ):
                results = function()
        except RuntimeError:
            generator.graphsafe_set_state(before)  # a failed capture leaves the other one unusable
            raise
        return CudaRecording(graph, torch.cuda.memory_reserved(device) - reserved), results

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The one beside the current stream: workspaces of libraries, which go by stream, are not shared."""
        place = device, torch.cuda.current_stream(device).cuda_stream
        if place not in self._streams:
            self._streams[place] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[place]


_recorder = CudaRecorder()
SHARED: dict[Unit, Graphs] = {"step": Graphs(_recorder, "step"), "loop": Graphs(_recorder, "loop")}
"""The graphs of this process by unit; ``SHARED["step"].clear()`` gives their memory back."""


def shared_graphs(choice: Choice, device: torch.device) -> Graphs | None:
    """The process's graphs of that unit, for a sampler on a device; None where that has no graphs.

    Raises:
        ValueError: an unknown choice.
    """
    if choice not in get_args(Choice):
        raise ValueError(f"unknown graph {choice!r}; known: {', '.join(get_args(Choice))}")
    if choice == "off" or not SHARED[choice].recorder.serves(device):
        return None
    return SHARED[choice]
