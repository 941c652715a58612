"""What is asked of CUDA, in which order, and what is put right after a failure: on a pretended device.

Where there is a GPU the same pictures are painted on it, with graphs and without.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_fast.sampling import PerImageNoise
from glide_fast.sampling.graph import CannotCaptureError, Graphs
from glide_fast.sampling.graph_cuda import SHARED, CudaRecorder
from glide_fast.sampling.pipeline import StageOptions, sample_stage
from tests import tiny

DEVICE = torch.device("cuda", 0)


class Stream:
    """A stream with a name, that says for whom it waits."""

    def __init__(self, cuda: Pretended, number: int) -> None:
        self.cuda, self.cuda_stream = cuda, number

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


class Pretended:
    """The parts of ``torch.cuda`` that a recorder uses; ``log`` is what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current, self.streams, self.reserved, self.capturing = Stream(self, 0), 0, 1000, False
        self.generator = SimpleNamespace(
            clone_state=lambda: "before", graphsafe_set_state=lambda state: self.log.append(f"rng {state}")
        )
        for name in (
            "current_stream",
            "Stream",
            "stream",
            "CUDAGraph",
            "graph",
            "synchronize",
            "empty_cache",
            "memory_reserved",
            "is_current_stream_capturing",
            "get_device_properties",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "default_generators", (self.generator,))

    def current_stream(self, device: torch.device) -> Stream:
        assert device == DEVICE
        return self.current

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802 (CUDA's name)
        assert device == DEVICE
        self.streams += 1
        return Stream(self, 100 + self.streams)

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:  # noqa: N802 (CUDA's name)
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def graph(self, graph: Any, *, stream: Stream, capture_error_mode: str) -> Any:
        assert hasattr(graph, "replay")
        assert self.current is stream
        self.log.append(f"capture on {stream.cuda_stream}, {capture_error_mode}")
        yield
        self.reserved += 512
        self.log.append("end")

    def synchronize(self, device: torch.device) -> None:
        assert device == DEVICE
        self.log.append("synchronize")

    def empty_cache(self) -> None:
        self.reserved = 600

    def memory_reserved(self, device: torch.device) -> int:
        assert device == DEVICE
        return self.reserved

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_properties(self, device: torch.device) -> Any:
        assert device == DEVICE
        return SimpleNamespace(total_memory=8000)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


def results() -> tuple[Tensor, ...]:
    return (torch.ones(2),)


def test_the_first_call_runs_beside_the_current_stream_and_both_wait(cuda: Pretended) -> None:
    recorder = CudaRecorder()
    streams: list[int] = []

    def function() -> tuple[Tensor, ...]:
        streams.append(cuda.current.cuda_stream)
        return results()

    assert torch.equal(recorder.warm_up(DEVICE, function)[0], torch.ones(2))
    assert cuda.log == ["101 waits for 0", "0 waits for 101"]
    assert streams == [101]
    assert cuda.current.cuda_stream == 0


def test_a_recording_is_made_where_it_was_warmed_up_and_knows_its_memory(cuda: Pretended) -> None:
    recorder = CudaRecorder()
    recorder.warm_up(DEVICE, results)
    cuda.log.clear()
    recording, outputs = recorder.record(DEVICE, results)
    recording.replay()
    assert cuda.log == ["synchronize", "capture on 101, thread_local", "end", "replay"]
    assert recording.nbytes == 512
    assert torch.equal(outputs[0], torch.ones(2))
    cuda.current = Stream(cuda, 7)
    recorder.warm_up(DEVICE, results)
    assert cuda.log[-1] == "7 waits for 102"  # another stream has another beside it


def test_after_a_failed_capture_stream_and_random_numbers_are_as_before(cuda: Pretended) -> None:
    def fails() -> tuple[Tensor, ...]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder().record(DEVICE, fails)
    assert cuda.log[-1] == "rng before"
    assert cuda.current.cuda_stream == 0


def test_a_graph_belongs_to_a_device_and_a_stream(cuda: Pretended) -> None:
    recorder = CudaRecorder()
    assert recorder.serves(DEVICE)
    assert not recorder.serves(torch.device("cpu"))
    first = recorder.place(DEVICE)
    cuda.current = Stream(cuda, 7)
    assert recorder.place(DEVICE) != first
    cuda.capturing = True
    with pytest.raises(CannotCaptureError, match="the sampler is itself being captured"):
        recorder.place(DEVICE)
    assert recorder.room(DEVICE) == 2000
    with pytest.raises(CannotCaptureError, match="the pictures are on cpu, where there are no graphs"):
        Graphs(recorder).session(torch.device("cpu"), [], "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unit", ["step", "loop"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_a_gpu_paints_the_same_by_graphs(sampler: str, unit: Any) -> None:
    stage = tiny.model(tiny.config())
    stage.network.to("cuda")
    graphs = SHARED[unit]
    graphs.clear()
    for prompt, guidance in (("key", 3.0), ("sun", 3.0), ("cat", 1.5)):
        pictures = [
            sample_stage(
                stage,
                [prompt],
                noise=PerImageNoise([0]),
                options=StageOptions(sampler=sampler, steps=6, guidance=guidance, graph=choice),
            )
            for choice in (unit, "off")
        ]
        torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)
    assert len(graphs) == 1
    assert graphs.nbytes > 0
    graphs.clear()
