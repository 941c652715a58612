"""What a timing depends on besides the code: machine, versions, and the limits that rates are shares of.

The peak is measured by a few lines of C (``peak.c``) that the system's compiler builds for this CPU, run on
as many threads as torch has; without a compiler it is that of torch's largest matrix product, and the facts
say which. The bandwidth is that of a copy of tensors that fit into no cache.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from glide_fast import __version__
from glide_fast.ops.dispatch import cpp_library

SOURCE = Path(__file__).with_name("peak.c")
PACKAGES = ("openvino", "onnxruntime")
_COPY_BYTES = 1 << 28
_ROUNDS = 20_000_000
_REPEATS = 5


@functools.cache
def facts(device: str = "cpu") -> dict[str, str | int | float]:
    """Device, instruction set, threads, versions, and on a CPU the peak and the bandwidth."""
    library = cpp_library()
    known: dict[str, str | int | float] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "isa": "reference" if library is None else str(library.capability()),
        "threads": torch.get_num_threads(),
        "glide_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    if device == "cuda":
        peak, probe = gpu_gflops(), "largest float16 product of cuBLAS"
        known |= {"cuda": str(torch.version.cuda or torch.version.hip), "isa": "CUDA"}
    else:
        peak, probe = peak_gflops(torch.get_num_threads())
    copied = gpu_copy_gbs() if device == "cuda" else copy_gbs()
    return known | {"peak_gflops": peak, "peak_probe": probe, "copy_gbs": copied}


def gpu_gflops(device: str = "cuda", side: int = 8192) -> float:
    """GFLOP/s of a large float16 product on a GPU."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    return 2 * side**3 / _gpu_seconds(lambda: a @ b) / 1e9


def gpu_copy_gbs(device: str = "cuda", size: int = 4 * _COPY_BYTES) -> float:
    """What a copy on a GPU reads and writes a second, in GB."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _gpu_seconds(lambda: target.copy_(source)) / 1e9


def _gpu_seconds(call: Callable[[], object]) -> float:
    """The shortest of some calls, between two events."""
    times = []
    for _ in range(2 * _REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e-3 * float(start.elapsed_time(end)))
    return min(times)


def peak_gflops(threads: int) -> tuple[float, str]:
    """The float32 peak of so many threads in GFLOP/s, and the name of the probe that measured it."""
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled_probe(Path(folder))
        if library is None:
            return _product_gflops(), "largest matrix product of torch (no C compiler)"
        return _chains_gflops(library, threads), "chains of FMAs in C"


def _compiled_probe(folder: Path) -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return None
    target = folder / "peak.so"
    command = [*shlex.split(compiler), "-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    done = subprocess.run([*command, str(SOURCE), "-o", str(target)], capture_output=True, check=False)
    return ctypes.CDLL(str(target)) if done.returncode == 0 else None


def _chains_gflops(library: ctypes.CDLL, threads: int) -> float:
    library.peak_flops.restype = ctypes.c_double
    library.peak_flops.argtypes = (ctypes.c_long, ctypes.POINTER(ctypes.c_float))

    def run(_thread: int) -> float:
        return float(library.peak_flops(_ROUNDS, ctypes.byref(ctypes.c_float())))

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            start = time.perf_counter()
            work = sum(pool.map(run, range(threads)))
            best = max(best, work / (time.perf_counter() - start))
    return best / 1e9


def _product_gflops(side: int = 2048) -> float:
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(_seconds(lambda: a @ b) for _ in range(_REPEATS)) / 1e9


def copy_gbs() -> float:
    """What a copy reads and writes a second, in GB."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / min(_seconds(lambda: target.copy_(source)) for _ in range(_REPEATS + 1)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(": ", 1)[1]
    return platform.processor() or platform.machine()


def peak_of_call(call: Callable[[], object]) -> int | None:
    """Bytes that a call needs beyond what is resident before it; None where the system does not tell.

    Linux with glibc does.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system
        reset.write_text("5", encoding="ascii")  # the high-water mark starts again at what is resident
        before = _kibibytes(status, "VmHWM")
        call()
        return max(0, 1024 * (_kibibytes(status, "VmHWM") - before))
    except (OSError, KeyError, AttributeError, TypeError):
        return None


def _kibibytes(status: Path, field: str) -> int:
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)
