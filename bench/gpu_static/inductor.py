"""Counted: what the Inductor of torch.compile launches for the original's computation on an H100.

Inductor needs a device for little: it asks which one there is, sends constants to it and tunes kernels on it.
:func:`emitted` answers for an H100, keeps the constants on the host and leaves tuning out. All else is
torch.compile's own: it traces, fuses, and writes the module that would serve a GPU. That module is then run
on tensors without memory. In place of being compiled, its Triton kernels are written down when they are
launched; libraries that it calls are counted as :mod:`bench.gpu_static.aten` says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_static.counter import LaunchCounter, count
from bench.gpu_static.launches import Launch, footprint, is_half
from bench.gpu_static.workloads import Workload, workloads

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",  # of AMD's
)
SETTINGS = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "shape_padding": False,  # whether it pays to pad a product is measured on a GPU
    "benchmark_combo_kernel": True,  # makes each kernel say how many bytes it moves
}
SECONDS = 540  # for all steps
PROGRAM = """
import sys
from bench.gpu_static import stand_in
stand_in.install()  # before torch is imported
from bench.gpu_static import inductor
inductor.main(sys.argv[1])
"""
_BYTES = re.compile(r"'kernel_num_gb': ([-+.\de]+)")
_HEAD = re.compile(r"^def \w+\((.*)\):", re.MULTILINE)
_ACCESS = re.compile(r"\btl\.(load|store)\((\w+)")


@dataclass
class Served:
    """The launches of each step that torch.compile serves, and why it does not serve others."""

    launches: dict[str, list[Launch]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Keep what :func:`row` says of a step."""
        if "refusal" in row:
            self.refusals[row["step"]] = row["refusal"]
        else:
            self.launches[row["step"]] = [Launch(**each) for each in row["launches"]]


class WrittenKernel:
    """A Triton kernel of Inductor's that is written down when it is launched.

    It moves its buffers once, those that its code both loads and stores twice, or what Inductor says where
    that is less: of some it needs a part.
    """

    def __init__(self, counter: LaunchCounter, name: str, source: str) -> None:
        """Raise ValueError if the code does not say what it moves."""
        said, head = _BYTES.search(source), _HEAD.search(source)
        if said is None or head is None:
            raise ValueError(f"Inductor does not say what {name} moves; count with another torch")
        self.counter, self.name, self.said = counter, name, round(1e9 * float(said[1]))
        accesses = Counter(pointer for _, pointer in set(_ACCESS.findall(source)))
        self.times = [max(1, accesses[each]) for each in head[1].split(", ")]

    def run(self, *arguments: Any, stream: Any) -> None:  # noqa: ARG002 (of the generated code's call)
        """Write a launch down."""
        pairs = zip(arguments, self.times, strict=False)
        tensors = [(each, times) for each, times in pairs if isinstance(each, Tensor)]
        most = sum(times * footprint(each) for each, times in tensors)
        half = is_half(each for each, _ in tensors)
        self.counter.launches.append(Launch(self.name, "triton", min(self.said, most), half=half))


@contextmanager
def emitted(counter: LaunchCounter) -> Iterator[None]:
    """Let Inductor write code for an H100 on any machine, and hand the launches of that code to the counter.

    Raises:
        ImportError: Triton is not installed, or this torch's Inductor is made otherwise.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    guards = torch._C._dynamo.guards
    with ExitStack() as stack:
        for place, name, value in (*_device(), *_host()):
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        for place, name, value in (
            (AsyncCompile, "triton", lambda _self, *kernel, **_: WrittenKernel(counter, *kernel[:2])),
            (guards, "_empty_strided_cuda", _empty),
            (guards, "_reinterpret_tensor", _part),
            (guards, "copy_if_misaligned", lambda tensor: tensor),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(config.patch(SETTINGS))
        torch._dynamo.reset()
        yield


class _OnHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))


Patches = Iterator[tuple[Any, str, Any]]


def _device() -> Patches:
    """What is asked of a device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    yield driver, "_active", SimpleNamespace(get_current_target=lambda: target)
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "device_count", lambda: 1
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "_get_device_properties", lambda _device: H100
    yield torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()
    yield torch.cuda, "set_rng_state", lambda *_: None
    yield torch._C, "_cuda_getDevice", lambda: 0
    yield torch._C, "_cuda_setDevice", lambda _index: None
    yield torch._C, "_cuda_getCurrentRawStream", lambda _index: 0
    yield FakeTensorMode, "avoid_device_init", True


def _host() -> Patches:
    """What Inductor would compute on the device while it compiles: numbers that all elements have."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder

    run = UniformValueConstantFolder.run

    def run_on_host(folder: Any) -> Any:
        with _OnHost():  # type: ignore[no-untyped-call]
            return run(folder)

    yield UniformValueConstantFolder, "run", run_on_host


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _part(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def counted(name: str) -> Served:
    """The steps with ``name`` in their names, counted in a process that Inductor may leave changed."""
    printed, failure = _printed(name)
    found = Served()
    for line in printed.splitlines():
        if line.startswith("{"):
            found.add(json.loads(line))
    for workload in _chosen(name):
        if workload.name not in found.launches:
            found.refusals.setdefault(workload.name, failure)
    return found


def _printed(name: str) -> tuple[str, str]:
    """What the process prints, and why it failed or nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TORCHINDUCTOR_CACHE_DIR"] = folder
        command = [sys.executable, "-c", PROGRAM, name]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as late:
            printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            return printed, f"not finished after {SECONDS} s"
    words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return done.stdout, words[0] if done.returncode else ""


def _chosen(name: str) -> list[Workload]:
    return [each for each in workloads() if name in each.name and each.compiled is not None]


def main(name: str) -> None:
    """Print a JSON object a line for each step with ``name`` in its name; called where the stand-in is."""
    for workload in _chosen(name):
        print(json.dumps(row(workload)), flush=True)


def row(workload: Workload) -> dict[str, Any]:
    """The launches of a step, or why torch.compile does not serve it here."""
    if workload.compiled is None:
        raise ValueError(f"{workload.name} has no form for torch.compile; count another step")
    try:
        launches = count(workload.compiled, emitted)
    except Exception as error:  # what may go wrong inside a compiler is not known
        words = str(error).strip().splitlines() or [""]
        return {"step": workload.name, "refusal": f"{type(error).__name__}: {words[0]}"[:200]}
    return {"step": workload.name, "launches": [asdict(each) for each in launches]}
